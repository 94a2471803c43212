"""Several processes: together they give what one gives, and no signal leaves one of them hanging.

Each process is a real one with fake CPU devices; what the model makes of them: test_sharding.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aavs_jax import evaluate, hand_over, train
from tests import tiny
from tests.stand_in import STAND_IN

ROOT = Path(__file__).parents[1]
PROMPTLY = 15  # seconds on a machine that does much else


def _start(program, *arguments, processes=2, devices=1, xla_flags=''):
  """Starts the processes of a program, which finds its place, as for `start`, in sys.argv[1]."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  environment = os.environ | {'JAX_NUM_CPU_DEVICES': str(devices), 'XLA_FLAGS': xla_flags}
  return [
    subprocess.Popen(
      [sys.executable, '-c', program, f'localhost:{port},{processes},{index}', *arguments],
      cwd=ROOT, env=environment, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    for index in range(processes)
  ]  # fmt: skip


def _finish(processes, *statuses, timeout=120):
  try:
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == list(statuses), '\n'.join(outputs)
  return outputs


def everything(data, folder):
  """Trains for a few steps, scores with maps and hands over masks."""
  config = tiny.get_config('stage1')
  config.method = 'tests.stand_in'
  config.data.root = data
  config.data.batch_items = 4
  config.train.epochs = 1.0  # 3 steps
  work = f'{folder}/work'
  train.train(config, work)
  evaluate.evaluate(work, data=data, out=f'{folder}/result.json', maps=f'{folder}/maps')
  hand_over.write_masks(work, data=data, out=f'{folder}/masks')


@pytest.fixture(scope='module')
def alone(data_root, tmp_path_factory):
  """The folder of `everything` in one process."""
  folder = tmp_path_factory.mktemp('alone')
  everything(data_root, folder)
  return folder


def _pictures(folder):
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*.png')}


def _losses(folder):
  rows = [json.loads(line) for line in (folder / 'work/metrics.jsonl').read_text().splitlines()]
  return [row['loss'] for row in rows if row['kind'] == 'train']


def test_two_processes_give_what_one_gives(alone, data_root, tmp_path):
  program = """
import sys
from aavs_jax.devices import distributed
distributed.start(sys.argv[1])
from tests import test_distributed
test_distributed.everything(*sys.argv[2:])
"""
  _finish(_start(program, data_root, str(tmp_path), devices=2), 0, 0)
  assert len(_losses(alone)) > 1
  assert _losses(tmp_path) == pytest.approx(_losses(alone), rel=1e-5)
  both = [json.loads((folder / 'result.json').read_text()) for folder in (alone, tmp_path)]
  assert 0 < both[0]['overall']['miou'] < 1
  for one, two in zip(*(result['per_clip'] for result in both), strict=True):
    assert one == pytest.approx(two, abs=1e-4)
  assert _pictures(tmp_path).keys() == _pictures(alone).keys() != set()


def test_each_process_keeps_its_step_and_finds_it_if_all_do(tmp_path):
  program = """
import sys
from aavs_jax.devices import distributed
distributed.start(sys.argv[1])
from tests import test_programs
test_programs.keep_and_find(*sys.argv[2:])
"""
  for when in ('first', 'later'):
    _finish(_start(program, str(tmp_path), when, devices=2), 0, 0)
  one, _ = tmp_path.glob('aavs-step-*')
  one.unlink()
  _finish(_start(program, str(tmp_path), 'without', devices=2), 0, 0)


def test_the_latest_checkpoint_is_looked_for_without_the_others(alone):
  program = """
import sys
from etils import epath
from aavs_jax.devices import distributed
from aavs_jax.training import checkpoint
distributed.start(sys.argv[1])
folder = epath.Path(sys.argv[2 + int(sys.argv[1][-1])])
assert distributed.gather(checkpoint.latest_step(folder)) == [3, None]
"""
  _finish(_start(program, str(alone / 'work/checkpoints'), str(alone / 'elsewhere')), 0, 0)


def test_a_process_that_is_late_is_waited_for(alone, data_root, tmp_path):
  """A collective waits for as long as is set here, and for half a minute where nothing is."""
  program = """
import sys, time
from aavs_jax.devices import distributed
from aavs_jax import evaluate, hand_over
distributed.start(sys.argv[1])
place = int(sys.argv[1][-1])
assert distributed.gather(place) == [0, 1]
_, work, data, out = sys.argv[1:]
time.sleep(4 * place)
evaluate.evaluate(work, data=data, out=f'{out}/result.json')
time.sleep(4 * (1 - place))
assert hand_over.write_masks(work, data=data, out=f'{out}/masks') == 10
"""
  flag = '--xla_cpu_collective_timeout_seconds=2'
  known = subprocess.run(
    [sys.executable, '-c', 'import jax; jax.devices()'], env=os.environ | {'XLA_FLAGS': flag}
  )
  if known.returncode:
    pytest.skip('in this release of JAX the patience of a collective cannot be set')
  arguments = (str(alone / 'work'), data_root, str(tmp_path))
  _finish(_start(program, *arguments, xla_flags=flag), 0, 0)


COMMAND = """
import itertools, sys, time
from aavs_jax import cli
from aavs_jax.scoring import predictor

predict = predictor.Predictor.__call__
calls = itertools.count(1)

def slowly(self, variables, batch):
  time.sleep(0.3 if next(calls) <= {last} else 100)
  return predict(self, variables, batch)

predictor.Predictor.__call__ = slowly
sys.exit(cli.main([*sys.argv[2:], '--distributed', sys.argv[1]]))
"""
SLOWLY = COMMAND.format(last=1e9)
# Of the five batches, a clip each, of a process: the first clip is written once four are on their
# way to the device.
NEVER_DONE = COMMAND.format(last=4)


def _wait_for(condition, processes):
  end = time.monotonic() + 100
  while not condition():
    assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
    assert time.monotonic() < end, 'the moment to send a signal never came'
    time.sleep(0.01)


def _finished(folder):
  """Clips whose folders are whole; what is being written beside them may vanish under a glob."""
  return list(folder.glob('[!.]*/[!.]*/0.png'))


def _sound(folder):
  """Whether clips' folders are whole or not there: nothing of a writer that was ended."""
  names = [path.name for path in folder.glob('*/*')]
  return names and not [name for name in names if name.startswith('.')]


def test_sigterm_ends_all_and_leaves_whole_masks(alone, data_root, tmp_path):
  out = tmp_path / 'masks'
  processes = _start(
    NEVER_DONE, 'masks', '--workdir', str(alone / 'work'), '--data', data_root, '--out', str(out)
  )
  _wait_for(lambda: _finished(out), processes)
  for process in processes:
    process.send_signal(signal.SIGTERM)
  _finish(processes, 143, 143, timeout=PROMPTLY)
  written, whole = _pictures(out), _pictures(alone / 'masks')
  assert _sound(out) and written.items() < whole.items()


@pytest.fixture
def evaluation(alone, data_root, tmp_path):
  """Two processes that score clips; the maps of some of them are there."""
  maps = tmp_path / 'maps'
  processes = _start(
    SLOWLY, 'eval', '--workdir', str(alone / 'work'), '--data', data_root, '--split', 'train',
    '--out', str(tmp_path / 'result.json'), '--maps', str(maps),
  )  # fmt: skip
  yield processes, lambda: len(_finished(maps))
  for process in processes:
    process.kill()


@pytest.mark.slow
def test_a_process_that_waits_for_another_hears_ctrl_c(evaluation):
  (waiting, late), written = evaluation
  _wait_for(written, (waiting, late))
  late.send_signal(signal.SIGSTOP)
  _wait_for(lambda: written() >= 5, (waiting, late))  # its share of ten clips
  time.sleep(1)
  waiting.send_signal(signal.SIGINT)
  output = _finish([waiting], 130, timeout=PROMPTLY)[0]
  assert 'Traceback' not in output
  late.send_signal(signal.SIGCONT)
  late.communicate(timeout=60)
  assert late.returncode not in (0, None)


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('victim', [0, 1])
def test_a_signal_to_one_process_ends_the_others_too(victim, number, evaluation):
  processes, written = evaluation
  _wait_for(written, processes)
  processes[victim].send_signal(number)
  _finish([processes[victim]], 128 + number, timeout=PROMPTLY)
  processes[1 - victim].communicate(timeout=150)  # JAX misses a process after 100 seconds
  assert processes[1 - victim].returncode not in (0, None)


@pytest.mark.slow
@pytest.mark.parametrize(('number', 'status'), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_to_one_of_two_that_train_saves_and_ends_both(number, status, data_root, tmp_path):
  processes = _start(
    SLOWLY, 'train', '--config', 'tests/tiny.py:stage1', STAND_IN, '--data', data_root,
    '--workdir', str(tmp_path / 'work'), '--config.train.epochs=1e3',
    '--config.train.eval_every_epochs=1e3', '--config.train.checkpoint_every_steps=1000000',
  )  # fmt: skip
  _wait_for((tmp_path / 'work' / 'metrics.jsonl').exists, processes)
  processes[1].send_signal(number)
  output = _finish(processes, 0, status, timeout=60)[0]
  assert 'stopped by a signal at step' in output
  assert any(path.name.isdigit() for path in (tmp_path / 'work' / 'checkpoints').iterdir())
