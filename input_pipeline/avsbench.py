"""AVSBench on disk: the index of its clips, and their frames, labels and sound.

AVSBench-semantic (the older layout is in avsbench_object.py):

ROOT/metadata.csv                      columns uid, label (the subset) and split; others ignored
ROOT/SUBSET/UID/frames/T.jpg           one frame a second, T from 0
ROOT/SUBSET/UID/labels_semantic/T.png  class ids as grey values
ROOT/SUBSET/UID/labels_rgb/T.png       the same in palette colours
ROOT/SUBSET/UID/audio.wav
"""

import collections
import functools
import io
import logging
import os
import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from . import audio, avsbench_object, clips, files, labels, prepared
from .clips import FRAMES, SPLITS, Clip
from .errors import UserError

_MAX_PIXELS = 50_000_000
_MAX_BYTES = 4 * _MAX_PIXELS  # of an image file
# Anti-aliased edges give some colours that no class has; a wrong palette gives little else.
_MAX_UNKNOWN_COLOURS = 0.5

_logger = logging.getLogger(__name__)


def read_index(
  root: str | os.PathLike, split: str | None = None, subsets: Sequence[str] = tuple(FRAMES)
) -> list[Clip]:
  """The clips of a data set in either layout, in the order of the tables that list them.

  The layout shows in the tables: metadata.csv is that of AVSBench-semantic, s4_meta_data.csv and
  ms3_meta_data.csv (one of them or both) are those of AVSBench-object. Every row is checked, also
  those of other splits and subsets. Whether a clip's files exist shows when they are read.

  A folder that `aavs prepare` wrote gives the same clips (prepared.PreparedClip) in the same order.

  Args:
    root: folder of the data set.
    split: train, val or test; None for all three.
    subsets: which of v1s, v1m and v2.

  Raises:
    UserError: there is no table, or those of both layouts; a table is not UTF-8 or not CSV, lacks a
      column, holds an unknown label or split, an unsafe uid or the same uid twice in a subset; or
      no clip is left; or `split` or `subsets` is unknown; or `root` is in a bucket, or has damaged
      shards.
  """
  root = os.fspath(root)
  if split is not None and split not in SPLITS:
    raise UserError(f'split is {split!r}; choose one of {", ".join(SPLITS)}.')
  for subset in subsets:
    if subset not in FRAMES:
      raise UserError(f'subsets holds {subset!r}; choose from {", ".join(FRAMES)}.')

  if '://' in root:
    raise UserError(
      f'{root} is in a bucket, where neither images nor shards can be read piece by piece: mount '
      'the bucket or copy the folder, and name that'
    )
  if prepared.is_prepared(root):
    return _choose(prepared.read_index(root), os.path.join(root, prepared.MANIFEST), split, subsets)
  table = os.path.join(root, 'metadata.csv')
  is_semantic = os.path.lexists(table)
  others = [avsbench_object.table_path(root, subset) for subset in ('v1s', 'v1m')]
  if is_semantic and any(map(files.is_there, others)):
    raise UserError(
      f'{root} holds metadata.csv and a table of AVSBench-object; keep each data set in a folder '
      f'of its own.'
    )
  folders = {} if is_semantic else avsbench_object.find_tables(root)
  if folders:
    found = avsbench_object.read_clips(folders)
    tables = ' and '.join(avsbench_object.table_path(folders[s], s) for s in folders)
  else:
    found, tables = _read_semantic(root, table), table
  return _choose(found, tables, split, subsets)


def _choose(
  found: list[Clip], tables: str, split: str | None, subsets: Sequence[str]
) -> list[Clip]:
  chosen = [clip for clip in found if clip.subset in subsets and split in (None, clip.split)]
  if not chosen:
    counts = collections.Counter(f'{clip.subset} {clip.split}' for clip in found)
    there = ', '.join(f'{count} of {name}' for name, count in counts.items()) or 'none at all'
    raise UserError(
      f'{tables}: no clip for split {split or "any"} of {", ".join(subsets)} (found: {there}); '
      f'choose another split or subset, or complete the file.'
    )
  return chosen


def _read_semantic(root: str, table: str) -> list[Clip]:
  rows = clips.read_table(table, ('uid', 'label', 'split'))
  found = []
  for line, row in rows:
    where, subset = f'{table}, line {line}', row['label']
    if subset not in FRAMES:
      raise UserError(f'{where}: label is {subset!r}; it must be one of {", ".join(FRAMES)}.')
    split = clips.check_split(where, row['split'])
    uid = clips.check_name(where, 'uid', row['uid'])
    found.append(Clip(root, uid, subset, split, FRAMES[subset]))
  clips.check_unique(found, [line for line, _ in rows])
  return found


def require_classes(clips: Sequence[Clip]) -> None:
  """Raises UserError if the labels of a clip do not tell classes, as the semantic task needs."""
  for clip in clips:
    if clip.label_kind != 'semantic':
      raise UserError(
        f'{clip.table}: the labels of AVSBench-object tell what sounds, but not as what; use it '
        f"for a config with task 'binary', or give a folder of AVSBench-semantic."
      )


def load_frame(clip: Clip, t: int, size: int) -> np.ndarray:
  """Frame t, uint8 [size, size, 3] RGB, by Pillow's bilinear filter with antialias.

  The aspect ratio is not kept. JPEG's draft mode, faster but not the same pixels, is not used.

  Raises:
    UserError: the file is missing, truncated, not an image, or of more than 50 million pixels.
    OSError: the disk fails; so do all readers.
  """
  return resize_frame(_decode(clip.frame_path(t), _rgb_frame), size)


