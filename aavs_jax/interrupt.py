"""Ending a run in good order when somebody asks for it."""

import signal

import jax
from jax.experimental import multihost_utils


class StopSignal:
  """Notes SIGTERM and SIGINT, so that the loop can save and end; a second one ends at once.

  Of several processes each may get a signal at another moment, or only one of them; JAX's
  preemption service, which then has the handler of SIGTERM and is told of SIGINT as well, agrees
  with all on the step after which they stop.
  """

  received = 0

  def __enter__(self):
    self._several = jax.process_count() > 1
    signals = (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM)
    self._before = {s: signal.signal(s, self._note) for s in signals}
    return self

  def after(self, step: int) -> bool:
    """Whether to stop after a step; to be asked after every one."""
    agreed = multihost_utils.reached_preemption_sync_point(step)
    if agreed and not self.received:
      self.received = signal.SIGTERM
    return agreed if self._several else bool(self.received)

  def _note(self, number, frame):
    if self.received:
      raise KeyboardInterrupt
    self.received = number
    if self._several:
      signal.raise_signal(signal.SIGTERM)

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)
