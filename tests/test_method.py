"""A method of one's own, in this file alone: a convolution, BatchNorm and binary cross-entropy.

It sees the five frames of a clip together. All that a method has to do with runs on it: training,
stopping and going on, validation, several devices, evaluation, compilation for a TPU.
"""

import importlib.util
import json
import os
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from aavs_jax import config as config_lib
from aavs_jax import methods, train
from aavs_jax.configs import base
from aavs_jax.devices.mesh import make_mesh
from aavs_jax.evaluate import evaluate
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.methods.method import Method
from aavs_jax.perf import aot, bench
from aavs_jax.training import checkpoint, metric_log, phases
from aavs_jax.training.state import flatten, unflatten
from aavs_jax.types import Variables
from tests import runs

NAME = 'tests.test_method'
UNIT = 5
MAY_BE_ZERO = ()


def get_config():
  config = base.get_config()
  config.method = NAME
  config.model = ml_collections.ConfigDict(dict(width=4))
  config.loss = ml_collections.ConfigDict(dict(weight=2.0))
  del config['vggish']
  config.data.image_size = config.data.eval_size = 32
  config.data.item_frames = UNIT
  config.data.batch_items = 2
  config.optimizer.clip_norm = 0.0
  config.train.epochs = 2.0
  config.train.phase2_epoch = 0
  config.train.trainable = (r'.*',)
  config.train.checkpoint_every_steps = 4
  config.train.log_every_steps = 1
  return config


def check(config, need):
  need('model.width', config.model.width % 2 == 0, 'use an even number')


class Network(nn.Module):
  width: int

  @nn.compact
  def __call__(self, frames, train):
    h = nn.Conv(self.width, (3, 3), use_bias=False, name='first')(frames.astype(jnp.float32) / 255)
    h = nn.BatchNorm(use_running_average=not train, momentum=0.9, name='norm')(h)
    h = nn.relu(h)
    clips = h.reshape(-1, UNIT, *h.shape[1:])
    h = (clips + clips.mean(1, keepdims=True)).reshape(h.shape)
    return nn.Conv(1, (1, 1), name='last')(h)[..., 0]


def method(config) -> Method:
  network = Network(config.model.width)

  def init(key):
    variables = network.init(key, jnp.zeros((UNIT, 32, 32, 3)), True)
    return Variables(variables['params'], variables['batch_stats'])

  def apply(variables, batch, key=None):
    variables = {'params': variables.params, 'batch_stats': variables.statistics}
    outputs, new = network.apply(
      variables, batch['frames'], key is not None, mutable=['batch_stats']
    )
    return outputs, new['batch_stats']

  def totals(batch):
    return jnp.full(batch['weight'].shape, jnp.maximum(batch['weight'].sum(), 1))

  def loss(outputs, batch, totals, key):
    sounding = (batch['labels'] == 1).astype(jnp.float32)
    wrong = optax.losses.sigmoid_binary_cross_entropy(outputs, sounding).mean((1, 2))
    entropy = config.loss.weight * (wrong * batch['weight'] / totals).sum()
    return entropy, {'entropy': entropy}

  def predict(outputs):
    return jnp.stack([-outputs, outputs], 1)

  return Method(init, apply, totals, loss, predict, inputs=('frames',), unit=UNIT)


@pytest.fixture
def config(data_root):
  config = get_config()
  config.data.root = data_root
  return config


def _flat(workdir):
  return checkpoint.load_flat(workdir)[0]


@pytest.fixture(scope='module')
def whole(data_root, tmp_path_factory):
  """The work folder of a run that nothing interrupts."""
  config, folder = get_config(), tmp_path_factory.mktemp('whole')
  config.data.root = data_root
  train.train(config, folder)
  return folder


def test_it_trains_and_its_statistics_are_those_of_the_frames(whole):
  rows = [row for row in runs.history(whole) if row['kind'] == 'train']
  assert rows[-1]['loss'] < rows[0]['loss']
  assert rows[0]['loss'] == rows[0]['loss_entropy']
  flat = _flat(whole)
  assert set(flat) == {
    'first/kernel', 'norm/scale', 'norm/bias', 'last/kernel', 'last/bias',
    'statistics/norm/mean', 'statistics/norm/var',
  }  # fmt: skip
  assert (flat['statistics/norm/mean'] != 0).all() and (flat['statistics/norm/var'] != 1).all()


