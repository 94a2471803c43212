"""Steps that are kept: found again where nothing has changed, and nowhere else."""

import os
import subprocess
import sys
import types
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from aavs_jax.configs import quick_stage1
from aavs_jax.devices.mesh import batch_sharding, make_mesh
from aavs_jax.training import programs
from aavs_jax.training.programs import Programs, step_name
from tests import runs
from tests.stand_in import STAND_IN


def _arguments(mesh):
  """A state and a batch of eight, as `_step` takes them."""
  places = NamedSharding(mesh, PartitionSpec()), batch_sharding(mesh)
  return jax.jit(lambda: (jnp.ones(3), jnp.arange(24.0).reshape(8, 3)), out_shardings=places)()


def _step(state, batch):
  return state + (batch @ state).sum(), {'loss': batch.mean()}


def _programs(folder, mesh=None, config=None):
  config = config or quick_stage1.get_config()
  return Programs(str(folder), epath.Path('work'), config, None, mesh or make_mesh())


def _keep(folder, mesh=None):
  """Keeps the step, and returns what it is kept under."""
  mesh, flops = mesh or make_mesh(), Future()
  flops.set_result(42)
  arguments = _arguments(mesh)
  name = step_name(1, 10, arguments)
  # What JAX has kept would not be compiled here, and could not be kept.
  compiled = jax.jit(_step, donate_argnums=0).lower(*arguments).compile()
  _programs(folder, mesh).keep_step(name, compiled, flops)
  return name


@pytest.fixture(scope='module')
def kept(tmp_path_factory):
  folder = tmp_path_factory.mktemp('programs')
  return folder, _keep(folder)


def test_a_step_is_found_with_its_flops_and_takes_over_the_state(kept):
  folder, name = kept
  step, flops = _programs(folder).step(name)
  assert flops == 42
  state, batch = _arguments(make_mesh())
  after, metrics = step(state, batch)
  np.testing.assert_array_equal(after, 277)
  assert metrics == {'loss': 11.5}
  assert state.is_deleted() and not batch.is_deleted()


def test_a_name_tells_phases_lengths_and_arguments_apart():
  state, batch = _arguments(make_mesh())
  elsewhere = jax.device_put(batch, NamedSharding(make_mesh(), PartitionSpec()))
  names = [
    step_name(1, 10, arguments)
    for arguments in (
      (state, batch), (state, batch[:4]), (state, batch.astype(int)), (state, elsewhere),
      (state, {'frames': batch}), ((state, batch),),
    )
  ]  # fmt: skip
  names += [step_name(2, 10, (state, batch)), step_name(1, 20, (state, batch))]
  assert len(set(names)) == len(names)
  assert step_name(1, 10, _arguments(make_mesh())) == names[0]


def test_what_a_step_was_made_of_must_be_the_same(kept, monkeypatch):
  folder, name = kept
  config = quick_stage1.get_config()
  config.loss.dice = 3.0
  assert _programs(folder, config=config).step(name) is None
  nowhere = Programs(None, epath.Path('work'), quick_stage1.get_config(), None, make_mesh())
  assert nowhere.step(name) is None
  with jax.numpy_dtype_promotion('strict'):
    assert _programs(folder).step(name) is None
  for place, value in (('_processor', lambda: 'another'), ('_FLAGS', ('PATH',))):
    monkeypatch.setattr(programs, place, value)
    assert _programs(folder).step(name) is None
    monkeypatch.undo()
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  assert _programs(folder).step(name) is None
  monkeypatch.undo()
  assert _programs(folder).step(name)


def test_damaged_or_out_of_reach_it_is_as_if_it_were_not_there(kept, tmp_path, capsys):
  _, name = kept
  (tmp_path / 'file').write_text('')
  _keep(tmp_path / 'file')  # no folder
  assert 'WARNING: the next start will have to compile anew' in capsys.readouterr().out
  assert _programs(tmp_path / 'file').step(name) is None
  _keep(tmp_path)
  (path,) = tmp_path.glob('aavs-step-*')
  content = path.read_bytes()
  flipped = content[:99] + bytes([content[99] ^ 1]) + content[100:]
  for damaged in (b'', content[:-9], flipped):
    path.write_bytes(damaged)
    assert _programs(tmp_path).step(name) is None
  path.write_bytes(content)
  assert _programs(tmp_path).step(name)


def test_it_is_kept_in_a_bucket_too(bucket):
  assert _programs(bucket).step(_keep(bucket))


