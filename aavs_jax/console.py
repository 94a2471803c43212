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
    self._done = self._first = 0

  def __enter__(self):
    self._started = self._shown = self._warm = time.monotonic()
    self._terminal = sys.stdout.isatty()
    return self

  def advance(self, count: int) -> None:
    self.advance_to(self._done + count)

  def advance_to(self, done: int) -> None:
    self._done = done
    now = time.monotonic()
    if not self._first:
      # What the first ones took, compilation for example, says nothing of the others.
      self._first, self._warm = done, now
    if self._done < self._total and now - self._shown < (0.2 if self._terminal else 10):
      return
    self._shown = now
    self._show(now, end='\r' if self._terminal else '\n')

  def _show(self, now: float, end: str) -> None:
    line = f'  {self._what}: {self._done}/{self._total} {self._unit}'
    if self._done > self._first:
      pace = (now - self._warm) / (self._done - self._first)
      line += f', {duration(pace * (self._total - self._done))} left'
    if self._done == self._total:
      spent = duration(now - self._started)
      line, end = f'  {self._what}: {self._total} {self._unit} in {spent}', '\n'
    print(f'{line:<78}', end=end, flush=True)

  def __exit__(self, kind, *_):
    if kind is not None and self._terminal:
      print()