def test_stopped_and_resumed_it_ends_with_the_same_bits(whole, config, monkeypatch, tmp_path):
  line = metric_log.step_line

  def step_line(row, total):
    if row['step'] == 5:
      os.kill(os.getpid(), signal.SIGTERM)
    return line(row, total)

  monkeypatch.setattr(metric_log, 'step_line', step_line)
  with pytest.raises(SystemExit):
    train.train(config, tmp_path)
  assert runs.state(tmp_path)[0] == 5
  monkeypatch.undo()
  monkeypatch.setattr(train.start, 'first', None)  # a checkpoint has all numbers: none are drawn
  train.train(config, tmp_path)
  runs.require_same(tmp_path, whole)


def test_it_is_scored_with_the_running_statistics(whole, config, data_root, tmp_path):
  result = evaluate(whole, data=data_root, out=tmp_path / 'r.json')
  assert 0 < result['overall']['miou'] < 1 and result['clips'] == 5
  # As validation has scored the same numbers; a batch's own statistics would give others.
  (best,) = [
    row for row in runs.history(whole)
    if row['kind'] == 'val' and row['step'] == result['checkpoint_step']
  ]  # fmt: skip
  again = evaluate(whole, data=data_root, out=tmp_path / 'v.json', split='val')
  assert again['overall']['miou'] == best['miou']
  made, flat = methods.of(config), _flat(whole)
  frames = np.random.default_rng(0).integers(0, 256, (UNIT, 32, 32, 3), np.uint8)
  other = {p: v + (p == 'statistics/norm/mean') for p, v in flat.items()}
  (a, same), (b, _) = (
    made.apply(unflatten(numbers), {'frames': frames}) for numbers in (flat, other)
  )
  assert not np.allclose(a, b)
  np.testing.assert_array_equal(same['norm']['mean'], flat['statistics/norm/mean'])


def test_eight_devices_have_the_statistics_of_the_whole_batch(config, data_root, tmp_path):
  found = []
  for devices in (1, 8):
    folder = tmp_path / str(devices)
    environment = runs.environment(tmp_path / 'cache') | {'JAX_NUM_CPU_DEVICES': str(devices)}
    process = runs.start(
      folder, data_root, environment, '--config.data.batch_items=8', '--config.train.epochs=2',
      config='tests/test_method.py',
    )  # fmt: skip
    output = process.communicate()[0]
    assert process.returncode == 0 and f'{devices} cpu device' in output, output
    losses = [row['loss'] for row in runs.history(folder) if row['kind'] == 'train']
    found.append((losses, runs.state(folder)[1]['statistics']))
  assert set(found[0][1]) == {'statistics/norm/mean', 'statistics/norm/var'}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found)


def test_parts_of_a_batch_are_whole_clips():
  config = get_config()
  made = methods.of(config)
  batch = bench.random_batch(config, 20)
  frames = np.asarray(batch['frames']).copy()
  seen = []

  def spying(variables, batch, key=None):
    jax.debug.callback(lambda x: seen.append(np.asarray(x)), batch['frames'])
    return made.apply(variables, batch, key)

  config.train.accumulate = 2
  built = phases.build(config, made._replace(apply=spying), make_mesh(1, jax.devices()[:1]), 1, 1)
  first = flatten(made.init(jax.random.key(0)))
  built.step(built.begin(first), batch, jax.random.key(1))
  jax.effects_barrier()
  parts = {part.tobytes() for part in seen}
  clips = frames.reshape(4, 5, 32, 32, 3)
  assert parts == {clips[[0, 2]].tobytes(), clips[[1, 3]].tobytes()}


def test_what_does_not_fit_the_unit_is_refused(config, tmp_path):
  config.data.item_frames = 1
  with pytest.raises(UserError, match=r'item_frames is 1: the method sees 5 frames'):
    config_lib.check(config)
  config.data.item_frames = 5
  config.model.width = 3
  with pytest.raises(UserError, match=r'config\.model\.width is 3: use an even number'):
    config_lib.check(config)


def test_its_config_comes_back_without_another_methods_keys(whole):
  kept = json.loads((whole / 'config.json').read_text())
  found = config_lib.from_json(whole / 'config.json')
  assert found.to_dict().keys() == kept.keys() and 'vggish' not in kept
  assert found.model.to_dict() == {'width': 4}


@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='no TPU compiler')
def test_it_compiles_for_a_slice():
  config = get_config()
  found = aot.aot(config, 'v5e:2x4', UNIT)
  # Statistics are sums over all chips, forward and backward, beside those of the gradients.
  assert set(found['train']['collectives']) == {'all-reduce'}
  assert not found['predict']['collectives']
  with pytest.raises(UserError, match='multiple of 5'):
    aot.aot(config, 'v5e:2x4', 1)
