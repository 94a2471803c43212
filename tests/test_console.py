"""The lines that commands say of their progress."""

import pytest

from aavs_jax import console
from aavs_jax.console import Progress


@pytest.fixture
def clock(monkeypatch):
  """A clock that goes on by what a test adds to its only number."""
  now = [100.0]
  monkeypatch.setattr(console.time, 'monotonic', lambda: now[0])
  return now


def test_the_last_line_says_what_share_was_waiting_for_input(clock, capsys):
  def batches():
    for batch in 'ab':
      clock[0] += 3
      yield batch
    clock[0] += 1

  with Progress('scores', 2, 'clips') as progress:
    seen = []
    for batch in progress.waiting_for(batches()):
      seen.append(batch)
      clock[0] += 9
      progress.advance(1)
  assert seen == ['a', 'b']
  line = capsys.readouterr().out.splitlines()[-1].rstrip()
  assert line.startswith('  scores: 2 clips in 0:25, ')
  assert line.endswith('/s, 28 % waiting for input')  # 7 of 25 seconds


def test_without_batches_it_does_not_speak_of_input(capsys):
  with Progress('clips', 1, 'clips') as progress:
    progress.advance(1)
  said = capsys.readouterr().out
  assert 'waiting' not in said and said.startswith('  clips: 1 clip in 0:00, ')


def test_an_error_is_not_said_to_be_the_end(capsys):
  with pytest.raises(ValueError), Progress('clips', 2, 'clips') as progress:
    progress.advance(1)
    raise ValueError
  assert capsys.readouterr().out == ''
