"""Ending a run in good order when somebody asks for it."""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils


class Stopped(Exception):
  """The run is to save and end now."""


def _tell(woken: int) -> None:
  """Says at the first SIGINT or SIGTERM that it has come, until 0 is read.

  Python's own handlers run when a compilation is over, which is outside Python.
  """
  told = False
  while number := os.read(woken, 1)[0]:
    if number in (signal.SIGINT, signal.SIGTERM) and not told:
      told = True
      with contextlib.suppress(OSError):
        os.write(2, b'stopping as soon as what runs now is done (a compilation takes minutes)\n')
  os.close(woken)


class StopSignal:
  """Notes SIGTERM and SIGINT, so that the loop can save and end; Ctrl-C after that ends at once.

  A second SIGTERM does not: of those who send it to a group of processes some hand it on as well.

  Of several processes each may get a signal at another moment, or only one of them; JAX's
  preemption service, which then has the handler of SIGTERM and is told of SIGINT as well, agrees
  with all on the call of `check` in which they stop.
  """

  received = 0

  def __enter__(self):
    self._several = jax.process_count() > 1
    self._calls = itertools.count(1)
    signals = (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM)
    woken, self._waking = os.pipe()
    os.set_blocking(self._waking, False)
    threading.Thread(target=_tell, args=[woken], daemon=True).start()
    self._woken_before = signal.set_wakeup_fd(self._waking, warn_on_full_buffer=False)
    self._before = {s: signal.signal(s, self._note) for s in signals}
    return self

  def check(self) -> None:
    """Raises Stopped if a signal has come; all processes must call it equally often."""
    agreed = multihost_utils.reached_preemption_sync_point(next(self._calls))
    if agreed and not self.received:
      self.received = signal.SIGTERM
    if agreed if self._several else self.received:
      raise Stopped

  def after_each(self, items: int) -> Callable[..., None]:
    """`check` for after each of the items that processes share; who has one more does not ask."""
    common = iter(range(items // jax.process_count()))

    def check(*_):
      if next(common, None) is not None:
        self.check()

    return check

  def _note(self, number, frame):
    if self.received:
      if number == signal.SIGINT:
        before = self._before[number]
        if not callable(before):  # a shell may have it ignored
          raise KeyboardInterrupt
        before(number, frame)
      return
    self.received = number
    if self._several:
      signal.raise_signal(signal.SIGTERM)

  def __exit__(self, *_):
    signal.set_wakeup_fd(self._woken_before)
    os.write(self._waking, b'\0')
    os.close(self._waking)
    for number, handler in self._before.items():
      signal.signal(number, handler)