def resize_frame(image: Image.Image, size: int) -> np.ndarray:
  """An RGB image at the model's input size, uint8 [size, size, 3], as `load_frame` resizes it."""
  return np.array(image.resize((size, size), Image.Resampling.BILINEAR))


def read_image(path: str | os.PathLike) -> np.ndarray:
  """A JPEG or PNG file, uint8 [H, W, 3] RGB. Raises UserError as `load_frame`."""
  return np.array(_decode(os.fspath(path), _rgb_frame))


def label_path(clip: Clip, t: int) -> str:
  """The file that `load_label_ids` reads. Raises UserError if there is none."""
  ids, colours = clip.label_ids_path(t), clip.label_rgb_path(t)
  if clip.label_kind == 'binary' or files.is_there(ids):
    return ids
  if files.is_there(colours):
    return colours
  raise UserError(
    f'{ids}: missing, and so is {colours}; restore one of them, or take {clip.uid} out of '
    f'{clip.table}.'
  )


def load_label_ids(clip: Clip, t: int) -> np.ndarray:
  """Class ids of frame t, uint8 [H, W] in 0..70 or 255 (ignored), at the label's own size.

  Read from labels_semantic or, where that has no such file, from the colours of labels_rgb; colours
  outside the palette then count as background, and how many is logged once for each file. Where the
  clip's labels are binary, 1 is what sounds and there is no 255.

  Raises:
    UserError: both files are missing, or the one is unreadable (see `load_frame`), holds other ids
      or colours instead of grey, or the other holds more than half its pixels in unknown colours.
  """
  path = label_path(clip, t)
  if clip.label_kind == 'binary':
    return read_mask(path)[0]
  if path == clip.label_ids_path(t):
    return _read_ids(path)
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
  made from the ids of labels_semantic (255 becomes black). Where the clip's labels are binary, what
  sounds is white.

  Raises:
    UserError: as `load_label_ids`.
  """
  path = clip.label_rgb_path(t)
  if clip.label_kind == 'binary':
    return np.repeat(read_mask(path)[0][..., None] * np.uint8(255), 3, axis=-1)
  if files.is_there(path):
    return np.array(_decode(path))
  return labels.ids_to_colours(_read_ids(label_path(clip, t)))


def read_mask(path: str) -> tuple[np.ndarray, int]:
  """A binary label: uint8 [H, W], 1 where something sounds, and its doubtful pixels.

  Those are neither black nor as bright as the brightest one, such as anti-aliased edges; all that
  is not black sounds.

  Raises:
    UserError: the file is missing or unreadable, or more than half its pixels are doubtful.
  """
  ids, doubtful = labels.mask_to_ids(np.array(_decode(path)))
  if doubtful > _MAX_UNKNOWN_COLOURS * ids.size:
    raise UserError(
      f'{path}: {doubtful} of {ids.size} pixels are neither black nor as bright as the brightest, '
      f'so it is no binary mask; write 255 where something sounds and 0 elsewhere.'
    )
  return ids, doubtful


def load_log_mel(clip: Clip) -> np.ndarray:
  """The clip's sound, float32 [num_frames, 96, 64], one example a frame; see `clip_log_mel`."""
  return audio.clip_log_mel(clip.audio_path, clip.num_frames)


@functools.cache  # once a file, however many epochs read it
def _report_unknown(path: str, unknown: int, pixels: int) -> None:
  _logger.info(
    '%s: %d of %d pixels have a colour of no class and count as background.', path, unknown, pixels
  )


def _read_ids(path: str) -> np.ndarray:
  ids = np.array(_decode(path, _grey_as_stored))
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
  return ids.astype(np.uint8, copy=False)


def _rgb(image: Image.Image) -> Image.Image:
  if image.mode == 'RGB':
    image.load()  # `convert` would copy what is decoded
    return image
  return image.convert('RGB')


def _rgb_frame(image: Image.Image) -> Image.Image:
  """In RGB; 16-bit grey, which `convert` would clip at 255, by the same 257th as an 8-bit file."""
  if image.mode == 'I;16':
    image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
  return _rgb(image)


def _grey_as_stored(image: Image.Image) -> Image.Image:
  """Grey of 8 or 16 bits as it is, all else in RGB."""
  if image.mode in ('L', 'I;16'):
    image.load()
    return image
  return _rgb(image)


def _decode(path: str, convert: Callable[[Image.Image], Image.Image] = _rgb) -> Image.Image:
  """The whole image, its size checked before `convert` decodes a pixel."""
  data = files.read_file(path, _MAX_BYTES, 'the image', 'copy or extract it again')
  try:
    # From memory, since Pillow asks a file for as many bytes as a broken header says, gigabytes.
    with Image.open(io.BytesIO(data), formats=('JPEG', 'PNG')) as image:
      if image.width * image.height > _MAX_PIXELS:
        raise UserError(
          f'{path}: {image.width} x {image.height} pixels; shrink it below {_MAX_PIXELS} pixels.'
        )
      return convert(image)
  except UserError:
    raise
  except Image.UnidentifiedImageError as error:
    raise UserError(
      f'{path}: the image cannot be read (cannot identify a JPEG or PNG in it); copy or extract it '
      f'again.'
    ) from error
  except Image.DecompressionBombError as error:  # Pillow's own limit, a higher one
    raise UserError(
      f'{path}: too large ({str(error).rstrip(".")}); shrink it below {_MAX_PIXELS} pixels.'
    ) from error
  # What Pillow raises on broken files, apart from OSError, differs from format to format.
  except (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
  ) as error:
    raise UserError(
      f'{path}: the image cannot be read ({error}); copy or extract it again.'
    ) from error
