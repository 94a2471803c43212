"""The TFDS builder: what it reads back is what the raw path gives, without TensorFlow."""

import subprocess
import sys

import pytest

from aavs_jax.input_pipeline.compose.dataset import compose

# In a process of its own, in which any attempt to import TensorFlow fails and shows.
_BUILD_AND_READ = """
import sys

def refuse(event, arguments):
  if event == 'import' and arguments[0].split('.')[0] == 'tensorflow':
    tried.append(arguments[0])
    raise ImportError('TensorFlow is imported')

tried = []
sys.addaudithook(refuse)

import numpy as np
import tensorflow_datasets as tfds
from aavs_jax.input_pipeline import avsbench_tfds, labels
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.images import load_frame, load_label_ids, load_label_rgb
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.input_pipeline.reader import load_log_mel

root, folder, name, subset, wrong = sys.argv[1:]
tfds.disable_progress_bar()
builder = tfds.builder(f'avsbench/{name}', data_dir=folder)
builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=root))
splits = tfds.data_source(f'avsbench/{name}', data_dir=folder)
for split in ('train', 'test'):
  clips = read_index(root, split, [subset])
  found = {example['uid'].decode(): example for example in splits[split]}
  assert found.keys() == {clip.uid for clip in clips}
  for clip in clips:
    got = found[clip.uid]
    def equal(key, *want):
      np.testing.assert_array_equal(got[key], np.stack(want))
      assert got[key].dtype == want[0].dtype, key
    times = clip.labelled_frames
    equal('frames', *(load_frame(clip, t, 384) for t in range(clip.num_frames)))
    equal('log_mel', *load_log_mel(clip))
    assert got['labelled'].tolist() == list(times)
    ids = [load_label_ids(clip, t) for t in times]
    equal('label_ids', *(labels.resize_ids(i, 384) for i in ids))
    equal('label_ids_eval', *(labels.resize_ids(i, 224) for i in ids))
    colours = (load_label_rgb(clip, t) for t in times)
    equal('metric_target', *(labels.binary_metric_target(rgb, 224) for rgb in colours))
assert not tried and 'tensorflow' not in sys.modules, tried
wrong = tfds.builder(f'avsbench/{wrong}', data_dir=folder)
try:
  wrong.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=root))
except UserError as error:
  print(error)
"""


@pytest.mark.parametrize(
  ('layout', 'name', 'subset', 'wrong'),
  [('semantic', 'v1s', 'v1s', 's4'), ('object', 'ms3', 'v1m', 'v1m')],
)
def test_examples_are_those_of_the_files_without_tensorflow(tmp_path, layout, name, subset, wrong):
  one, none = ({'v1s': 0, 'v1m': 0, 'v2': 0, subset: count} for count in (1, 0))
  compose(tmp_path / 'set', clips={'train': one, 'val': none, 'test': one}, num_classes=3,
          layout=layout)  # fmt: skip
  run = subprocess.run(
    [sys.executable, '-c', _BUILD_AND_READ, tmp_path / 'set', tmp_path / 'tfds',
     name, subset, wrong],
    capture_output=True, text=True,
  )  # fmt: skip
  assert run.returncode == 0, run.stderr
  assert 'choose the builder config of its layout' in run.stdout
