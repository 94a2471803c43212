"""What a signal raises ends the program, once, also where Python would lose it."""

import gc
import os
import signal
import time

import pytest

from aavs_jax.signals import Ending


@pytest.fixture
def sent():
  """Sends this process a signal, with Ending's handler."""
  ending = Ending()
  before = {n: signal.signal(n, ending.handle) for n in (signal.SIGINT, signal.SIGTERM)}
  yield lambda number: os.kill(os.getpid(), number)
  ending.heard()
  for number, handler in before.items():
    signal.signal(number, handler)


@pytest.mark.parametrize(
  ('number', 'error'), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_what_is_lost_comes_again(sent, number, error):
  calls = []

  def callback(phase, info):
    if not calls:
      calls.append(phase)
      sent(number)

  with pytest.raises(error):
    gc.callbacks.append(callback)
    try:
      gc.collect()
    finally:
      gc.callbacks.remove(callback)
    calls.append('lost')
    time.sleep(20)
  assert calls == ['start', 'lost']


def test_cleaning_up_is_not_disturbed_but_by_another_signal(sent):
  cleaned = []
  with pytest.raises(SystemExit) as ended:
    try:
      sent(signal.SIGTERM)
      time.sleep(20)
    finally:
      try:
        time.sleep(0.5)
        cleaned.append(True)
        raise ValueError('as of a file that is gone')
      except ValueError:
        time.sleep(0.3)
        cleaned.append(True)
  assert ended.value.code == 143 and cleaned == [True, True]
  with pytest.raises(KeyboardInterrupt):
    try:
      sent(signal.SIGTERM)
      time.sleep(20)
    finally:
      sent(signal.SIGINT)
      time.sleep(20)
