"""What the objects and backgrounds of a composed set look like.

A picture is a function (radius, angle) -> (rgb float32 [S, S, 3] in 0..255, alpha float32 [S, S] in
0..1), S odd, the object's centre at the centre pixel, its area about pi * radius^2 pixels.
"""

import colorsys
import functools
import math
import pathlib
from collections.abc import Callable

import cv2
import numpy as np

from .. import errors

Picture = Callable[[float, float], tuple[np.ndarray, np.ndarray]]


def _polar(radii, start: float = -math.pi / 2) -> np.ndarray:
  """Closed contour [n, 2] whose n points lie at these radii, evenly spread in angle."""
  angles = start + 2 * math.pi * np.arange(len(radii)) / len(radii)
  return np.asarray(radii)[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)


def _heart() -> np.ndarray:
  t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
  y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t) + 2
  return np.stack([16 * np.sin(t) ** 3, -y], 1)


def _crescent() -> np.ndarray:
  outer = np.linspace(math.radians(55), math.radians(305), 40)
  inner = np.linspace(math.radians(285), math.radians(75), 40)  # a smaller circle, to the right
  return np.concatenate(
    [
      np.stack([np.cos(outer), np.sin(outer)], 1),
      np.stack([0.45 + 0.62 * np.cos(inner), 0.85 * np.sin(inner)], 1),
    ]
  )


_CROSS = ((-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1),
          (-3, -1), (-1, -1))  # fmt: skip
_CHEVRON = ((-3, -3), (0, -3), (3, 0), (0, 3), (-3, 3), (0, 0))

# Ten families of contours and seven textures: 10 and 7 share no divisor, so all 70 classes differ.
_SHAPES = (
  [_polar([1] * 40)],
  [_polar([1, 0.45] * 5)],
  [np.array([(-2.3, -1), (2.3, -1), (2.3, 1), (-2.3, 1)])],
  [_polar([1] * 40), _polar([0.55] * 40)],  # the second contour is a hole
  [_polar([1] * 3)],
  [np.array(_CROSS, float)],
  [_heart()],
  [_crescent()],
  [_polar([1] * 4, math.pi / 4)],
  [np.array(_CHEVRON, float)],
)


def _to_unit_area(contours: list[np.ndarray]) -> list[np.ndarray]:
  """Scales contours to the area of the unit disc, holes not counted."""
  areas = [cv2.contourArea(c.astype(np.float32)) for c in contours]
  scale = math.sqrt(math.pi / (areas[0] - sum(areas[1:])))
  return [c * scale for c in contours]


_UNIT_SHAPES = tuple(_to_unit_area(contours) for contours in _SHAPES)


def _step(wave: np.ndarray) -> np.ndarray:
  return np.clip(0.5 + 2.5 * wave, 0, 1)


def _stripes(u, v):
  return _step(np.sin(5.5 * u))


def _dots(u, v):
  return _step(np.cos(5.5 * u) + np.cos(5.5 * v) - 0.9)


def _checks(u, v):
  return _step(np.sin(4.5 * u) * np.sin(4.5 * v) * 2)


def _gradient(u, v):
  return np.clip(0.5 + 0.5 * v, 0, 1)


def _rings(u, v):
  return _step(np.sin(7 * np.hypot(u, v)))


def _waves(u, v):
  return _step(np.sin(6 * v + 1.6 * np.sin(4 * u)))


def _plain(u, v):
  return np.zeros_like(u)


_TEXTURES = (_stripes, _dots, _checks, _gradient, _rings, _waves, _plain)


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
  return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32) * 255


