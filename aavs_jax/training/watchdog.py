"""Ends a training that stands still: a read, a device or another process may hang for ever."""

import faulthandler
import os
import sys
import threading

import jax

from aavs_jax.console import duration
from aavs_jax.devices import distributed

_STDERR = 2  # what takes the place of sys.stderr, in a notebook for example, need not be a file


class Watchdog:
  """Ends the process with status 1 if there is no progress for too long, and says where it stands.

  By a thread, in a `with`. It sees nothing while Python's lock is held.

  Args:
    seconds: without progress that are too many; 0: none are.
    step: at which the training begins.
  """

  def __init__(self, seconds: float, step: int):
    self._seconds, self._step = seconds, step
    self._progress, self._over = threading.Event(), threading.Event()

  def __enter__(self):
    if self._seconds:
      threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, *_):
    self._over.set()

  def fed(self, step: int) -> None:
    """To be called at each progress, with the step at which the training is."""
    self._step = step
    self._progress.set()

  def _watch(self) -> None:
    # Added up: a clock would go on while the process is stopped, by Ctrl-Z for example.
    idle, interval = 0, min(1, self._seconds / 10)
    while not self._over.wait(interval):
      idle += interval
      if self._progress.is_set():
        self._progress.clear()
        idle = 0
      if idle >= self._seconds:
        self._end()

  def _end(self) -> None:
    try:
      print(
        f'aavs: process {jax.process_index()} stands still at step {self._step}: no progress for '
        f'{duration(self._seconds)} (config.train.stuck_after), so it ends, and the same command '
        'goes on from the last checkpoint; its threads are here:',
        file=sys.stderr,
        flush=True,
      )
      faulthandler.dump_traceback(_STDERR)
      distributed.leave(1)  # which lets the others say where they stand
    finally:
      os._exit(1)
