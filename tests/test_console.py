"""The lines that commands say of their progress."""

import time

import pytest

from aavs_jax.console import Progress


def test_the_last_line_says_what_share_was_waiting_for_input(capsys):
  def batches():
    for batch in 'ab':
      time.sleep(0.3)
      yield batch

  with Progress('scores', 2, 'clips') as progress:
    seen = []
    for batch in progress.waiting_for(batches()):
      seen.append(batch)
      progress.advance(1)
    time.sleep(0.02)
  assert seen == ['a', 'b']
  line = capsys.readouterr().out.rstrip()
  assert line.startswith('  scores: 2 clips in 0:01, ') and line.endswith(' % waiting for input')
  assert 80 <= int(line.split(', ')[-1].split()[0]) < 100


def test_without_batches_it_does_not_speak_of_input(capsys):
  with Progress('clips', 1, 'clips') as progress:
    progress.advance(1)
  assert 'waiting' not in capsys.readouterr().out


def test_an_error_is_not_said_to_be_the_end(capsys):
  with pytest.raises(ValueError), Progress('clips', 2, 'clips') as progress:
    progress.advance(1)
    raise ValueError
  assert capsys.readouterr().out == ''