def drawn_picture(kind: int, variant: int) -> Picture:
  """One variant of the drawn look of class number `kind`, 0..69 in the order of scenes.CLASSES.

  The class fixes outline, base hue and texture; the variant its shade, aspect ratio, and the scale
  and phase of the texture.
  """
  rng = np.random.default_rng([kind, variant, 0])
  stretch = math.sqrt(rng.uniform(0.85, 1.2))
  hue = (5 * kind % 8 + 0.31 * (kind // 8)) / 8 + rng.uniform(-0.02, 0.02)
  base = _rgb(hue, rng.uniform(0.75, 0.95), rng.uniform(0.75, 0.98))
  bright = _rgb(hue + 0.04, 0.15, 0.98)
  dark = _rgb(hue - 0.04, 0.9, 0.25)
  return functools.partial(
    _draw,
    [c * [stretch, 1 / stretch] for c in _UNIT_SHAPES[kind % len(_SHAPES)]],
    _TEXTURES[kind % len(_TEXTURES)],
    rng.uniform(0.85, 1.25),
    rng.uniform(-0.4, 0.4, 2),
    base,
    bright if kind % 2 else dark,
  )


def _draw(contours, texture, texture_scale, phase, base, second, radius, angle):
  cos, sin = math.cos(angle), math.sin(angle)
  turned = [c @ np.array([[cos, sin], [-sin, cos]]) * radius for c in contours]
  half = math.ceil(max(np.abs(c).max() for c in turned)) + 2
  points = [np.round((c + half) * 16).astype(np.int32) for c in turned]
  alpha = np.zeros((2 * half + 1, 2 * half + 1), np.uint8)
  cv2.fillPoly(alpha, points, 255, cv2.LINE_AA, 4)

  axis = (np.arange(-half, half + 1, dtype=np.float32) / np.float32(radius))[None]
  u = np.float32(cos) * axis + np.float32(sin) * axis.T
  v = np.float32(cos) * axis.T - np.float32(sin) * axis
  mix = texture(*(texture_scale * c + p for c, p in zip((u, v), phase.astype(np.float32))))
  light = np.clip(1 - 0.12 * (axis + axis.T), 0.7, 1.15)  # from the top left
  rgb = (base + mix[..., None] * (second - base)) * light[..., None]
  thickness = max(1, round(radius / 14))
  cv2.polylines(rgb, points, True, (base * 0.3).tolist(), thickness, cv2.LINE_AA, 4)
  return np.clip(rgb, 0, 255), alpha * np.float32(1 / 255)


def load_picture(path: pathlib.Path) -> Picture:
  """The picture in a PNG file with an alpha channel.

  Raises:
    UserError: the file is no image, has no alpha channel, or shows nothing.
  """
  content = np.fromfile(path, np.uint8)
  image = cv2.imdecode(content, cv2.IMREAD_UNCHANGED) if content.size else None
  if image is None or image.dtype != np.uint8:
    raise errors.UserError(f'{path} is not an 8-bit PNG image: replace or remove it')
  if image.ndim != 3 or image.shape[2] != 4:
    raise errors.UserError(
      f'{path} has no alpha channel: save the object with a transparent background'
    )
  image = cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA)
  rows, columns = np.nonzero(image[..., 3] > 127)
  if not len(rows):
    raise errors.UserError(f'{path} is transparent everywhere: replace or remove it')
  image = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
  area_radius = math.sqrt(np.count_nonzero(image[..., 3] > 127) / math.pi)
  # Colours enter times alpha, so that those of transparent pixels do not bleed into the edges.
  image = image.astype(np.float32)
  image[..., :3] *= image[..., 3:] / 255
  return functools.partial(_paste, image, area_radius)


def _paste(image, area_radius, radius, angle):
  height, width = image.shape[:2]
  scale = radius / area_radius
  half = math.ceil(scale * math.hypot(height, width) / 2) + 1
  if scale < 0.5:  # the warp does not antialias
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image, scale = cv2.resize(image, size, interpolation=cv2.INTER_AREA), 1.0
    height, width = image.shape[:2]
  matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), -math.degrees(angle), scale)
  matrix[:, 2] += half - (width - 1) / 2, half - (height - 1) / 2
  warped = cv2.warpAffine(image, matrix, (2 * half + 1, 2 * half + 1), flags=cv2.INTER_LINEAR)
  alpha = warped[..., 3] * np.float32(1 / 255)
  return warped[..., :3] / np.maximum(alpha, 1 / 255)[..., None], alpha


def background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
  """A muted scene of gradient, clutter and noise at three scales: float32 [height, width, 3]."""
  corners = np.stack([_rgb(rng.random(), *rng.uniform((0, 0.2), (0.35, 0.8))) for _ in range(4)])
  image = cv2.resize(corners.reshape(2, 2, 3), (width, height), interpolation=cv2.INTER_LINEAR)
  for _ in range(rng.integers(4, 11)):
    colour = _rgb(rng.random(), rng.uniform(0, 0.4), rng.uniform(0.15, 0.9)).tolist()
    centre = rng.uniform(0, (width, height))
    spread = rng.uniform(0.03, 0.22) * min(width, height)
    corners = centre + rng.uniform(-1, 1, (rng.integers(2, 6), 2)) * spread
    points = [np.round(corners * 16).astype(np.int32)]
    if len(corners) == 2:
      cv2.polylines(image, points, False, colour, int(rng.integers(1, 4)), cv2.LINE_AA, 4)
    else:
      cv2.fillPoly(image, points, colour, cv2.LINE_AA, 4)
  for cells, strength in ((5, 22), (16, 14), (60, 8)):
    grain = rng.standard_normal((cells, cells)).astype(np.float32) * rng.uniform(0.3, 1) * strength
    image += cv2.resize(grain, (width, height), interpolation=cv2.INTER_LINEAR)[..., None]
  return np.clip(image, 0, 255)
