"""What is said of a checkpoint that cannot be read."""

import errno
import os

import jax.numpy as jnp
import optax
import pytest
from etils import epath

from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.training import checkpoint
from aavs_jax.training.state import create


@pytest.fixture
def saved(tmp_path):
  """A manager with one checkpoint, its abstract state, and its folder."""
  state = create({'a': jnp.arange(4.0)}, ['a'], optax.sgd(0.1), step=3)
  manager = checkpoint.make_manager(tmp_path, 2)
  checkpoint.save(manager, state, 1, None)
  manager.wait_until_finished()
  yield manager, state, tmp_path / '3'
  manager.close()


def test_a_damaged_one_is_named_and_may_be_removed(saved):
  manager, state, folder = saved
  for path in folder.glob('state/**/*'):
    if path.is_file() and 'ocdbt' not in path.name:
      path.write_bytes(b'')
  with pytest.raises(UserError, match=r'checkpoint .*/3 cannot be read .* remove it to go on'):
    checkpoint.restore(manager, 3, state)


def test_half_a_one_is_named_by_its_step(saved):
  _, _, folder = saved
  (folder / 'state' / '_METADATA').unlink()
  with pytest.raises(UserError, match=r'/3 cannot be read .*_METADATA.* remove it to go on'):
    checkpoint.load_flat(folder.parent)


@pytest.mark.parametrize(
  'error', [OSError('Forbidden: https://bucket'), ValueError('PERMISSION_DENIED: https://bucket')]
)
def test_one_that_an_account_may_not_read_is_not_damaged(error, saved, monkeypatch):
  manager, state, _ = saved

  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(manager, 'restore', fail)
  with pytest.raises(type(error)) as raised:
    checkpoint.restore(manager, 3, state)
  assert raised.value is error


def test_no_checkpoint_is_taken_for_missing_while_the_disk_fails(saved, monkeypatch):
  folder, stat = epath.Path(saved[2].parent), os.stat

  def fail(path, *args, **kwargs):
    if str(path) == str(folder):
      raise OSError(errno.EIO, 'Input/output error', str(path))
    return stat(path, *args, **kwargs)

  assert checkpoint.latest_step(folder) == 3
  monkeypatch.setattr(os, 'stat', fail)
  with pytest.raises(OSError, match='Input/output error'):  # and a training would begin at step 0
    checkpoint.latest_step(folder)
  monkeypatch.undo()
  assert checkpoint.latest_step(folder / 'none') is None


def test_scores_may_come_after_the_save(saved):
  manager, state, folder = saved
  assert manager.best_step() is None
  (folder / 'metrics.orbax-checkpoint-tmp').mkdir()  # killed when it tried before
  checkpoint.add_metrics(manager, 3, {'miou': 0.5})
  assert manager.best_step() == 3 and manager.metrics(3) == {'miou': 0.5}
  with checkpoint.make_manager(folder.parent, 1) as later:
    assert later.metrics(3) == {'miou': 0.5}
    checkpoint.save(later, state.replace(step=4), 1, {'miou': 0.25})
    checkpoint.save(later, state.replace(step=5), 1, None)
    later.wait_until_finished()
    assert list(later.all_steps()) == [3, 5]  # the best and the newest
  assert checkpoint.load_flat(folder.parent)[1] == 3


def test_the_best_one_is_what_the_first_process_finds(saved, monkeypatch):
  """The others may have listed a bucket before it wrote metrics there."""
  manager, _, _ = saved
  monkeypatch.setattr(checkpoint.distributed, 'gather', lambda own: [[2, {'miou': 0.5}], own])
  assert checkpoint.best(manager) == (2, {'miou': 0.5})


def test_looking_for_the_latest_touches_nothing(saved):
  _, _, folder = saved
  half = folder.parent / '5.orbax-checkpoint-tmp'
  half.mkdir()
  (half / 'data').write_text('being written')
  assert checkpoint.latest_step(epath.Path(folder.parent)) == 3
  assert (half / 'data').read_text() == 'being written'
  assert checkpoint.latest_step(epath.Path(folder.parent / 'none')) is None
  assert not (folder.parent / 'none').exists()


@pytest.mark.parametrize(
  'error',
  [
    OSError(errno.EIO, 'Input/output error'),
    ConnectionResetError('reset by peer'),
    ValueError('UNAVAILABLE: CURL error: could not connect'),
    ValueError('UNKNOWN: Error reading "a/.zarray" [OS error 5: EIO Input/output error]'),
    ValueError('INTERNAL: HTTP response code: 500'),
  ],
)
def test_a_failing_disk_or_network_is_no_reason_to_remove_it(saved, error, monkeypatch):
  manager, state, _ = saved

  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(manager, 'restore', fail)
  with pytest.raises(OSError) as raised:
    checkpoint.restore(manager, 3, state)
  assert 'remove' not in str(raised.value)
