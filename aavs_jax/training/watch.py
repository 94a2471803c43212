"""Stops a training whose numbers are not finite, without making the host wait for the devices."""

import collections
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from etils import epath

# Losses are looked at this many steps late, so that the host never waits for the device.
_LAG = 2


class Watch:
  """Looks at the loss of every step, a few steps late.

  Args:
    names: of the clips by index.
    latest: says the step of the last checkpoint in
    workdir.
  """

  def __init__(self, names: Sequence[str], latest: Callable[[], int | None], workdir: epath.Path):
    self._names, self._latest, self._workdir = names, latest, workdir
    self._in_flight = collections.deque()  # (step, clip indices, metrics) not yet looked at

  def add(self, step: int, clips: np.ndarray, metrics: Mapping[str, jax.Array]) -> None:
    """Notes a step, and looks at those that came well before it."""
    self._in_flight.append((step, clips, metrics))
    self.look(_LAG)

  def look(self, keep: int = 0) -> None:
    """Looks at all but the newest `keep` steps.

    Raises:
      FloatingPointError: loss or gradient is not finite; names step, clips and last checkpoint.
    """
    while len(self._in_flight) > keep:
      step, clips, metrics = self._in_flight.popleft()
      # A gradient that is not finite spoils the parameters, though this step's loss is still good.
      loss, norm = float(metrics['loss']), float(metrics['gradient_norm'])
      if not np.isfinite([loss, norm]).all():
        saved = self._latest()
        last = 'none' if saved is None else self._workdir / 'checkpoints' / str(saved)
        raise FloatingPointError(
          f'the loss of step {step} is {loss} and its gradient {norm} on clips '
          f'{", ".join(self._names[i] for i in dict.fromkeys(clips.tolist()))}; the last good '
          f'checkpoint is {last}: lower optimizer.lr or look at these clips'
        )
