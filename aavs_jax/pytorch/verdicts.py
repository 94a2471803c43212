"""How far apart two arrays are, and whether that is too far: the tables of the selftest."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from aavs_jax.scoring.tables import padded

# Quantity -> what its error is, and how large that may be in float32.
TOLERANCES = {
  'intermediates': ('of the largest value', 1e-4),
  'prediction sets': ('of the largest value', 1e-4),
  'logits': ('of the largest value', 1e-4),
  'matching': ('share of the targets', 0.0),
  'loss': ('relative', 1e-4),
  'loss terms': ('relative', 1e-4),
  'gradients': ('of the largest value', 1e-3),
  'running statistics': ('of the largest value', 1e-4),
  'losses of the steps': ('relative', 1e-4),
  'changes, with a gradient': ('of the largest change', 5e-2),
  'changes, elements that are off': ('share of all elements', 5e-3),
  'scores': ('absolute', 1e-3),
  'map': ('share of the pixels', 1e-4),
  'totals of the steps': ('relative', 1e-3),
  'gradient norms of the steps': ('relative', 1e-3),
  'parameters after the steps': ('of the largest change', 0.02),
  'log-mel at 16 kHz': ('absolute', 1e-5),
  'log-mel, resampled': ('mean, absolute', 0.02),
  'VGGish embedding': ('of the largest value', 1e-4),
  'metrics': ('absolute', 1e-6),
  'metrics of the release': ('of the largest value', 1e-6),  # recorded in float32, some as sums
}
TINY = float(np.finfo(np.float32).tiny)  # in the place of a recorded value of zero
CLOSE_SHARE = 0.999  # of a tensor's elements that 'parameters after the steps' speaks of

Errors = dict[str, dict[str, float]]  # quantity -> where -> error


class Row(NamedTuple):
  """One line of a table: a quantity and its largest error."""

  quantity: str
  unit: str
  error: float
  tolerance: float | None  # None: reported, not judged
  where: str

  @property
  def passes(self) -> bool:
    return self.tolerance is None or self.error <= self.tolerance


class Table(NamedTuple):
  title: str
  rows: list[Row]


def compare(
  ours: Mapping[str, np.ndarray],
  theirs: Mapping[str, np.ndarray],
  error: Callable[[np.ndarray, np.ndarray], float],
) -> dict[str, float]:
  """The error of each; infinite for what only one side has, or has in another shape."""
  errors = {}
  for name in dict.fromkeys([*ours, *theirs]):
    errors[name] = np.inf
    if name in ours and name in theirs:
      a, b = np.asarray(ours[name]), np.asarray(theirs[name])
      if a.shape == b.shape and b.dtype.kind in 'biuf':
        errors[name] = error(a.astype(np.float64), b.astype(np.float64))
  return errors


def of_largest(ours: np.ndarray, theirs: np.ndarray) -> float:
  """Largest difference as a share of the largest recorded value."""
  return largest_difference(ours, theirs) / max(float(np.abs(theirs).max(initial=0)), TINY)


def of_largest_change(ours: np.ndarray, theirs: np.ndarray) -> float:
  """The difference that CLOSE_SHARE of the elements keep to, as a share of the largest change."""
  difference = np.quantile(np.abs(ours - theirs), CLOSE_SHARE, method='inverted_cdf')
  return float(difference) / max(float(np.abs(theirs).max()), TINY)


def largest_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
  return float(np.abs(ours - theirs).max(initial=0))


def mean_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
  return float(np.abs(ours - theirs).mean())


def share_unequal(ours: np.ndarray, theirs: np.ndarray) -> float:
  return float(np.mean(ours != theirs))


def worst(quantity: str, errors: Mapping[str, float], prefix: str = '') -> Row:
  """The row of a quantity's largest error, NaN counting as infinite."""
  unit, tolerance = TOLERANCES[quantity]
  errors = {name: np.inf if np.isnan(error) else error for name, error in errors.items()}
  where = max(errors, key=errors.get)
  return Row(prefix + quantity, unit, errors[where], tolerance, where if errors[where] else '')


def format_table(table: Table) -> str:
  """A title, and a line for each quantity with its verdict."""
  lines = [('quantity', 'largest error', 'tolerance', 'verdict', 'the error is', 'found in')]
  for row in table.rows:
    judged = row.tolerance is not None
    tolerance = f'{row.tolerance:.0e}' if row.tolerance else '0' if judged else '-'
    verdict = ('ok' if row.passes else 'MISS') if judged else '-'
    lines.append((row.quantity, f'{row.error:.1e}', tolerance, verdict, row.unit, row.where))
  lines = ['  '.join(('', *cells)).rstrip() for cells in padded(lines, (1, 2))]
  return '\n'.join([table.title, *lines])
