"""What a data set is, its clips, and the tables that list them."""

import csv
import dataclasses
import io
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from . import files
from .errors import UserError

SPLITS = ('train', 'val', 'test')
IGNORE = 255  # label value that belongs to no target
EVAL_ITEM_FRAMES = 5

_MAX_TABLE = 16_000_000  # bytes; the published tables have less than two million


@dataclasses.dataclass(frozen=True, eq=False)
class DataSet:
  """What is true of a whole data set.

  Attributes:
    name: what reports and messages call it.
    tables: names of the files that list its clips, by which its folder is known.
    subsets: frames of a clip of each subset, in the order that all tables of scores have.
    label_kind: 'semantic' or 'binary': what sounds, but not as what.
    classes: name of each class id, the background first.
    palette: uint8 [C, 3], the RGB colour of each class in labels_rgb.
    published: clips of train, val and test in each subset; {} if it was never published.
  """

  name: str
  tables: tuple[str, ...]
  subsets: Mapping[str, int]
  label_kind: str
  classes: tuple[str, ...]
  palette: np.ndarray
  published: Mapping[str, tuple[int, int, int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Clip:
  """One clip: where it lies, and what its data set says about it.

  A data set is a subclass with `data_set`, `read` and whatever else differs, in a file of its own
  such as avsbench.py, and a line in index.py. It adds no fields: those here are what prepared
  shards keep.

  Attributes:
    root: folder of the data set.
    uid: name of the clip's folder, unique in its subset.
    subset: one of data_set.subsets.
    split: train, val or test.
    num_frames: as data_set.subsets says.
    category: what the clip shows and lets hear, where its place on disk tells; '' elsewhere.
  """

  root: str
  uid: str
  subset: str
  split: str
  num_frames: int
  category: str = ''

  data_set: ClassVar[DataSet]

  @classmethod
  def find_tables(cls, root: str) -> list[str]:
    """Those of data_set.tables that are in a folder."""
    return tables_in(root, cls.data_set)

  @classmethod
  def read(cls, tables: Sequence[str]) -> list['Clip']:
    """All clips of the tables of `find_tables`, in their order. Raises UserError for bad ones."""
    raise NotImplementedError

  @property
  def name(self) -> str:
    """Unique in its data set."""
    return f'{self.split}/{self.key}'

  @property
  def key(self) -> str:
    """Unique in its split; how messages and masks name it."""
    return f'{self.subset}/{self.uid}'

  @property
  def table(self) -> str:
    """The file that lists the clip."""
    return os.path.join(self.root, self.data_set.tables[0])

  @property
  def subset_folder(self) -> str:
    return os.path.join(self.root, self.subset)

  @property
  def folder(self) -> str:
    """The clip's folder; it has no other clip's files."""
    return os.path.join(self.subset_folder, self.uid)

  @property
  def audio_path(self) -> str:
    return os.path.join(self.folder, 'audio.wav')

  @property
  def labelled_frames(self) -> tuple[int, ...]:
    """Frames that have a label."""
    return tuple(range(self.num_frames))

  @property
  def skipped_if_silent(self) -> bool:
    """Whether training of the binary task passes over the clip if nothing sounds in it."""
    return False

  def frame_path(self, t: int) -> str:
    return os.path.join(self.folder, 'frames', f'{t}.jpg')

  def label_ids_path(self, t: int) -> str:
    return os.path.join(self.folder, 'labels_semantic', f'{t}.png')

  def label_rgb_path(self, t: int) -> str:
    return os.path.join(self.folder, 'labels_rgb', f'{t}.png')


def fold_of(clip: Clip, folds: int) -> int:
  """To which of so many parts of a data set a clip belongs; all of one video are in the same.

  The video's name alone decides: a uid without the milliseconds at its end, if it has them.
  """
  return zlib.crc32(re.sub(r'_\d+_\d+$', '', clip.uid).encode()) % folds


def tables_in(root: str, data_set: DataSet) -> list[str]:
  """The files in a folder that have the name of a table, dangling links among them."""
  paths = (os.path.join(root, name) for name in data_set.tables)
  return [path for path in paths if files.is_there(path) or os.path.islink(path)]


def read_table(
  path: str, columns: Sequence[str], first: str | None = None
) -> list[tuple[int, dict[str, str]]]:
  """Line numbers and rows of a CSV file, each with a text for every one of `columns`.

  A byte order mark, either kind of line end, quotes, empty lines, other columns and any order of
  them are ordinary.

  Args:
    path: the file.
    columns: names in the header.
    first: one of them which the file's first column stands in for where none has this name.

  Raises:
    UserError: the file is missing, too large for a table of clips, not UTF-8 or not CSV, or lacks
      a column, in the header or in a row.
  """
  data = files.read_file(
    path,
    _MAX_TABLE,
    'a table of clips',
    'restore it',
  )
  try:
    text = data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = error.object[: error.start].count(b'\n') + 1
    raise UserError(
      f'{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8: save the file as '
      'UTF-8'
    ) from error

  reader = csv.DictReader(io.StringIO(text, newline=''), strict=True)
  rows = []
  try:
    header = reader.fieldnames or []
    source = {column: column for column in columns}
    if header and first is not None and first not in header:
      source[first] = header[0]
    for column in source.values():
      if column not in header:
        raise UserError(
          f'{path}, line 1: no column {column!r} among {", ".join(map(repr, header)) or "none"}: '
          f'the columns {", ".join(columns)} are needed'
        )
      if header.count(column) > 1:
        raise UserError(
          f'{path}, line 1: {header.count(column)} columns are called {column!r}: rename or remove '
          'all but one'
        )
    for row in reader:
      for column in source.values():
        if row[column] is None:
          raise UserError(
            f'{path}, line {reader.line_num}: the row starting {row[header[0]]!r} ends before '
            f'column {column!r}: complete it'
          )
      rows.append((reader.line_num, {column: row[source[column]] for column in columns}))
  except csv.Error as error:
    raise UserError(
      f'{path}, line {reader.reader.line_num}: not readable as CSV ({error}): mend the line'
    ) from error
  return rows


def check_subset(where: str, column: str, subset: str, data_set: DataSet) -> str:
  """The subset that a row names. Raises UserError, which begins with `where`, if there is none."""
  if subset not in data_set.subsets:
    known = ', '.join(data_set.subsets)
    raise UserError(f'{where}: {column} is {subset!r}, not one of {known}')
  return subset


def check_split(where: str, split: str) -> str:
  """The split that a row names. Raises UserError, which begins with `where`, if there is none."""
  if split not in SPLITS:
    raise UserError(f'{where}: split is {split!r}, not one of {", ".join(SPLITS)}')
  return split


def check_name(where: str, column: str, name: str) -> str:
  """A name that becomes part of paths, here and where predictions are written.

  Raises:
    UserError: it could lead out of the folder that it is meant for, or cannot be printed.
  """
  if name in ('', '.', '..') or '/' in name or '\\' in name or not name.isprintable():
    raise UserError(f'{where}: {column} is {name!r}, not the name of a folder')
  return name


def check_unique(clips: Sequence[Clip], lines: Sequence[int]) -> None:
  """Raises UserError if a uid occurs twice in a subset; `lines` are the rows of `clips`."""
  seen: dict[tuple[str, str], int] = {}
  for clip, line in zip(clips, lines, strict=True):
    first = seen.setdefault((clip.subset, clip.uid), line)
    if first != line:
      raise UserError(
        f'{clip.table}, line {line}: uid {clip.uid!r} of {clip.subset} stands in line {first} '
        'already: remove one of the two'
      )
