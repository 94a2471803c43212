"""AVSBench as a TFDS data set in array_record format, which needs no TensorFlow to write or read.

>>> from aavs_jax.input_pipeline import avsbench_tfds  # registers it
>>> import tensorflow_datasets as tfds
>>> manual = tfds.download.DownloadConfig(manual_dir=ROOT)
>>> tfds.builder('avsbench/v2', data_dir=DIR).download_and_prepare(download_config=manual)
>>> tfds.data_source('avsbench/v2', data_dir=DIR, split='train')[0]['frames']
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from . import audio, prepare, prepared
from .avsbench import SUBSETS
from .clips import SPLITS, Clip
from .errors import UserError
from .index import read_index


@dataclasses.dataclass(eq=False)
class AvsbenchConfig(tfds.core.BuilderConfig):
  """One subset at the sizes of a config; `label_kind` as of clips.DataSet."""

  subset: str = ''
  label_kind: str = 'semantic'
  image_size: int = 384
  eval_size: int = 224


class Avsbench(tfds.core.GeneratorBasedBuilder):
  """Clips with all that training and evaluation read of them, see prepare.clip_arrays."""

  VERSION = tfds.core.Version('1.0.0')
  BUILDER_CONFIGS = (
    AvsbenchConfig(name='v1s', description='AVSBench-semantic, one source', subset='v1s'),
    AvsbenchConfig(name='v1m', description='AVSBench-semantic, several sources', subset='v1m'),
    AvsbenchConfig(name='v2', description='AVSBench-semantic, ten seconds', subset='v2'),
    AvsbenchConfig(
      name='s4', description='S4 of AVSBench-object', subset='v1s', label_kind='binary'
    ),
    AvsbenchConfig(
      name='ms3', description='MS3 of AVSBench-object', subset='v1m', label_kind='binary'
    ),
  )
  # TFDS finds it by a package that it does not require of these versions of Python.
  code_path = epath.Path(__file__)
  pkg_dir_path = code_path.parent
  MANUAL_DOWNLOAD_INSTRUCTIONS = 'manual_dir is the folder of the data set, in its own layout.'

  def __init__(self, *, file_format='array_record', **kwargs):
    super().__init__(file_format=file_format, **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    size, eval_size = self.builder_config.image_size, self.builder_config.eval_size
    num_frames = SUBSETS[self.builder_config.subset]

    def tensor(*shape, dtype=np.uint8):
      return tfds.features.Tensor(shape=shape, dtype=dtype)

    features = {
      'uid': tfds.features.Text(),
      'frames': tensor(num_frames, size, size, 3),
      'log_mel': tensor(num_frames, audio.EXAMPLE_FRAMES, audio.MEL_BANDS, dtype=np.float32),
      # How many frames have a label differs between splits.
      'labelled': tensor(None, dtype=np.int64),
      'label_ids': tensor(None, size, size),
      'label_ids_eval': tensor(None, eval_size, eval_size),
      'metric_target': tensor(None, eval_size, eval_size, dtype=np.bool_),
    }
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(features),
      homepage='https://github.com/OpenNLPLab/AVSBench',
    )

  def _split_generators(self, dl_manager) -> dict:
    """Raises UserError if manual_dir is no data set, or one of the other layout."""
    root = dl_manager.manual_dir
    clips = read_index(root, subsets=[self.builder_config.subset])
    prepared.require_files(clips)
    label_kind = clips[0].data_set.label_kind
    if label_kind != self.builder_config.label_kind:
      raise UserError(
        f'{root} holds {label_kind} labels, and avsbench/{self.builder_config.name} '
        f'{self.builder_config.label_kind} ones: choose the builder config of its layout'
      )
    by_split = {split: [clip for clip in clips if clip.split == split] for split in SPLITS}
    return {split: self._generate_examples(chosen) for split, chosen in by_split.items() if chosen}

  def _generate_examples(self, clips: Sequence[Clip]) -> Iterator[tuple[str, dict]]:
    for clip in clips:
      arrays = prepare.clip_arrays(
        clip, self.builder_config.image_size, self.builder_config.eval_size
      )
      yield clip.uid, {'uid': clip.uid, **arrays}
