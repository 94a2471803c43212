"""A training that stands still ends and says where; one that goes on, however slowly, does not."""

import re
import signal
import subprocess
import sys
import time

import pytest

from aavs_jax.train import train
from aavs_jax.training.watchdog import Watchdog
from tests import runs, test_distributed
from tests.stand_in import STAND_IN

# Of the training clips from the ninth item on, which is of the fifth step, none can be read.
STUCK = """
import itertools, sys, time
from aavs_jax import cli
from aavs_jax.input_pipeline import pipeline

read, items = pipeline.load_training_item, itertools.count(1)

def read_from_a_hung_mount(*arguments):
  time.sleep(1000 if next(items) > 8 else 0)
  return read(*arguments)

pipeline.load_training_item = read_from_a_hung_mount
sys.exit(cli.main({arguments}))
"""


def test_a_read_that_hangs_ends_the_training(data_root, tmp_path):
  options = ('--config.data.threads=1', '--config.train.stuck_after=40')  # compiling takes a few
  environment = runs.environment(tmp_path / 'cache')
  program = STUCK.format(arguments='')
  process = runs.start(
    tmp_path / 'run', data_root, environment, STAND_IN, *options, program=program
  )
  try:
    output = process.communicate(timeout=120)[0]
  finally:
    process.kill()
  assert process.returncode == 1, output
  words = r'^aavs: process 0 stands still at step (\d+): no progress for 0:40 '
  said = re.search(words, output, re.MULTILINE)
  assert said and said[1] == '4', output
  threads = output[said.end() :]
  assert 'in read_from_a_hung_mount' in threads and 'in _loop' in threads


def test_all_progress_is_told(tiny_stage1, tmp_path, monkeypatch):
  """Compiling, steps, clips and saves, in both of two phases, and the begin of the second."""
  told = []
  monkeypatch.setattr(Watchdog, 'fed', lambda self, step: told.append(step))
  config = tiny_stage1
  config.method = STAND_IN.partition('=')[2]
  config.train.phase2_epoch = 1
  config.train.checkpoint_every_steps = 100
  train(config, tmp_path)
  clips = 5
  phase1, phase2 = [0, *range(1, 7), *[6] * clips, 6], [6, *range(7, 13), *[12] * clips, 12]
  assert told == [*phase1, 6, *phase2]


@pytest.mark.slow
def test_all_processes_say_where_they_stand(data_root, tmp_path):
  """Of two the second reads nothing any more; the first waits for it."""
  program = STUCK.format(arguments="[*sys.argv[2:], '--distributed', sys.argv[1]]")
  program = program.replace('> 8', "> 8 and sys.argv[1].endswith('1')")
  processes = test_distributed._start(
    program, 'train', '--config', 'tests/tiny.py:stage1', STAND_IN, '--data', data_root,
    '--workdir', str(tmp_path / 'work'), '--config.data.threads=1',
    '--config.train.stuck_after=40', '--config.train.epochs=1e3',
  )  # fmt: skip
  for index, output in enumerate(test_distributed._finish(processes, 1, 1)):
    assert f'aavs: process {index} stands still at step ' in output
    assert ('in read_from_a_hung_mount' in output) == (index == 1)


def test_a_process_that_was_stopped_itself_goes_on():
  program = (
    'import time\n'
    'from aavs_jax.training.watchdog import Watchdog\n'
    'with Watchdog(4, 0):\n'
    '  print("watched", flush=True)\n'
    '  for _ in range(20):\n'
    '    time.sleep(0.1)\n'
  )
  process = subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE)
  assert process.stdout.readline() == b'watched\n'
  process.send_signal(signal.SIGSTOP)
  time.sleep(6)
  process.send_signal(signal.SIGCONT)
  process.communicate(timeout=60)
  assert process.returncode == 0


def test_it_watches_what_is_not_fed_until_the_end(monkeypatch):
  ended = []
  monkeypatch.setattr(Watchdog, '_end', lambda self: ended.append(self._step))
  with Watchdog(0, 3):  # never
    time.sleep(0.5)
  with Watchdog(1, 3) as dog:
    for step in range(20):
      time.sleep(0.1)
      dog.fed(step)
  time.sleep(1.5)
  assert not ended
  with Watchdog(0.5, 3):
    time.sleep(1)
  assert set(ended) == {3}
