"""Training as a whole: interrupted anywhere it ends with the same bits; faults stop it clearly."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from aavs_jax.input_pipeline.errors import UserError

from aavs_jax import checkpoint
from aavs_jax.train import train

ROOT = Path(__file__).parents[1]
STEPS = 12  # 12 items, 2 a batch, 2 epochs


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
  """Compiled programs are shared by the processes of this module."""
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('cache')),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


@pytest.fixture(scope='module')
def start(environment, data_root):
  """Starts the command line's training into a folder, in a process of its own."""

  def run(workdir, *overrides):
    command = [
      sys.executable, '-m', 'aavs_jax.cli', 'train', '--config', 'tests/tiny.py:stage1',
      '--data', data_root, '--workdir', str(workdir), *overrides,
    ]  # fmt: skip
    return subprocess.Popen(
      command,
      cwd=ROOT,
      env=environment,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )

  return run


@pytest.fixture(scope='module')
def uninterrupted(start, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('uninterrupted')
  process = start(workdir, '--profile', '3:5')
  output = process.communicate()[0]
  assert process.returncode == 0, output
  return workdir


def _state(workdir):
  """Everything the newest checkpoint holds, as numpy."""
  with checkpoint.make_manager(workdir / 'checkpoints', 2) as manager:
    step = manager.latest_step()
  return step, checkpoint.read_arrays(workdir / 'checkpoints' / str(step) / 'state')


def _history(workdir):
  """Log lines without what depends on the clock."""
  clock = (
    'time', 'step_seconds', 'frames_per_second', 'tflops_per_second', 'input_wait', 'eta_seconds',
  )  # fmt: skip
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return [{key: value for key, value in row.items() if key not in clock} for row in rows]


def _logged(workdir):
  path = workdir / 'metrics.jsonl'
  return path.read_text().count('"train"') if path.exists() else 0


def _saving(workdir):
  return any('tmp' in path.name for path in (workdir / 'checkpoints').glob('*'))


def _wait(process, condition, seconds=120):
  end = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < end, 'the moment to interrupt never came'
    time.sleep(0.002)


def test_killed_at_any_moment_it_ends_with_the_same_bits(start, uninterrupted, tmp_path):
  moments = [
    lambda: _logged(tmp_path) >= 2,  # before the first checkpoint
    lambda: _saving(tmp_path),  # in the middle of a save
    lambda: _logged(tmp_path) >= 6,
    lambda: _saving(tmp_path) and _logged(tmp_path) >= 10,
  ]
  for moment in moments:
    process = start(tmp_path)
    _wait(process, moment)
    process.kill()
    process.communicate()
  process = start(tmp_path)
  output = process.communicate()[0]
  assert process.returncode == 0, output
  assert 'going on from step' in output

  (step, found), (expected_step, expected) = _state(tmp_path), _state(uninterrupted)
  assert step == expected_step == STEPS
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_array_equal(a, b)
  assert _history(tmp_path) == _history(uninterrupted)


def test_a_trace_holds_the_steps_that_it_was_asked_for(uninterrupted):
  (path,) = (uninterrupted / 'profile').rglob('*.xplane.pb')
  trace = jax.profiler.ProfileData.from_file(str(path))
  found = []
  for plane in trace.planes:
    for line in plane.lines:
      found += [dict(event.stats)['step_num'] for event in line.events if event.name == 'train']
  assert sorted(found) == [3, 4]


def test_a_finished_run_is_not_trained_again(start, uninterrupted):
  before = (uninterrupted / 'metrics.jsonl').read_text()
  process = start(uninterrupted)
  output = process.communicate()[0]
  assert process.returncode == 0 and 'best validation mIoU' in output
  assert (uninterrupted / 'metrics.jsonl').read_text() == before


def test_sigterm_saves_and_ends_well(start, uninterrupted, tmp_path):
  process = start(tmp_path, '--config.data.workers=1')
  _wait(process, lambda: _logged(tmp_path) >= 2)
  process.send_signal(signal.SIGTERM)
  output = process.communicate(timeout=30)[0]
  assert process.returncode == 0 and 'stopped by a signal at step' in output
  assert 'Traceback' not in output and 'leaked' not in output
  step, _ = _state(tmp_path)
  assert f'at step {step};' in output


def test_the_newest_and_the_best_checkpoint_are_kept(uninterrupted):
  scores = {row['step']: row['miou'] for row in _history(uninterrupted) if row['kind'] == 'val'}
  best = max(scores, key=lambda step: (scores[step], step))
  with checkpoint.make_manager(uninterrupted / 'checkpoints', 2) as manager:
    assert checkpoint.best_step(manager) == best
    assert set(manager.all_steps()) == {best, 8, STEPS}
  assert checkpoint.load_params(uninterrupted)[1] == best


def test_another_config_in_the_same_folder_is_refused(start, uninterrupted):
  process = start(uninterrupted, '--config.optimizer.lr=0.5')
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


def test_two_phases(tiny_stage1, tmp_path):
  config = tiny_stage1
  config.seed = 3  # of this one the best validation of phase 1 is not its last
  config.train.epochs = 1.5
  config.train.phase2_epoch = 1
  config.train.eval_every_epochs = 0.34
  config.train.trainable = ('adapter/', 'class_predictor', 'audio_projection')
  config.train.frozen_dtype = 'bfloat16'
  config.train.checkpoint_every_steps = 1
  config.train.keep_checkpoints = 100
  config.optimizer.lr = 0.3  # so that validations differ
  config.optimizer.lr_phase2 = 0.0  # so that phase 2 shows what it began with
  config.model.decoder_layers = 0  # what is compiled twice should be small
  train(config, tmp_path)

  _check_pace(tmp_path)
  rows = [row for row in _history(tmp_path) if row['kind'] == 'val' and row['step'] <= 6]
  best = max(rows, key=lambda row: (row['miou'], row['step']))['step']
  assert len(rows) == 3 and best != 6, 'the best weights of phase 1 are its last: shows nothing'
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


def test_stage_2_without_masks_is_refused(tiny_stage2, tmp_path):
  with pytest.raises(UserError, match='aavs masks'):
    train(tiny_stage2, tmp_path)
