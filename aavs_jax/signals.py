"""Signals that end the program by an exception."""

import os
import signal
import sys
import threading
from types import FrameType

_AGAIN_AFTER = 0.1  # seconds


class Ending:
  """A handler for SIGINT and SIGTERM that raises, and once more if that was lost.

  Python prints and drops what is raised in a callback of its garbage collector, of which JAX has
  one, or of a weak reference, and in a finaliser: the program would go on to its end as if nobody
  had asked it to stop.
  """

  def __init__(self):
    self._error, self._timer, self._again = None, None, False

  def handle(self, number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt for SIGINT, SystemExit for others, unless it is on its way."""
    again, self._again = self._again, False
    self.heard()
    self._timer = threading.Timer(_AGAIN_AFTER, self._send, [number])
    self._timer.daemon = True
    self._timer.start()
    if not (again and self._is_on_its_way()):
      self._error = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
      raise self._error

  def heard(self) -> None:
    """To be called when the exception has come to where it ends the program."""
    if self._timer is not None:
      self._timer.cancel()

  def _send(self, number: int) -> None:
    self._again = True
    os.kill(os.getpid(), number)

  def _is_on_its_way(self) -> bool:
    """Whether what runs now is cleaning up after it."""
    found = sys.exception()
    while found is not None and found is not self._error:
      found = found.__context__
    return found is not None
