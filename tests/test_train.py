"""Training as a whole: interrupted anywhere it ends with the same bits; faults stop it clearly."""

import contextlib
import errno
import itertools
import json
import shutil
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from aavs_jax.input_pipeline import pipeline
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.scoring import score
from aavs_jax.train import train
from aavs_jax.training import checkpoint
from aavs_jax.training.watch import Watch
from tests import runs
from tests.stand_in import STAND_IN

STEPS = 12  # 12 items, 2 a batch, 2 epochs


@pytest.fixture(scope='module')
def start(tmp_path_factory, data_root):
  """Starts the command line's training into a folder, in a process of its own."""
  environment = runs.environment(tmp_path_factory.mktemp('cache'))

  def run(workdir, *overrides, **options):
    return runs.start(workdir, data_root, environment, *runs.DEEP, *overrides, **options)

  return run


@pytest.fixture(scope='module')
def uninterrupted(start, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('uninterrupted')
  process = start(workdir, '--profile', '3:5')
  output = process.communicate()[0]
  assert process.returncode == 0, output
  return workdir


def _wait(process, condition, seconds=600):  # on a busy machine the whole model takes minutes
  end = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < end, 'the moment to interrupt never came'
    time.sleep(0.002)


def test_killed_in_the_middle_of_a_save_it_ends_with_the_same_bits(start, uninterrupted, tmp_path):
  """The whole model, of which each start costs its tracing; tests/kill_study.py kills a hundred."""
  process = start(tmp_path)
  _wait(process, lambda: runs.saving(tmp_path) and runs.logged(tmp_path) >= 10)
  process.kill()
  process.communicate()
  process = start(tmp_path)
  output = process.communicate()[0]
  assert process.returncode == 0, output
  assert 'going on from step' in output

  runs.require_same(tmp_path, uninterrupted)
  assert runs.state(tmp_path)[0] == STEPS


@pytest.fixture(scope='module')
def stand_in(start, tmp_path_factory):
  """An uninterrupted run of the stand-in for the model."""
  workdir = tmp_path_factory.mktemp('stand_in')
  process = start(workdir, STAND_IN)
  output = process.communicate()[0]
  assert process.returncode == 0, output
  return workdir


def test_a_second_start_is_refused_and_does_no_harm(start, stand_in, tmp_path):
  first = start(tmp_path, STAND_IN)
  _wait(first, lambda: runs.saving(tmp_path))
  first.send_signal(signal.SIGSTOP)  # in the middle of its save
  before = {path.name for path in (tmp_path / 'checkpoints').iterdir()}
  second = start(tmp_path, '--config.optimizer.lr=0.5', STAND_IN)
  output = second.communicate()[0]
  assert {path.name for path in (tmp_path / 'checkpoints').iterdir()} == before
  first.send_signal(signal.SIGCONT)
  holder = f'process {first.pid} on {socket.gethostname()}'
  assert f'aavs: {tmp_path} is in use by another run, {holder}: ' in output
  assert second.returncode == 1 and 'Traceback' not in output
  output = first.communicate()[0]
  assert first.returncode == 0, output
  runs.require_same(tmp_path, stand_in)


# Sends SIGTERM to itself where {where} says: in the first validation, or in the log of a step.
STOPPED = """
import os, signal, sys
from aavs_jax import cli
from aavs_jax.training import metric_log
from aavs_jax.scoring import predictor

def stop(done=[]):
  if not done:
    os.kill(os.getpid(), signal.SIGTERM)
  done.append(True)

call, line = predictor.Predictor.__call__, metric_log.step_line

def predict(self, *batch):
  print('batch of a validation', flush=True)
  if {where!r} == 'validation':
    stop()
  return call(self, *batch)

def step_line(row, total):
  if row['step'] == {where!r}:
    stop()
  return line(row, total)

predictor.Predictor.__call__, metric_log.step_line = predict, step_line
sys.exit(cli.main())
"""


def test_a_validation_does_not_keep_a_stop_waiting(start, stand_in, tmp_path):
  # Before a validation, in the same one after a restart (whose batches are dispatched ahead), and
  # before the last one.
  for where, at, batches in ((6, 6, 0), ('validation', 6, 3), (STEPS, STEPS, 3)):
    process = start(tmp_path, STAND_IN, program=STOPPED.format(where=where))
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert f'stopped by a signal at step {at};' in output
    assert f'step {at}  validation' not in output
    assert output.count('batch of a validation') == batches, output
    assert runs.state(tmp_path)[0] == at
  output = start(tmp_path, STAND_IN).communicate()[0]
  assert f'step {STEPS}  validation' in output and 'compiling' not in output
  runs.require_same(tmp_path, stand_in)


def test_a_trace_holds_the_steps_that_it_was_asked_for(uninterrupted):
  (path,) = (uninterrupted / 'profile').rglob('*.xplane.pb')
  trace = jax.profiler.ProfileData.from_file(str(path))
  found = []
  for plane in trace.planes:
    for line in plane.lines:
      found += [dict(event.stats)['step_num'] for event in line.events if event.name == 'train']
  assert sorted(found) == [3, 4]


def test_a_finished_run_is_not_trained_again(start, stand_in):
  before = (stand_in / 'metrics.jsonl').read_text()
  process = start(stand_in, STAND_IN)
  output = process.communicate()[0]
  assert process.returncode == 0 and 'best validation mIoU' in output
  assert (stand_in / 'metrics.jsonl').read_text() == before


def test_checkpoints_that_are_not_all_seen_are_not_gone_on_from(tiny_stage1, tmp_path, monkeypatch):
  tiny_stage1.method = STAND_IN.partition('=')[2]
  tiny_stage1.train.steps = tiny_stage1.train.eval_every_steps = 1
  train(tiny_stage1, tmp_path / 'run')
  monkeypatch.setattr(checkpoint._Manager, 'latest_step', lambda _: None)
  with pytest.raises(OSError, match='checkpoints cannot be read reliably now: try again'):
    train(tiny_stage1, tmp_path / 'run')


def test_a_finished_run_is_no_run_from_another_start(start, stand_in):
  before = (stand_in / 'config.json').read_text()
  process = start(stand_in, f'--config.train.init={stand_in}', STAND_IN)
  output = process.communicate()[0]
  assert process.returncode == 2, output
  assert 'was begun with another content of config.train.init' in output
  assert (stand_in / 'config.json').read_text() == before


def test_sigterm_saves_and_ends_well(start, tmp_path):
  process = start(tmp_path, '--config.data.workers=1', '--config.train.epochs=1e3', STAND_IN)
  _wait(process, lambda: runs.logged(tmp_path) >= 2)
  for _ in range(2):  # `timeout` hands on what its whole group has got
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
  output = process.communicate(timeout=30)[0]
  assert process.returncode == 0 and 'stopped by a signal at step' in output
  assert output.count('stopping as soon as what runs now is done') == 1
  assert 'Traceback' not in output and 'leaked' not in output
  step, _ = runs.state(tmp_path)
  assert f'at step {step};' in output


def test_the_newest_and_the_best_checkpoint_are_kept(stand_in):
  scores = {row['step']: row['miou'] for row in runs.history(stand_in) if row['kind'] == 'val'}
  best = max(scores, key=lambda step: (scores[step], step))
  with checkpoint.make_manager(stand_in / 'checkpoints', 2) as manager:
    assert manager.best_step() == best
    assert set(manager.all_steps()) == {best, 8, STEPS}
  assert checkpoint.load_flat(stand_in)[1] == best


def test_another_config_in_the_same_folder_is_refused(start, stand_in):
  process = start(stand_in, '--config.optimizer.lr=0.5', STAND_IN)
  output = process.communicate()[0]
  assert process.returncode == 2
  assert 'optimizer.lr is 0.5, was 0.001' in output and 'Traceback' not in output


def _check_pace(workdir):
  """What rows say of speed fits together; a step has 10 frames."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  rows = [row for row in map(json.loads, lines) if row['kind'] == 'train']
  work = {1: set(), 2: set()}
  for row in rows:
    assert row['frames_per_second'] * row['step_seconds'] == pytest.approx(10)
    assert 0 <= row['input_wait'] <= 1 and 'mfu' not in row
    work[row['phase']].add(round(row['tflops_per_second'] * row['step_seconds'] * 1e12))
  # The same work in every step, and more where the backbone's adapters train.
  assert [len(values) for values in work.values()] == [1, 1]
  assert min(work[2]) > min(work[1]) > 0


def test_two_phases(tiny_stage1, monkeypatch, tmp_path):
  config = tiny_stage1
  config.train.epochs = 1.5
  config.train.phase2_epoch = 1
  config.train.eval_every_epochs = 0.34
  config.train.trainable = ('adapter/', 'class_predictor', 'audio_projection')
  config.train.frozen_dtype = 'bfloat16'
  config.train.checkpoint_every_steps = 1
  config.train.keep_checkpoints = 100
  config.optimizer.lr_phase2 = 0.0  # so that phase 2 shows what it began with
  config.model.decoder_layers = 0  # what is compiled twice should be small
  scores = itertools.chain([0.1, 0.9, 0.5], itertools.repeat(0.9))  # of steps 2, 4 and 6
  monkeypatch.setattr(
    score, 'score', lambda *_, **__: {'overall': dict.fromkeys(('miou', 'fscore'), next(scores))}
  )
  train(config, tmp_path)

  _check_pace(tmp_path)
  best = 4
  states = {
    step: checkpoint.read_arrays(tmp_path / 'checkpoints' / str(step) / 'state')
    for step in (1, best, 6, 7)
  }
  swin = [path for path in states[7]['trained'] if 'backbone' in path]
  assert swin and not any(path in states[6]['trained'] for path in swin)
  assert all((states[6]['frozen'][path] == 0).all() for path in swin)
  kernels = [path for path in swin if path.endswith('kernel')]
  assert all((states[7]['trained'][path] != 0).any() for path in kernels)
  # Phase 2 begins with the best weights of phase 1, and these are not the last ones.
  shared = [path for path in states[7]['trained'] if path not in swin]
  assert all((states[7]['trained'][p] == states[best]['trained'][p]).all() for p in shared)
  assert any((states[7]['trained'][p] != states[6]['trained'][p]).any() for p in shared)
  assert {str(value.dtype) for value in states[7]['trained'].values()} == {'float32'}
  assert {str(value.dtype) for value in states[7]['frozen'].values()} == {'bfloat16'}
  # What trains in neither phase never changes.
  for path, value in states[7]['frozen'].items():
    np.testing.assert_array_equal(value, states[1]['frozen'][path])


def test_a_loss_that_is_not_finite_stops_the_run(tiny_stage1, tmp_path):
  tiny_stage1.optimizer.lr = 1e30
  tiny_stage1.optimizer.schedule = 'constant'
  tiny_stage1.model.decoder_layers = 0
  with pytest.raises(FloatingPointError) as error:
    train(tiny_stage1, tmp_path)
  text = str(error.value)
  uids = [
    path.name for s in ('v1s', 'v1m', 'v2') for path in (Path(tiny_stage1.data.root) / s).iterdir()
  ]
  assert 'the loss of step' in text and any(uid in text for uid in uids)
  assert 'last good checkpoint is none' in text


def test_what_ends_a_run_does_not_end_the_save_before(tiny_stage1, tmp_path, monkeypatch):
  """As the file of a clip, which is gone in the middle: a sentence, and the last checkpoint."""
  from_files = pipeline.training_batches

  def two(*args, **options):
    yield from itertools.islice(from_files(*args, **options), 2)
    raise UserError('a frame is gone')

  monkeypatch.setattr(pipeline, 'training_batches', two)
  tiny_stage1.method = STAND_IN.partition('=')[2]
  tiny_stage1.train.checkpoint_every_steps = 1
  with pytest.raises(UserError, match='a frame is gone'):
    train(tiny_stage1, tmp_path / 'run')
  assert sorted(path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()) == ['1', '2']


@pytest.mark.parametrize('steps', ['2', '24'])
@pytest.mark.parametrize('signalled', [False, True], ids=['goes on', 'signalled'])
def test_a_save_that_fails_takes_no_other_with_it(
  steps, signalled, tiny_stage1, tmp_path, monkeypatch, capsys
):
  """Of two in a row the second ends the run: the disk may be full."""
  wait, from_files = checkpoint._Manager.wait_until_finished, pipeline.training_batches
  failing = list(steps)

  def fail(manager):
    wait(manager)
    for step in failing:
      if (manager.directory / step).exists():
        failing.remove(step)
        shutil.rmtree(manager.directory / step)
        raise OSError(errno.EIO, 'Input/output error')

  def batches(*args, **options):
    for number, batch in enumerate(from_files(*args, **options)):
      if number == 4 and signalled:
        signal.raise_signal(signal.SIGTERM)
      yield batch

  monkeypatch.setattr(checkpoint._Manager, 'wait_until_finished', fail)
  monkeypatch.setattr(pipeline, 'training_batches', batches)
  tiny_stage1.method = STAND_IN.partition('=')[2]
  tiny_stage1.train.steps = tiny_stage1.train.eval_every_steps = 6
  tiny_stage1.train.checkpoint_every_steps = 2
  two = len(failing) == 2
  ends = pytest.raises(SystemExit) if signalled else contextlib.nullcontext()
  with pytest.raises(OSError, match='Input/output') if two else ends:
    train(tiny_stage1, tmp_path / 'run')
  found = {path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()}
  assert not found if two else ('5' if signalled else '6') in found
  said = capsys.readouterr().out
  assert said.count('WARNING: the last checkpoint could not be saved ([Errno 5]') == 1


@pytest.mark.parametrize('step', ['6', '12'], ids=['before phase 2', 'the last'])
def test_a_save_that_is_waited_for_is_tried_again(step, tiny_stage1, tmp_path, monkeypatch, capsys):
  wait, failing = checkpoint._Manager.wait_until_finished, [step]

  def fail(manager):
    wait(manager)
    if failing and (manager.directory / step).exists():
      failing.clear()
      shutil.rmtree(manager.directory / step)
      try:
        raise OSError(errno.EIO, 'Input/output error')
      except OSError as error:
        raise RuntimeError('Barrier timed out\nwith more lines') from error

  monkeypatch.setattr(checkpoint._Manager, 'wait_until_finished', fail)
  tiny_stage1.method = STAND_IN.partition('=')[2]
  tiny_stage1.train.phase2_epoch = 1
  scores = train(tiny_stage1, tmp_path / 'run')
  assert not failing and np.isfinite(scores['miou'])
  said = capsys.readouterr().out
  assert 'WARNING: the last checkpoint could not be saved ([Errno 5] Input/output error)' in said
  assert 'phase 2 from step 6' in said
  with checkpoint.make_manager(tmp_path / 'run' / 'checkpoints', 2) as manager:
    assert manager.latest_step() == 12 and manager.metrics(12)


def test_a_signal_does_not_end_the_last_save(tiny_stage1, tmp_path, monkeypatch):
  wait, signals = checkpoint._Manager.wait_until_finished, [signal.SIGTERM]

  def signalled(manager):
    if signals:
      signal.raise_signal(signals.pop())
    wait(manager)

  def end(number, frame):  # as the command line does
    raise SystemExit(128 + number)

  monkeypatch.setattr(checkpoint._Manager, 'wait_until_finished', signalled)
  tiny_stage1.method = STAND_IN.partition('=')[2]
  tiny_stage1.train.steps = tiny_stage1.train.eval_every_steps = 1
  before = signal.signal(signal.SIGTERM, end)
  try:
    with pytest.raises(SystemExit) as ended:
      train(tiny_stage1, tmp_path / 'run')
  finally:
    signal.signal(signal.SIGTERM, before)
  assert ended.value.code == 0  # and not 143
  assert [f.name for f in (tmp_path / 'run' / 'checkpoints').iterdir()] == ['1']


def test_stage_2_without_masks_is_refused(tiny_stage2, tmp_path):
  with pytest.raises(UserError, match='aavs masks'):
    train(tiny_stage2, tmp_path)


def test_a_gradient_that_is_not_finite_stops_the_run_as_well(tmp_path):
  """It spoils the parameters, though the loss of its step is still good."""
  watch = Watch('abc', lambda: 2, epath.Path(tmp_path))
  watch.add(1, np.array([0, 1]), {'loss': 0.5, 'gradient_norm': 1.0})
  watch.add(2, np.array([2, 2, 1]), {'loss': 0.5, 'gradient_norm': np.inf})
  words = r'loss of step 2 is 0\.5 and its gradient inf on clips c, b; .* is .*/checkpoints/2:'
  with pytest.raises(FloatingPointError, match=words):
    watch.look()
