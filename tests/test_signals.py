"""What a signal raises ends the program, once, also where Python would lose it."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from aavs_jax.devices.interrupt import StopSignal
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


# Outside Python for long, as in XLA's compiler.
AT_WORK = """
import hashlib
from aavs_jax.devices.interrupt import StopSignal

with StopSignal():
  print('at work', flush=True)
  hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)
"""


def test_a_signal_is_answered_before_what_runs_outside_python_is_done():
  process = subprocess.Popen(
    [sys.executable, '-c', AT_WORK], stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  timer = threading.Timer(60, process.kill)
  timer.start()
  try:
    assert process.stdout.readline() == b'at work\n'
    process.send_signal(signal.SIGTERM)
    assert any(line.startswith(b'stopping as soon as what') for line in process.stderr)
  finally:
    timer.cancel()
    process.kill()
    process.communicate()


def test_a_signal_is_answered_once_and_nothing_stays_behind(capfd):
  before, files = threading.active_count(), len(os.listdir('/proc/self/fd'))
  for numbers in ((signal.SIGTERM, signal.SIGTERM), (), (signal.SIGINT,)):
    with StopSignal() as stop:
      for number in numbers:
        os.kill(os.getpid(), number)
    assert stop.received == (numbers or (0,))[0]
  end = time.monotonic() + 20
  while threading.active_count() > before and time.monotonic() < end:
    time.sleep(0.01)
  assert threading.active_count() == before and len(os.listdir('/proc/self/fd')) == files
  assert capfd.readouterr().err.count('stopping as soon as') == 2
  assert signal.set_wakeup_fd(-1) == -1
