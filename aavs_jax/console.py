"""What a command says on the terminal: lines, durations, progress with an ETA."""

import sys
import time


def duration(seconds: float) -> str:
  """1:02:03 or 2:03."""
  seconds = max(0, round(seconds))
  hours, rest = divmod(seconds, 3600)
  minutes, seconds = divmod(rest, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def say(line: str) -> None:
  """One line on standard output, at once."""
  print(line, flush=True)


class Progress:
  """Counts items; a changing line on a terminal, a line every ten seconds elsewhere."""

  def __init__(self, what: str, total: int, unit: str):
    self._what, self._total, self._unit = what, total, unit
    self._done = 0

  def __enter__(self):
    self._started = self._shown = time.monotonic()
    self._terminal = sys.stdout.isatty()
    return self

  def advance(self, count: int) -> None:
    self.advance_to(self._done + count)

  def advance_to(self, done: int) -> None:
    self._done = done
    now = time.monotonic()
    if self._done < self._total and now - self._shown < (0.2 if self._terminal else 10):
      return
    self._shown = now
    self._show(now - self._started, end='\r' if self._terminal else '\n')

  def _show(self, elapsed: float, end: str) -> None:
    left = elapsed / self._done * (self._total - self._done) if self._done else 0
    line = f'  {self._what}: {self._done}/{self._total} {self._unit}, {duration(left)} left'
    if self._done == self._total:
      line, end = f'  {self._what}: {self._total} {self._unit} in {duration(elapsed)}', '\n'
    print(f'{line:<78}', end=end, flush=True)

  def __exit__(self, kind, *_):
    if kind is not None and self._terminal:
      print()
