"""AVSBench-semantic on disk: the index of its clips, and their frames, labels and sound.

ROOT/metadata.csv                      columns uid, label (the subset) and split; others ignored
ROOT/SUBSET/UID/frames/T.jpg           one frame a second, T from 0
ROOT/SUBSET/UID/labels_semantic/T.png  class ids as grey values
ROOT/SUBSET/UID/labels_rgb/T.png       the same in palette colours
ROOT/SUBSET/UID/audio.wav
"""

import collections
import csv
import dataclasses
import functools
import io
import logging
import os
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from input_pipeline import audio, labels
from input_pipeline.errors import UserError

FRAMES = {'v1s': 5, 'v1m': 5, 'v2': 10}  # frames in a clip of each subset
SPLITS = ('train', 'val', 'test')

_COLUMNS = ('uid', 'label', 'split')
_MAX_PIXELS = 50_000_000
# Anti-aliased edges give some colours that no class has; a wrong palette gives little else.
_MAX_UNKNOWN_COLOURS = 0.5

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Clip:
  """One clip: where it lies, and what its subset says about it.

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

  @property
  def folder(self) -> str:
    return os.path.join(self.root, self.subset, self.uid)

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


def read_index(
  root: str | os.PathLike, split: str | None = None, subsets: Sequence[str] = tuple(FRAMES)
) -> list[Clip]:
  """The clips of a data set, in the order of its metadata.csv.

  Every row is checked, also those of other splits and subsets. Whether a clip's files exist shows
  when they are read.

  Args:
    root: folder of the data set.
    split: train, val or test; None for all three.
    subsets: which of v1s, v1m and v2.

  Raises:
    UserError: metadata.csv is missing, is not UTF-8 or not CSV, lacks a column, holds an unknown
      label or split, an unsafe uid or the same uid twice in a subset; or no clip is left; or
      `split` or `subsets` is unknown.
  """
  root = os.fspath(root)
  if split is not None and split not in SPLITS:
    raise UserError(f'split is {split!r}; choose one of {", ".join(SPLITS)}.')
  for subset in subsets:
    if subset not in FRAMES:
      raise UserError(f'subsets holds {subset!r}; choose from {", ".join(FRAMES)}.')

  path = os.path.join(root, 'metadata.csv')
  clips, lines = [], {}
  for line, row in _read_rows(path):
    uid, subset, row_split = (row[column] for column in _COLUMNS)
    where = f'{path}, line {line}'
    if subset not in FRAMES:
      raise UserError(f'{where}: label is {subset!r}; it must be one of {", ".join(FRAMES)}.')
    if row_split not in SPLITS:
      raise UserError(f'{where}: split is {row_split!r}; it must be one of {", ".join(SPLITS)}.')
    # The uid becomes the name of a folder, here and where predictions are written.
    if uid in ('', '.', '..') or '/' in uid or '\\' in uid or not uid.isprintable():
      raise UserError(f'{where}: uid is {uid!r}; it must be the name of a folder in {subset}.')
    first = lines.setdefault((subset, uid), line)
    if first != line:
      raise UserError(
        f'{where}: uid {uid!r} of {subset} stands in line {first} already; remove one of the two.'
      )
    clips.append(Clip(root, uid, subset, row_split, FRAMES[subset]))

  chosen = [clip for clip in clips if clip.subset in subsets and split in (None, clip.split)]
  if not chosen:
    counts = collections.Counter(f'{clip.subset} {clip.split}' for clip in clips)
    found = ', '.join(f'{count} of {name}' for name, count in counts.items()) or 'none at all'
    raise UserError(
      f'{path}: no clip for split {split or "any"} of {", ".join(subsets)} (found: {found}); '
      f'choose another split or subset, or complete the file.'
    )
  return chosen


def _read_rows(path: str) -> list[tuple[int, dict[str, str]]]:
  """Line numbers and rows, each with a text for every column of `_COLUMNS`."""
  try:
    with open(path, 'rb') as file:
      data = file.read()
  except OSError as error:
    raise UserError(
      f'{path}: cannot be read ({error.strerror}); give the folder that holds metadata.csv.'
    ) from error
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
    for column in _COLUMNS:
      if column not in header:
        raise UserError(
          f'{path}, line 1: no column {column!r} among {", ".join(map(repr, header)) or "none"}; '
          f'the columns {", ".join(_COLUMNS)} are needed.'
        )
    for row in reader:
      for column in _COLUMNS:
        if row[column] is None:
          raise UserError(
            f'{path}, line {reader.line_num}: the row starting {row[header[0]]!r} ends before '
            f'column {column!r}; complete it.'
          )
      rows.append((reader.line_num, row))
  except csv.Error as error:
    raise UserError(
      f'{path}, line {reader.reader.line_num}: not readable as CSV ({error}); mend the line.'
    ) from error
  return rows


def load_frame(clip: Clip, t: int, size: int) -> np.ndarray:
  """Frame t, uint8 [size, size, 3] RGB, by Pillow's bilinear filter with antialias.

  The aspect ratio is not kept. JPEG's draft mode, faster but not the same pixels, is not used.

  Raises:
    UserError: the file is missing, truncated, not an image, or of more than 50 million pixels.
  """
  return resize_frame(_decode(clip.frame_path(t)), size)


def resize_frame(image: Image.Image, size: int) -> np.ndarray:
  """An RGB image at the model's input size, uint8 [size, size, 3], as `load_frame` resizes it."""
  return np.array(image.resize((size, size), Image.Resampling.BILINEAR))


