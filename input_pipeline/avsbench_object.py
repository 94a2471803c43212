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

from . import clips
from .clips import FRAMES, Clip
from .errors import UserError, of_disk
from .files import is_there

_SETS = {'v1s': 's4', 'v1m': 'ms3'}  # as the files of each subset begin
_COLUMNS = {'v1s': ('name', 'category', 'split'), 'v1m': ('video_id', 'split')}


@dataclasses.dataclass(frozen=True)
class ObjectClip(Clip):
  """One clip of S4 (subset v1s) or MS3 (v1m).

  Attributes:
    category: the folder between split and clip in S4; '' in MS3.
  """

  category: str = ''

  label_kind = 'binary'

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


def find_tables(root: str) -> dict[str, str]:
  """The folders that hold S4 and MS3, by subset; without those that are not there.

  They are `root` itself or, as the set is distributed (Single-source, Multi-sources), folders in
  it.

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
  found = {}
  for subset in _SETS:
    places = [folder for folder in (root, *below) if is_there(table_path(folder, subset))]
    if len(places) > 1 and places[0] != root:
      raise UserError(
        f'{table_path(places[0], subset)} and {table_path(places[1], subset)} are the same set '
        f'twice; name the folder of one of them.'
      )
    if places:
      found[subset] = places[0]
  return found


def read_clips(folders: dict[str, str]) -> list[ObjectClip]:
  """The clips of S4 and MS3 in the order of their tables; `folders` as of `find_tables`.

  Raises:
    UserError: a table is unreadable (see `clips.read_table`), or holds an unknown split, an unsafe
      name or the same one twice.
  """
  result = []
  for subset, root in folders.items():
    path, columns = table_path(root, subset), _COLUMNS[subset]
    rows = clips.read_table(path, columns, first=columns[0])
    found = []
    for line, row in rows:
      where = f'{path}, line {line}'
      uid = clips.check_name(where, columns[0], row[columns[0]])
      split = clips.check_split(where, row['split'])
      category = clips.check_name(where, 'category', row['category']) if subset == 'v1s' else ''
      found.append(ObjectClip(root, uid, subset, split, FRAMES[subset], category))
    clips.check_unique(found, [line for line, _ in rows])
    result += found
  return result
