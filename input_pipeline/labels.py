"""Label images as arrays: colours, class ids, binary masks, and their sizes."""

import functools

import numpy as np

from .clips import IGNORE


def colour_map(classes: int) -> np.ndarray:
  """The palette of AVSBench, PASCAL VOC's, for up to 256 classes: uint8 [C, 3], RGB."""
  colours = np.zeros((classes, 3), np.uint8)
  for class_id in range(classes):
    digits, bit = class_id, 7
    while digits:
      for channel in range(3):
        colours[class_id, channel] |= (digits >> channel & 1) << bit
      digits >>= 3
      bit -= 1
  return colours


def _pack(rgb: np.ndarray) -> np.ndarray:
  packed = rgb[..., 0].astype(np.int32)
  for channel in (1, 2):
    packed <<= 8
    packed |= rgb[..., channel]
  return packed


@functools.cache
def _by_colour(palette: bytes) -> np.ndarray:
  """By packed colour: id + 1, or 0 where no class has the colour.

  Of these 16 MB only the pages in which a colour has been looked up are ever in memory.
  """
  colours = np.frombuffer(palette, np.uint8).reshape(-1, 3)
  table = np.zeros(1 << 24, np.uint8)
  table[_pack(colours)] = np.arange(1, len(colours) + 1)
  return table


def colours_to_ids(rgb: np.ndarray, palette: np.ndarray) -> tuple[np.ndarray, int]:
  """Class ids of a palette-coloured label image.

  Args:
    rgb: uint8 [H, W, 3].
    palette: uint8 [C, 3], the colour of each class.

  Returns:
    ids uint8 [H, W], and the number of pixels whose colour is not in the palette; those count as
    background, as in the released loader.
  """
  found = _by_colour(palette.tobytes())[_pack(rgb)]
  known = found > 0
  return found - known, int(known.size - np.count_nonzero(known))


def mask_to_ids(rgb: np.ndarray) -> tuple[np.ndarray, int]:
  """What sounds in a binary mask, which may be grey, of two colours, 0 and 1 or 0 and 255.

  Args:
    rgb: uint8 [H, W, 3].

  Returns:
    ids uint8 [H, W], 0 where it is black, else 1; and the number of pixels that are neither black
    nor as bright as the brightest one.
  """
  bright = rgb.max(axis=-1)
  sounding = bright > 0
  return sounding.astype(np.uint8), int(np.count_nonzero(sounding & (bright < bright.max())))


def ids_to_colours(ids: np.ndarray, palette: np.ndarray) -> np.ndarray:
  """Colours uint8 [..., 3] of class ids, integers [...]; 255 becomes the background's."""
  return palette[np.where(ids == IGNORE, 0, ids)]


def values(ids: np.ndarray) -> np.ndarray:
  """What occurs in uint8 ids [H, W], in order; np.unique takes ten times as long."""
  import cv2  # here, since the self-test runs where it is not installed

  return np.flatnonzero(cv2.calcHist([ids], [0], None, [256], [0, 256]))


def resize_ids(ids: np.ndarray, size: int) -> np.ndarray:
  """Nearest-neighbour resize of uint8 ids [H, W] to [size, size], pixel for pixel Pillow's."""
  rows, columns = (_nearest(length, size) for length in ids.shape)
  return ids.take(rows, 0).take(columns, 1)


def _nearest(length: int, size: int) -> np.ndarray:
  # Pillow adds the step up in float64. Where a centre falls on the edge of two pixels (every third
  # column of 1280 to 384) its rounding errors choose between them, so they are repeated here.
  steps = np.full(size, length / size)
  steps[0] /= 2
  return np.cumsum(steps).astype(np.int64)


def binary_metric_target(rgb: np.ndarray, size: int) -> np.ndarray:
  """Ground truth of the binary metrics: bool [size, size] of a colour label image uint8 [H, W, 3].

  The released evaluation resizes the *colour* image with OpenCV's bilinear filter and takes every
  pixel whose grey value is above zero, so objects are slightly dilated.
  """
  import cv2

  resized = cv2.resize(rgb, (size, size), interpolation=cv2.INTER_LINEAR)
  return cv2.cvtColor(resized, cv2.COLOR_RGB2GRAY) > 0
