"""What the index of a data set is made of: clips, and the tables that list them."""

import csv
import dataclasses
import io
import os
from collections.abc import Sequence

from . import files
from .errors import UserError

FRAMES = {'v1s': 5, 'v1m': 5, 'v2': 10}  # frames in a clip of each subset
SPLITS = ('train', 'val', 'test')

_MAX_TABLE = 16_000_000  # bytes; the published tables have less than two million


@dataclasses.dataclass(frozen=True)
class Clip:
  """One clip of AVSBench-semantic: where it lies, and what its subset says about it.

  A clip of the older layout (avsbench_object.ObjectClip) differs in its paths and kind of label.

  Attributes:
    root: folder of the data set.
    uid: name of the clip's folder, unique in its subset.
    subset: v1s, v1m or v2.
    split: train, val or test.
    num_frames: 5 or 10.
  """

  root: str
  uid: str
  subset: str
  split: str
  num_frames: int

  label_kind = 'semantic'  # or 'binary': what sounds, but not as what

  @property
  def table(self) -> str:
    """The file that lists the clip."""
    return os.path.join(self.root, 'metadata.csv')

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
    """Frames that have a label: all, but only the first in the training split of v1s."""
    only_first = self.subset == 'v1s' and self.split == 'train'
    return (0,) if only_first else tuple(range(self.num_frames))

  def frame_path(self, t: int) -> str:
    return os.path.join(self.folder, 'frames', f'{t}.jpg')

  def label_ids_path(self, t: int) -> str:
    return os.path.join(self.folder, 'labels_semantic', f'{t}.png')

  def label_rgb_path(self, t: int) -> str:
    return os.path.join(self.folder, 'labels_rgb', f'{t}.png')


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
    'give the folder that holds metadata.csv, or s4_meta_data.csv or ms3_meta_data.csv of '
    'AVSBench-object',
  )
  try:
    text = data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = error.object[: error.start].count(b'\n') + 1
    raise UserError(
      f'{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as '
      f'UTF-8.'
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
          f'{path}, line 1: no column {column!r} among {", ".join(map(repr, header)) or "none"}; '
          f'the columns {", ".join(columns)} are needed.'
        )
    for row in reader:
      for column in source.values():
        if row[column] is None:
          raise UserError(
            f'{path}, line {reader.line_num}: the row starting {row[header[0]]!r} ends before '
            f'column {column!r}; complete it.'
          )
      rows.append((reader.line_num, {column: row[source[column]] for column in columns}))
  except csv.Error as error:
    raise UserError(
      f'{path}, line {reader.reader.line_num}: not readable as CSV ({error}); mend the line.'
    ) from error
  return rows


def check_split(where: str, split: str) -> str:
  """The split that a row names. Raises UserError, which begins with `where`, if there is none."""
  if split not in SPLITS:
    raise UserError(f'{where}: split is {split!r}; it must be one of {", ".join(SPLITS)}.')
  return split


def check_name(where: str, column: str, name: str) -> str:
  """A name that becomes part of paths, here and where predictions are written.

  Raises:
    UserError: it could lead out of the folder that it is meant for, or cannot be printed.
  """
  if name in ('', '.', '..') or '/' in name or '\\' in name or not name.isprintable():
    raise UserError(f'{where}: {column} is {name!r}; it must be the name of a folder.')
  return name


def check_unique(clips: Sequence[Clip], lines: Sequence[int]) -> None:
  """Raises UserError if a uid occurs twice in a subset; `lines` are the rows of `clips`."""
  seen: dict[tuple[str, str], int] = {}
  for clip, line in zip(clips, lines, strict=True):
    first = seen.setdefault((clip.subset, clip.uid), line)
    if first != line:
      raise UserError(
        f'{clip.table}, line {line}: uid {clip.uid!r} of {clip.subset} stands in line {first} '
        f'already; remove one of the two.'
      )
