"""Ending a run in good order when somebody asks for it."""

import signal


class StopSignal:
  """Notes SIGTERM and SIGINT, so that the loop can save and end; a second one ends at once."""

  received = 0

  def __enter__(self):
    self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def _note(self, number, frame):
    if self.received:
      raise KeyboardInterrupt
    self.received = number

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)
