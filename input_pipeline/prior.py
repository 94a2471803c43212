"""The prior of a training item of stage 2 with the faults that stage 1's masks have."""

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

from . import labels
from .clips import IGNORE

# Of 255, in every pixel: there is no prior. The decoder then adds the embedding of doubt to all
# keys (0.4 to 0.6), blocks none of them (below 0.5), and adds one and the same number to all mask
# features.
UNKNOWN = 128


@dataclasses.dataclass(frozen=True)
class Faults:
  """How often a true mask is given each fault, and how far it is moved.

  Attributes:
    missing: probability that an object that sounds is not in the mask; an object is a class.
    added: probability that one that does not sound is.
    moved: share of the side by which edges may grow or shrink, and the whole may shift.
    wrong: probability that the whole mask is somewhere else.
  """

  missing: float = 0.0
  added: float = 0.0
  moved: float = 0.0
  wrong: float = 0.0


NO_FAULTS = Faults()


def truth(ids: np.ndarray) -> np.ndarray:
  """The ground truth as the prior: uint8 [e, e] of 0 and 255 of class ids uint8 [e, e]."""
  return ((ids > 0) & (ids != IGNORE)).astype(np.uint8) * 255


def disturb(
  ids: np.ndarray, seen: Sequence[np.ndarray], rng: np.random.Generator, faults: Faults
) -> np.ndarray:
  """The prior of one frame, with faults.

  Args:
    ids: uint8 [e, e], classes of what sounds in the frame.
    seen: the same of frames of the clip: what sounds there is likely in this picture, too, and is
      added first. Where there is nothing else, it is what sounds here, in another place.
    rng: of this frame alone.
    faults: their probabilities.

  Returns:
    uint8 [e, e] of 0 and 255.
  """
  sounding = _objects(ids)
  mask = truth(ids)
  for one in sounding:
    if rng.random() < faults.missing:
      mask[ids == one] = 0
  if rng.random() < faults.added:
    others = [(other, one) for other in seen for one in _objects(other) if one not in sounding]
    if others:
      other, one = others[rng.integers(len(others))]
      mask[other == one] = 255
    else:
      mask |= _elsewhere(truth(ids), rng)
  if rng.random() < faults.wrong:
    mask = _elsewhere(mask, rng)
  reach = round(faults.moved * len(ids))
  return _move(mask, reach, rng) if reach else mask


def _objects(ids: np.ndarray) -> list[int]:
  return [value for value in labels.values(ids).tolist() if value not in (0, IGNORE)]


def _elsewhere(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Mirrored, and rolled around the edges by a quarter of the sides at least."""
  side = len(mask)
  return np.roll(mask[:, ::-1], rng.integers(side // 4, side - side // 4, 2).tolist(), (0, 1))


def _move(mask: np.ndarray, reach: int, rng: np.random.Generator) -> np.ndarray:
  """Grown or shrunk, and shifted, each by up to `reach` pixels."""
  width, right, down = rng.integers(-reach, reach + 1, 3).tolist()
  disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * abs(width) + 1,) * 2)
  mask = cv2.dilate(mask, disc) if width > 0 else cv2.erode(mask, disc)
  shift = np.array([[1, 0, right], [0, 1, down]], np.float32)
  return cv2.warpAffine(mask, shift, mask.shape, flags=cv2.INTER_NEAREST)
