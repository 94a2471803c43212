"""AVSBench-semantic on disk (the older layout is in avsbench_object.py).

ROOT/metadata.csv                      columns uid, label (the subset) and split; others ignored
ROOT/SUBSET/UID/frames/T.jpg           one frame a second, T from 0
ROOT/SUBSET/UID/labels_semantic/T.png  class ids as grey values
ROOT/SUBSET/UID/labels_rgb/T.png       the same in palette colours
ROOT/SUBSET/UID/audio.wav
"""

import dataclasses
import os
from collections.abc import Sequence

from . import clips, labels
from .clips import Clip

SUBSETS = {'v1s': 5, 'v1m': 5, 'v2': 10}  # frames, and seconds, of a clip of each
CLASSES = (
  'background', 'accordion', 'airplane', 'axe', 'baby', 'bassoon', 'bell', 'bird', 'boat', 'boy',
  'bus', 'car', 'cat', 'cello', 'clarinet', 'clipper', 'clock', 'dog', 'donkey', 'drum', 'duck',
  'elephant', 'emergency-car', 'erhu', 'flute', 'frying-food', 'girl', 'goose', 'guitar', 'gun',
  'guzheng', 'hair-dryer', 'handpan', 'harmonica', 'harp', 'helicopter', 'hen', 'horse', 'keyboard',
  'leopard', 'lion', 'man', 'marimba', 'missile-rocket', 'motorcycle', 'mower', 'parrot', 'piano',
  'pig', 'pipa', 'saw', 'saxophone', 'sheep', 'sitar', 'sorna', 'squirrel', 'tabla', 'tank',
  'tiger', 'tractor', 'train', 'trombone', 'truck', 'trumpet', 'tuba', 'ukulele', 'utv',
  'vacuum-cleaner', 'violin', 'wolf', 'woman',
)  # fmt: skip
PALETTE = labels.colour_map(len(CLASSES))
PUBLISHED = {  # clips of train, val, test
  'v1s': (3452, 740, 740),  # S4 of AVSBench-object
  'v1m': (296, 64, 64),  # MS3
  'v2': (4750, 500, 750),
}
SEMANTIC = clips.DataSet(
  name='AVSBench-semantic',
  tables=('metadata.csv',),
  subsets=SUBSETS,
  label_kind='semantic',
  classes=CLASSES,
  palette=PALETTE,
  published=PUBLISHED,
)


@dataclasses.dataclass(frozen=True)
class SemanticClip(Clip):
  """One clip of v1s, v1m or v2."""

  data_set = SEMANTIC

  @classmethod
  def read(cls, tables: Sequence[str]) -> list[Clip]:
    (table,) = tables
    rows = clips.read_table(table, ('uid', 'label', 'split'))
    found = []
    for line, row in rows:
      where = f'{table}, line {line}'
      subset = clips.check_subset(where, 'label', row['label'], cls.data_set)
      split = clips.check_split(where, row['split'])
      uid = clips.check_name(where, 'uid', row['uid'])
      found.append(cls(os.path.dirname(table), uid, subset, split, SUBSETS[subset]))
    clips.check_unique(found, [line for line, _ in rows])
    return found

  @property
  def labelled_frames(self) -> tuple[int, ...]:
    only_first = self.subset == 'v1s' and self.split == 'train'
    return (0,) if only_first else super().labelled_frames

  @property
  def skipped_if_silent(self) -> bool:
    return self.subset == 'v1m'  # of several sources; as released