def test_nothing_is_kept_of_code_that_cannot_be_read(tmp_path, monkeypatch, capsys):
  """Or its next version would not be noticed."""
  module = types.ModuleType('archived')
  module.__file__ = str(tmp_path / 'code.zip/archived.py')
  monkeypatch.setitem(sys.modules, 'archived', module)
  _keep(tmp_path)
  assert 'code.zip/archived.py' in capsys.readouterr().out
  assert not list(tmp_path.iterdir())


def test_nothing_is_kept_of_code_that_was_edited_since_it_was_loaded(tmp_path, monkeypatch):
  """Or the next process, which loads the new code, would run the old program."""
  source = tmp_path / 'edited.py'
  source.write_text('factor = 1')
  module = types.ModuleType('edited')
  module.__file__ = str(source)
  monkeypatch.setitem(sys.modules, 'edited', module)
  monkeypatch.setattr(programs.Programs, '_write', _edit_and_write(source, Programs._write))
  _keep(tmp_path / 'kept')
  assert not list(tmp_path.glob('kept/*'))


def _edit_and_write(source, write):
  def edited(self, name, content):
    source.write_text('factor = 2')
    write(self, name, content)

  return edited


def keep_and_find(folder, when):
  """Keeps a step, or finds it, in one of several processes; 'without': of which one has none."""
  mesh = make_mesh(fsdp=2)
  name = _keep(folder, mesh) if when == 'first' else step_name(1, 10, _arguments(mesh))
  kept = _programs(folder, mesh).step(name)
  if when == 'without':
    assert kept is None
  else:
    assert float(kept[0](*_arguments(mesh))[1]['loss']) == 11.5


# Its last argument is the step after which it is stopped.
STOPPED = """
import os, signal, sys
from aavs_jax import cli
from aavs_jax.training import metric_log

last, line = int(sys.argv.pop()), metric_log.step_line

def step_line(row, total):
  if row['step'] == last:
    os.kill(os.getpid(), signal.SIGTERM)
  return line(row, total)

metric_log.step_line = step_line
sys.exit(cli.main())
"""
MODULE = """
from tests.stand_in import *
from tests import stand_in

def method(config):
  plain = stand_in.method(config)
  def loss(*arguments):
    value, terms = plain.loss(*arguments)
    return {factor} * value, terms
  return plain._replace(loss=loss)
"""


def test_a_method_that_has_changed_is_compiled_anew(data_root, tmp_path):
  """In its file alone, which has the same length and time."""
  module, workdir = tmp_path / 'strange/method.py', tmp_path / 'work'
  module.parent.mkdir()
  environment = runs.environment(tmp_path / 'cache') | {
    'PYTHONPATH': f'{runs.ROOT}:{tmp_path}', 'PYTHONDONTWRITEBYTECODE': '1',
  }  # fmt: skip

  def train(factor, steps):
    """What it says, and the losses of all steps so far."""
    module.write_text(MODULE.format(factor=factor))
    os.utime(module, (1e9, 1e9))
    process = runs.start(
      workdir, data_root, environment, STAND_IN.replace('tests.stand_in', 'strange.method'),
      '--config.train.log_every_steps=1', str(steps), program=STOPPED,
    )  # fmt: skip
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output, [row['loss'] for row in runs.history(workdir) if row['kind'] == 'train']

  assert 'compiling the training step' in train(1, 2)[0]
  output, losses = train(1, 4)
  assert 'as an earlier run compiled it' in output
  output, more = train(3, 6)
  assert 'compiling the training step' in output
  assert more[4] > 2 * max(losses[2:])


def test_what_jax_has_found_was_not_compiled_anew(tmp_path):
  """And so is not kept, since on CPUs it would lack functions."""
  program = """
import jax
from aavs_jax.training.programs import compile_step
for anew in (True, False):
  step = jax.jit(lambda x: x.sort() + 1).lower(jax.ShapeDtypeStruct((9,), 'float32'))
  assert compile_step(step)[1] is anew
  jax.clear_caches()
"""
  subprocess.run(
    [sys.executable, '-c', program], env=runs.environment(tmp_path), cwd=runs.ROOT, check=True
  )


def test_each_phase_has_its_own(data_root, tmp_path):
  """Also where the same parameters train in both, whose rate alone is another."""
  folders = []
  for enabled in ('true', 'false'):
    environment = runs.environment(tmp_path / 'cache') | {'JAX_ENABLE_COMPILATION_CACHE': enabled}
    folders.append(tmp_path / enabled)
    process = runs.start(
      folders[-1], data_root, environment, STAND_IN, '--config.train.phase2_epoch=1',
      '--config.optimizer.lr_phase2=1e-2', '--config.train.trainable=(".*",)',
    )  # fmt: skip
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert output.count('compiling the training step') == 2, output
  runs.require_same(*folders)
  assert len(list((tmp_path / 'cache').glob('aavs-step-*'))) == 2
