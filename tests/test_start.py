"""What a stage starts from."""

import functools
import json
import os
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.random import normal

from aavs_jax import config as config_lib
from aavs_jax import methods
from aavs_jax.configs import quick_stage1
from aavs_jax.devices.mesh import make_mesh
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.train import train
from aavs_jax.training import checkpoint, metric_log
from aavs_jax.training.start import fill, first, load_start, start_lacks
from aavs_jax.training.state import create
from aavs_jax.training.work_folder import write_converted
from aavs_jax.types import Variables
from tests import runs, stand_in


@pytest.fixture(scope='module')
def work_folder(tmp_path_factory):
  """Of three checkpoints, in which a weight is the number of the step; step 2 is the best."""
  folder = tmp_path_factory.mktemp('run')
  (folder / 'config.json').write_text(config_lib.to_json(quick_stage1.get_config()))
  note = {
    'kind': 'mask2former', 'source': 'start', 'vggish': '', 'lacking': ['aavs/audio_projection/'],
    'names': [], 'unused': [],
  }  # fmt: skip
  (folder / checkpoint.CONVERTED).write_text(json.dumps(note))
  with checkpoint.make_manager(folder / 'checkpoints', 3) as manager:
    for step, score in ((1, 0.2), (2, 0.9), (3, 0.5)):
      state = create({'aavs/w': jnp.full(2, float(step))}, ['aavs/w'], optax.sgd(1.0), step)
      checkpoint.save(manager, state, 1, {'miou': score})
  return folder


@pytest.mark.parametrize(
  ('start', 'step'), [('.', 2), ('checkpoints', 2), ('checkpoints/3', 3), ('checkpoints/1', 1)]
)
def test_a_start_is_a_work_folder_or_checkpoints_of_it(start, step, work_folder):
  config = quick_stage1.get_config()
  config.train.init = str(work_folder / start)
  np.testing.assert_array_equal(load_start(config, methods.of(config))['aavs/w'], step)
  assert start_lacks(config) == ['aavs/audio_projection/']
  config.model.heads = 2
  with pytest.raises(UserError, match=r'config\.model\.heads is 2, but .* was trained with 4'):
    load_start(config, methods.of(config))


def test_a_start_that_is_no_checkpoint_is_named(work_folder):
  config = quick_stage1.get_config()
  for start in ('checkpoints/4', 'checkpoint'):
    config.train.init = str(work_folder / start)
    with pytest.raises(UserError, match=f'{start} holds no checkpoint'):
      load_start(config, methods.of(config))


def test_what_a_start_lacks_is_drawn_and_the_model_traced_once():
  config, traced = quick_stage1.get_config(), []

  def init(key):
    traced.append(key)
    given, lacking = jax.random.split(key)
    return Variables({'given': normal(given, (3,)), 'lacking': normal(lacking, (2,))}, {})

  method = types.SimpleNamespace(
    init=init, stage_specific=('lacking',), phase2_only=(), phase2_continues=False
  )
  key, mesh = jax.random.key(0), make_mesh()
  flat, lacking, _ = first(config, method, mesh, key, {'given': np.ones(3)})
  assert lacking == ['lacking'] and len(traced) == 1
  np.testing.assert_array_equal(flat['given'], 1)
  np.testing.assert_allclose(flat['lacking'], normal(jax.random.split(key)[1], (2,)), rtol=1e-5)
  flat, lacking, _ = first(config, method, mesh, key, {'given': np.ones(3), 'lacking': np.ones(2)})
  assert lacking == [] and len(traced) == 2
  np.testing.assert_array_equal(flat['lacking'], 1)


