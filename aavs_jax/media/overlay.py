"""Masks drawn over frames, in the palette of AVSBench made fit for the eye and for any classes."""

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

from aavs_jax.input_pipeline.clips import IGNORE
from aavs_jax.input_pipeline.labels import colour_map

SOUNDING_COLOUR = (255, 45, 110)  # of binary masks: a pink that few frames contain

# The palette has colours such as (64, 0, 0) that vanish on a dark frame. Each channel is lifted by
# one rising curve from 0..224 to 50..255: hues stay, and different colours stay different.
_DISPLAY = np.round(50 + 205 * (colour_map(256) / 224) ** 0.6).astype(np.uint8)


def legend_colour(class_id: int) -> tuple[int, int, int]:
  """RGB in which `overlay` shows a class: its palette colour, brightened."""
  red, green, blue = _DISPLAY[class_id].tolist()
  return red, green, blue


def overlay(
  frame: UInt8[np.ndarray, 'H W 3'], ids: UInt8[np.ndarray, 'h w'], alpha: float = 0.55
) -> UInt8[np.ndarray, 'H W 3']:
  """Draws class ids over a frame.

  The palette's dark colours, (64, 0, 0) for one, would not be seen on many frames. So every colour
  is brightened (`legend_colour`), and every region gets a thin two-tone contour, white inside and
  black outside, that stands out on any background.

  Args:
    frame: RGB.
    ids: class ids of any size, resized to the frame by nearest neighbour. 0 and 255 are not drawn.
    alpha: weight of the colour against the frame, 0 to 1.

  Returns:
    A new RGB image.
  """
  ids = _fit(np.where(ids == IGNORE, 0, ids).astype(np.uint8), frame)
  return _draw(frame, ids, cv2.applyColorMap(ids, _DISPLAY[:, None]), alpha)


def overlay_binary(
  frame: UInt8[np.ndarray, 'H W 3'],
  mask: UInt8[np.ndarray, 'h w'] | Bool[np.ndarray, 'h w'],
  alpha: float = 0.55,
) -> UInt8[np.ndarray, 'H W 3']:
  """Draws a binary mask (non-zero = sounding) over a frame in `SOUNDING_COLOUR`; see `overlay`."""
  region = _fit((mask > 0).astype(np.uint8), frame)
  return _draw(frame, region, np.full_like(frame, SOUNDING_COLOUR), alpha)


def _fit(ids: np.ndarray, frame: np.ndarray) -> np.ndarray:
  height, width = frame.shape[:2]
  return cv2.resize(ids, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def _draw(frame: np.ndarray, ids: np.ndarray, colours: np.ndarray, alpha: float) -> np.ndarray:
  """Blends `colours` in where ids > 0 and draws the borders between different ids."""
  if not ids.any():
    return frame.copy()
  inside = ids > 0
  blended = cv2.addWeighted(frame, 1 - alpha, colours, alpha, 0)
  drawn = cv2.copyTo(blended, inside.view(np.uint8), frame.copy())
  thickness = 1 + min(ids.shape) // 400  # the contour of a large frame must survive a small screen
  kernel = np.ones((2 * thickness + 1, 2 * thickness + 1), np.uint8)
  border = cv2.morphologyEx(ids, cv2.MORPH_GRADIENT, kernel) > 0
  drawn[border] = np.where(inside[border], 255, 0)[:, None]
  return drawn
