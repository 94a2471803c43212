"""What a command says on the terminal: lines, durations, progress with an ETA."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

_T = TypeVar('_T')


def duration(seconds: float) -> str:
  """1:02:03 or 2:03."""
  seconds = max(0, round(seconds))
  hours, rest = divmod(seconds, 3600)
  minutes, seconds = divmod(rest, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def counted(number: int, unit: str) -> str:
  """1 clip or 2 clips, of the unit 'clips'."""
  return f'{number} {unit.removesuffix("s") if number == 1 else unit}'


def say(line: str) -> None:
  """One line on standard output, at once."""
  print(line, flush=True)


class Progress:
  """Counts items; a changing line on a terminal, a line every ten seconds elsewhere, and one at the
  end. `total` may be a guess; 0 is none.
  """

  def __init__(self, what: str, total: int, unit: str):
    self._what, self._total, self._unit = what, total, unit
    self._done = self._first = 0
    self._waited = None

  def __enter__(self):
    self._started = self._shown = self._warm = time.monotonic()
    self._terminal = sys.stdout.isatty()
    return self

  def waiting_for(self, batches: Iterable[_T]) -> Iterator[_T]:
    """The same batches; the line at the end says what share of the time was waiting for them.

    The devices may have been at earlier batches meanwhile.
    """
    batches, end, self._waited = iter(batches), object(), 0.0
    while True:
      started = time.monotonic()
      batch = next(batches, end)
      self._waited += time.monotonic() - started
      if batch is end:
        return
      yield batch

  def advance(self, count: int) -> None:
    self.advance_to(self._done + count)

  def advance_to(self, done: int) -> None:
    self._done = done
    now = time.monotonic()
    if not self._first:
      # What the first ones took, compilation for example, says nothing of the others.
      self._first, self._warm = done, now
    if now - self._shown >= (0.2 if self._terminal else 10):
      self._shown = now
      of, left = '', self._total - done
      if left > 0:
        of = f'/{self._total}'
      rate = self._rate(now)
      text = f'{done}{of} {self._unit}, {rate:.1f}/s'
      if left > 0 and done > self._first:
        text += f', {duration(left / rate)} left'
      self._show(text, end='\r' if self._terminal else '\n')

  def _rate(self, now: float) -> float:
    warm = self._done > self._first
    count, since = (self._done - self._first, self._warm) if warm else (self._done, self._started)
    return count / max(now - since, 1e-9)

  def _show(self, text: str, end: str) -> None:
    print(f'{f"  {self._what}: {text}":<78}', end=end, flush=True)

  def __exit__(self, kind, *_):
    if kind is None and self._done:
      now = time.monotonic()
      spent = now - self._started
      text = f'{counted(self._done, self._unit)} in {duration(spent)}, {self._rate(now):.1f}/s'
      if self._waited is not None:
        text += f', {100 * self._waited / max(spent, 1e-9):.0f} % waiting for input'
      self._show(text, end='\n')
    elif self._terminal:
      print()
