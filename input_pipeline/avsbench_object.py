"""AVSBench-object on disk, the older layout: S4 (one source) and MS3 (several), labels binary.

ROOT/s4_meta_data.csv                                    columns name, category and split
ROOT/s4_data/visual_frames/SPLIT/CATEGORY/VID/VID_T.png  one frame a second, T from 1; 224x224
ROOT/s4_data/gt_masks/SPLIT/CATEGORY/VID/VID_T.png       255 where something sounds, else 0
ROOT/s4_data/audio_wav/SPLIT/CATEGORY/VID.wav
ROOT/ms3_meta_data.csv                                   columns video_id and split
ROOT/ms3_data/visual_frames/VID/VID.mp4_T.png
ROOT/ms3_data/gt_masks/SPLIT/VID/VID_T.png
ROOT/ms3_data/audio_wav/SPLIT/VID.wav

The same clips are the subsets v1s and v1m of AVSBench-semantic, and bear these names here: so every
config works with either layout. The pickles in audio_log_mel are not read; the sound is.
"""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from . import clips
from .avsbench import PUBLISHED, SUBSETS, SemanticClip
from .clips import Clip
from .errors import UserError, of_disk
from .files import is_there

_SETS = {'v1s': 's4', 'v1m': 'ms3'}  # as the files of each subset begin
_COLUMNS = {'v1s': ('name', 'category', 'split'), 'v1m': ('video_id', 'split')}
OBJECT = clips.DataSet(
  name='AVSBench-object',
  tables=tuple(f'{name}_meta_data.csv' for name in _SETS.values()),
  subsets=SUBSETS,  # those of AVSBench: to ask for v2 as well is no fault
  label_kind='binary',
  classes=('background', 'sounding'),
  palette=np.array([[0, 0, 0], [255, 255, 255]], np.uint8),
  published=PUBLISHED,
)


@dataclasses.dataclass(frozen=True)
class ObjectClip(SemanticClip):
  """One clip of MS3 (subset v1m), or S4 (v1s), where the category is a folder below the split."""

  data_set = OBJECT

  @classmethod
  def find_tables(cls, root: str) -> list[str]:
    """The tables of S4 and MS3 in `root` or, as the set is distributed, in folders in it.

    Raises:
      UserError: two folders in `root` hold the same one.
    """
    try:
      with os.scandir(root) as entries:
        below = sorted(entry.path for entry in entries if entry.is_dir())
    except OSError as error:
      if of_disk(error):
        raise
      below = []
    found = []
    for subset in _SETS:
      paths = (table_path(folder, subset) for folder in (root, *below))
      places = [path for path in paths if is_there(path)]
      if len(places) > 1 and places[0] != table_path(root, subset):
        raise UserError(
          f'{places[0]} and {places[1]} are the same set twice: name the folder of one of them'
        )
      found += places[:1]
    return found

  @classmethod
  def read(cls, tables: Sequence[str]) -> list[Clip]:
    return [clip for table in tables for clip in _read_table(table)]

  @property
  def table(self) -> str:
    return table_path(self.root, self.subset)

  @property
  def subset_folder(self) -> str:
    return os.path.join(self.root, f'{_SETS[self.subset]}_data')

  @property
  def folder(self) -> str:
    if self.subset == 'v1m':  # the only folder of the layout without a split
      return os.path.join(self.subset_folder, 'visual_frames', self.uid)
    return self._path('visual_frames', self.uid)

  @property
  def audio_path(self) -> str:
    return self._path('audio_wav', f'{self.uid}.wav')

  def frame_path(self, t: int) -> str:
    ending = '.mp4' if self.subset == 'v1m' else ''
    return os.path.join(self.folder, f'{self.uid}{ending}_{t + 1}.png')

  def label_ids_path(self, t: int) -> str:
    return self._path('gt_masks', self.uid, f'{self.uid}_{t + 1}.png')

  def label_rgb_path(self, t: int) -> str:
    return self.label_ids_path(t)  # a binary mask is both

  def _path(self, kind: str, *parts: str) -> str:
    return os.path.join(self.subset_folder, kind, self.split, self.category, *parts)


def table_path(root: str, subset: str) -> str:
  """The file that lists the clips of S4 (subset v1s) or MS3 (v1m)."""
  return os.path.join(root, f'{_SETS[subset]}_meta_data.csv')


def _read_table(path: str) -> list[Clip]:
  root, name = os.path.split(path)
  subset = next(subset for subset in _SETS if name == table_path('', subset))
  columns = _COLUMNS[subset]
  rows = clips.read_table(path, columns, first=columns[0])
  found = []
  for line, row in rows:
    where = f'{path}, line {line}'
    uid = clips.check_name(where, columns[0], row[columns[0]])
    split = clips.check_split(where, row['split'])
    category = clips.check_name(where, 'category', row['category']) if subset == 'v1s' else ''
    found.append(ObjectClip(root, uid, subset, split, SUBSETS[subset], category))
  clips.check_unique(found, [line for line, _ in rows])
  return found