def read_image(path: str | os.PathLike) -> np.ndarray:
  """A JPEG or PNG file, uint8 [H, W, 3] RGB. Raises UserError as `load_frame`."""
  return np.array(_decode(os.fspath(path)))


def load_label_ids(clip: Clip, t: int) -> np.ndarray:
  """Class ids of frame t, uint8 [H, W] in 0..70 or 255 (ignored), at the label's own size.

  Read from labels_semantic or, where that has no such file, from the colours of labels_rgb; colours
  outside the palette then count as background, and how many is logged once for each file.

  Raises:
    UserError: both files are missing, or the one is unreadable (see `load_frame`), holds other ids
      or colours instead of grey, or the other holds more than half its pixels in unknown colours.
  """
  path = clip.label_ids_path(t)
  if os.path.exists(path):
    return _read_ids(path)
  path = clip.label_rgb_path(t)
  if not os.path.exists(path):
    raise _no_label(clip, t)
  ids, unknown = labels.colours_to_ids(np.array(_decode(path)))
  if unknown > _MAX_UNKNOWN_COLOURS * ids.size:
    raise UserError(
      f'{path}: {unknown} of {ids.size} pixels have a colour of no class; write the label in '
      f"AVSBench's palette."
    )
  if unknown:
    _report_unknown(path, unknown, ids.size)
  return ids


def load_label_rgb(clip: Clip, t: int) -> np.ndarray:
  """Palette colours of frame t's label, uint8 [H, W, 3], at the label's own size.

  Read from labels_rgb as they are, anti-aliased edges included, or, where that has no such file,
  made from the ids of labels_semantic (255 becomes black).

  Raises:
    UserError: as `load_label_ids`.
  """
  path = clip.label_rgb_path(t)
  if os.path.exists(path):
    return np.array(_decode(path))
  path = clip.label_ids_path(t)
  if not os.path.exists(path):
    raise _no_label(clip, t)
  return labels.ids_to_colours(_read_ids(path))


def load_log_mel(clip: Clip) -> np.ndarray:
  """The clip's sound, float32 [num_frames, 96, 64], one example a frame; see `clip_log_mel`."""
  return audio.clip_log_mel(clip.audio_path, clip.num_frames)


def _no_label(clip: Clip, t: int) -> UserError:
  return UserError(
    f'{clip.label_ids_path(t)}: missing, and so is {clip.label_rgb_path(t)}; restore one of them, '
    f'or take {clip.uid} out of metadata.csv.'
  )


@functools.cache  # once a file, however many epochs read it
def _report_unknown(path: str, unknown: int, pixels: int) -> None:
  _logger.info(
    '%s: %d of %d pixels have a colour of no class and count as background.', path, unknown, pixels
  )


def _read_ids(path: str) -> np.ndarray:
  ids = np.array(_decode(path, keep_grey=True))
  if ids.ndim == 3:
    rgb, ids = ids, ids[..., 0]
    if (rgb != ids[..., None]).any():
      raise UserError(f'{path}: coloured, where class ids as grey values are needed; write those.')
  wrong = ids[(ids >= labels.NUM_CLASSES) & (ids != labels.IGNORE)]
  if wrong.size:
    raise UserError(
      f'{path}: holds class id {wrong[0]} ({wrong.size} pixels are wrong); ids are 0 to '
      f'{labels.NUM_CLASSES - 1}, or {labels.IGNORE} to ignore a pixel, so write the label anew.'
    )
  return ids


def _decode(path: str, keep_grey: bool = False) -> Image.Image:
  """The whole image, its size checked before a pixel is decoded.

  In RGB, unless it is an 8-bit grey one that is to stay so.
  """
  try:
    with Image.open(path, formats=('JPEG', 'PNG')) as image:
      if image.width * image.height > _MAX_PIXELS:
        raise UserError(
          f'{path}: {image.width} x {image.height} pixels; shrink it below {_MAX_PIXELS} pixels.'
        )
      return image.convert('L' if keep_grey and image.mode == 'L' else 'RGB')
  except UserError:
    raise
  # What Pillow raises on broken files, apart from OSError, differs from format to format.
  except (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
  ) as error:
    reason = getattr(error, 'strerror', None) or str(error)
    raise UserError(
      f'{path}: the image cannot be read ({reason}); copy or extract it again.'
    ) from error
