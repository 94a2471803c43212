"""Frames and labels of a clip, read from its image files."""

import functools
import io
import logging
import os
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from . import files, labels
from .clips import IGNORE, Clip
from .errors import UserError

_PNG = b'\x89PNG\r\n\x1a\n'
# Of labels whose ids may be what is stored or the grey that it stands for.
_NOT_GREY = {'1': 'of one bit', 'P': 'in a palette'}
_MAX_PIXELS = 50_000_000
_MAX_BYTES = 4 * _MAX_PIXELS  # of an image file
# Anti-aliased edges give some colours that no class has; a wrong palette gives little else.
MAX_UNKNOWN_COLOURS = 0.5  # of an image

_logger = logging.getLogger(__name__)


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


def read_image(path: str | os.PathLike, *, upright: bool = False) -> np.ndarray:
  """A JPEG or PNG file, uint8 [H, W, 3] RGB. Raises UserError as `load_frame`.

  upright: turned as a phone's mark in the file says. The release knows nothing of such marks, so
  frames of data sets stay as they are stored.
  """

  def pixels(image):
    return _rgb_frame(ImageOps.exif_transpose(image) if upright else image)

  return np.array(_decode(os.fspath(path), pixels))


def label_path(clip: Clip, t: int) -> str:
  """The file that `load_label_ids` reads. Raises UserError if there is none."""
  ids, colours = clip.label_ids_path(t), clip.label_rgb_path(t)
  if clip.data_set.label_kind == 'binary' or files.is_there(ids):
    return ids
  if files.is_there(colours):
    return colours
  raise UserError(
    f'{ids} is missing, and so is {colours}: restore one of them, or take {clip.uid} out of '
    f'{clip.table}'
  )


def load_label_ids(clip: Clip, t: int) -> np.ndarray:
  """Class ids of frame t, uint8 [H, W] or 255 (ignored), at the label's own size.

  Read from labels_semantic or, where that has no such file, from the colours of labels_rgb; colours
  outside the palette then count as background, and how many is logged once for each file. Where the
  clip's labels are binary, 1 is what sounds and there is no 255.

  Raises:
    UserError: both files are missing, or the one is unreadable (see `load_frame`), holds other ids
      or colours instead of grey, or the other holds more than half its pixels in unknown colours.
  """
  path = label_path(clip, t)
  if clip.data_set.label_kind == 'binary':
    return read_mask(path)[0]
  if path == clip.label_ids_path(t):
    return _read_ids(path, len(clip.data_set.classes))
  ids, unknown = labels.colours_to_ids(np.array(_decode(path)), clip.data_set.palette)
  if unknown > MAX_UNKNOWN_COLOURS * ids.size:
    raise UserError(
      f'{path}: {unknown} of {ids.size} pixels have a colour of no class: write the label in the '
      f'palette of {clip.data_set.name}'
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
  data_set = clip.data_set
  if data_set.label_kind == 'binary':
    return labels.ids_to_colours(read_mask(path)[0], data_set.palette)
  if files.is_there(path):
    return np.array(_decode(path))
  return labels.ids_to_colours(
    _read_ids(label_path(clip, t), len(data_set.classes)), data_set.palette
  )


def read_mask(path: str) -> tuple[np.ndarray, int]:
  """A binary label: uint8 [H, W], 1 where something sounds, and its doubtful pixels.

  Those are neither black nor as bright as the brightest one, such as anti-aliased edges; all that
  is not black sounds.

  Raises:
    UserError: the file is missing or unreadable, or more than half its pixels are doubtful.
  """
  ids, doubtful = labels.mask_to_ids(np.array(_decode(path)))
  if doubtful > MAX_UNKNOWN_COLOURS * ids.size:
    raise UserError(
      f'{path}: {doubtful} of {ids.size} pixels are neither black nor as bright as the brightest, '
      'so it is no binary mask: write 255 where something sounds and 0 elsewhere'
    )
  return ids, doubtful


@functools.cache  # once a file, however many epochs read it
def _report_unknown(path: str, unknown: int, pixels: int) -> None:
  _logger.info(
    '%s: %d of %d pixels have a colour of no class and count as background.', path, unknown, pixels
  )


def _read_ids(path: str, classes: int) -> np.ndarray:
  image = _decode(path, _grey_as_stored)
  if kind := _NOT_GREY.get(image.mode):
    raise UserError(f'{path} is {kind}, where class ids as grey values are needed: write those')
  ids = np.array(image)
  if ids.ndim == 3:
    rgb, ids = ids, ids[..., 0]
    if (rgb != ids[..., None]).any():
      raise UserError(f'{path} is coloured, where class ids as grey values are needed: write those')
  wrong = ids[(ids >= classes) & (ids != IGNORE)]
  if wrong.size:
    raise UserError(
      f'{path} holds class id {wrong[0]} ({wrong.size} pixels are wrong), but ids are 0 to '
      f'{classes - 1}, or {IGNORE} to ignore a pixel: write the label anew'
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
  """Grey of 8 or 16 bits, bits and indices of a palette as they are, all else in RGB."""
  if image.mode in ('L', 'I;16', *_NOT_GREY):
    image.load()
    return image
  return _rgb(image)


def check_sums(data: bytes) -> None:
  """Raises ValueError if a part of a PNG is not what was written; Pillow looks at few of them."""
  place = len(_PNG) if data.startswith(_PNG) else len(data)
  while place + 12 <= len(data):
    end = place + 8 + int.from_bytes(data[place : place + 4])
    if zlib.crc32(data[place + 4 : end]) != int.from_bytes(data[end : end + 4]):
      raise ValueError('a checksum in it is wrong')
    place = end + 4


def _decode(path: str, convert: Callable[[Image.Image], Image.Image] = _rgb) -> Image.Image:
  """The whole image, its size checked before `convert` decodes a pixel."""
  data = files.read_file(path, _MAX_BYTES, 'the image', 'copy or extract it again')
  try:
    check_sums(data)
    # From memory, since Pillow asks a file for as many bytes as a broken header says, gigabytes.
    with Image.open(io.BytesIO(data), formats=('JPEG', 'PNG')) as image:
      if image.width * image.height > _MAX_PIXELS:
        raise UserError(
          f'{path} has {image.width} x {image.height} pixels: shrink it below {_MAX_PIXELS} pixels'
        )
      return convert(image)
  except UserError:
    raise
  except Image.UnidentifiedImageError as error:
    raise UserError(
      f'{path}: the image cannot be read (cannot identify a JPEG or PNG in it): copy or extract it '
      'again'
    ) from error
  except Image.DecompressionBombError as error:  # Pillow's own limit, a higher one
    raise UserError(
      f'{path} is too large ({str(error).rstrip(".")}): shrink it below {_MAX_PIXELS} pixels'
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
      f'{path}: the image cannot be read ({error}): copy or extract it again'
    ) from error