def test_what_waits_for_phase_2_is_drawn_where_the_start_is_of_phase_1():
  config = quick_stage1.get_config()
  config.train.phase2_epoch = 1

  def init(key):
    drawn = {'adapter': {'down': normal(key, (2,)), 'bias': jnp.zeros(1)}, 'rest': jnp.ones(3)}
    return Variables(drawn, {})

  method = types.SimpleNamespace(
    init=init, stage_specific=(), phase2_only=('^adapter/',), phase2_continues=False
  )
  zero = {'adapter/down': np.zeros(2), 'adapter/bias': np.zeros(1), 'rest': np.full(3, 2)}
  begin = functools.partial(first, config, method, make_mesh(), jax.random.key(0))
  flat, lacking, shapes = begin(zero)
  assert lacking == ['adapter/bias', 'adapter/down']
  assert flat['adapter/down'].all()
  np.testing.assert_array_equal(flat['rest'], 2)
  for given in (zero, None):  # past step 0 nothing else is drawn, and that with the same bits
    later, _, same = begin(given, resumed=True)
    assert later.keys() == {'adapter/down', 'adapter/bias'} and same == shapes
    np.testing.assert_array_equal(later['adapter/down'], flat['adapter/down'])
  learnt = {**zero, 'adapter/bias': np.ones(1)}
  flat, lacking, _ = begin(learnt)
  assert lacking == [] and not flat['adapter/down'].any()
  method.phase2_continues = True  # nothing is zero in its first phase
  assert begin(zero)[1] == []
  method.phase2_continues, del_bias = False, {path: zero[path] for path in ('adapter/down', 'rest')}
  with pytest.raises(UserError, match='adapter/bias is missing'):
    begin(del_bias)


class TestStart:
  def fresh(self):
    return {'aavs/queries/features': jnp.zeros((4, 2)), 'aavs/fc/kernel': jnp.zeros((2, 3))}

  def test_fills_all_but_what_is_specific_to_a_stage(self):
    start = {'aavs/queries/features': np.ones((6, 2)), 'aavs/fc/kernel': np.ones((2, 3))}
    params, lacking = fill(self.fresh(), start, ['aavs/queries/'])
    assert lacking == ['aavs/queries/features']
    np.testing.assert_array_equal(params['aavs/fc/kernel'], 1)
    np.testing.assert_array_equal(params['aavs/queries/features'], 0)

  @pytest.mark.parametrize(
    ('start', 'words'),
    [
      ({}, 'aavs/fc/kernel is missing'),
      ({'aavs/fc/kernel': np.ones((2, 4))}, r'of shape \(2, 4\), the model has \(2, 3\)'),
      ({'aavs/fc/kernel': np.ones((2, 3)), 'aavs/x': np.ones(1)}, 'aavs/x is unknown'),
    ],
  )
  def test_anything_else_is_refused_by_name(self, start, words):
    with pytest.raises(UserError, match=words):
      fill(self.fresh(), start, ['aavs/queries/'])


def test_what_a_start_lacks_is_drawn_for_phase_2_of_a_resumed_run_too(
  tiny_stage1, monkeypatch, tmp_path
):
  """With the same bits, and though the start has gone since that run began."""
  config, plain, line = tiny_stage1, stand_in.method, metric_log.step_line
  config.method, config.train.init = 'tests.stand_in', str(tmp_path / 'init')
  config.train.epochs, config.train.phase2_epoch, config.train.trainable = 2, 1, ('.*',)
  config.train.log_every_steps = 1
  waiting = 'aavs/queries/positions'
  monkeypatch.setattr(
    stand_in, 'method', lambda config: plain(config)._replace(phase2_only=(waiting,))
  )
  features = {'aavs/queries/features': np.ones((4, 2), np.float32)}
  note = {'kind': 'hearing', 'source': '', 'vggish': '', 'lacking': [waiting], 'names': [],
          'unused': []}  # fmt: skip
  write_converted(config.train.init, config, features, note)
  train(config, tmp_path / 'whole')

  def stop(row, total):
    if row['step'] == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return line(row, total)

  def remove(row, total):
    shutil.rmtree(config.train.init, ignore_errors=True)
    return line(row, total)

  monkeypatch.setattr(metric_log, 'step_line', stop)
  with pytest.raises(SystemExit):
    train(config, tmp_path / 'resumed')
  monkeypatch.setattr(metric_log, 'step_line', remove)
  train(config, tmp_path / 'resumed')
  runs.require_same(tmp_path / 'resumed', tmp_path / 'whole')
