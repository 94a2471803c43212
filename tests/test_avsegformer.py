"""AVSegFormer against recorded runs of its release, and its phases."""

import jax
import numpy as np
import pytest

from aavs_jax import config as config_lib
from aavs_jax import methods
from aavs_jax.devices.mesh import make_mesh
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.methods import maps
from aavs_jax.methods.avsegformer import dice
from aavs_jax.pytorch import maps_recordings
from aavs_jax.training import phases
from tests import parity, small_maps

TOLERANCES = parity.MAPS_TOLERANCES
ALL = set(TOLERANCES)
FROZEN = {'frozen: losses of the steps', 'frozen: changes, elements that are off'}
NO_STATISTICS = ALL - {'running statistics'}  # with PVT-v2
SLOW = pytest.mark.slow
FILES = {
  'avsegformer_s4': ALL,
  'avsegformer_ms3': NO_STATISTICS,
  'avsegformer_avss': NO_STATISTICS,
}
NAMES = (
  'avsegformer_s4',
  pytest.param('avsegformer_ms3', marks=SLOW),
  pytest.param('avsegformer_avss', marks=SLOW),
)


@pytest.mark.parametrize('name', NAMES)
def test_recorded_run(name):
  parity.require_maps(name, FILES[name])


def test_recorded_steps_of_a_backbone_that_is_frozen_at_first():
  parity.require_maps('avsegformer_s4', FROZEN, frozen=True)


@pytest.mark.slow
def test_recorded_steps_of_a_backbone_that_is_frozen_at_first_near_a_kink():
  """Rounding decides on which side of it a step goes: noise of that size finds the recorded one."""
  recording = parity.maps_recording('avsegformer_ms3')
  rng = np.random.default_rng(0)
  shares = []
  with jax.default_matmul_precision('highest'):
    train = maps_recordings.compiled(recording)
    for _ in range(6):
      noisy = {
        path: value * (1 + 1e-7 * rng.standard_normal(value.shape)).astype(np.float32)
        if value.dtype == np.float32
        else value
        for path, value in recording.begin.items()
      }
      noisy = recording._replace(begin=noisy)
      taken = maps_recordings.take_steps(noisy, train, frozen=1)
      errors = maps_recordings.frozen_errors(noisy, taken)
      assert max(errors['losses of the steps'].values()) <= TOLERANCES['losses of the steps']
      shares += errors['changes, elements that are off'].values()
  assert min(shares) <= TOLERANCES['changes, elements that are off']


@pytest.mark.parametrize('name', NAMES)
def test_bfloat16_gives_the_same_map(name):
  row = maps_recordings.bfloat16_row(parity.maps_recording(name))
  assert row.error < 0.05, row.where


def test_dice_of_an_empty_truth_is_one_whatever_is_predicted():
  logits = np.array([[[-30.0, -30.0]], [[3.0, -1.0]]])
  found = np.asarray(dice(logits, np.zeros((2, 1, 2))))
  np.testing.assert_allclose(found, 1, atol=1e-6)
  p = 1 / (1 + np.exp(-logits[1]))
  truth = np.array([[1.0, 0.0]])
  wanted = 1 - 2 * (p * truth).sum() / ((p * p).sum() + 1 + 0.002)
  np.testing.assert_allclose(dice(logits[1:], truth[None])[0], wanted, rtol=1e-6)


def test_one_frame_is_a_batch():
  """Which the release cannot do."""
  model = small_maps.model('avsegformer')
  batch = small_maps.batch(model.config, 3)
  whole = model.outputs(batch).logits
  one = model.outputs({name: value[1:2] for name, value in batch.items()}).logits
  np.testing.assert_allclose(one[0], whole[1], rtol=1e-4, atol=1e-5)


def test_the_backbone_waits_and_the_others_go_on():
  """Phase 2 takes over weights and moments; what was frozen counts its steps from there."""
  config = small_maps.get_config('avsegformer', 'resnet')
  config.model.dropout = 0.0
  method, mesh = methods.of(config), make_mesh(1, jax.devices()[:1])
  batch, key = small_maps.batch(config, 5), jax.random.key(0)
  first = small_maps.numbers(method)
  one, two = (phases.build(config, method, mesh, number, 2) for number in (1, 2))
  state, _ = one.step(one.begin(first), batch, key)
  flat, moments = jax.device_get((state.flat, state.opt_state))
  moved = {path for path in flat if np.any(flat[path] != first[path])}
  assert 'avsegformer/query_mlp0/kernel' in moved and 'vggish/conv0/kernel' not in moved
  # Frozen are parameters; BatchNorm measures all the same.
  assert {path for path in moved if 'backbone' in path} == {
    path for path in flat if path.startswith('statistics/backbone/stage')
    or path.startswith('statistics/backbone/stem')
  }  # fmt: skip
  state = two.begin(first, flat, moments, step=1)
  for path in flat:
    np.testing.assert_array_equal(state.flat[path], flat[path], err_msg=path)
  counts = {
    jax.tree_util.keystr(path): int(leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    if 'count' in jax.tree_util.keystr(path)
  }
  assert {('late' in path, count) for path, count in counts.items()} == {(False, 1), (True, 0)}
  state, _ = two.step(state, batch, key)
  path = 'backbone/stem/kernel'
  change = np.abs(np.asarray(state.flat[path]) - flat[path])
  # Adam's first step is one learning rate.
  assert np.quantile(change, 0.9) == pytest.approx(config.optimizer.lr_phase2, rel=1e-2)
  assert not any('spare' in path for path in state.trained)


def test_resnet_computes_its_blocks_again_if_told_to():
  config = small_maps.get_config('avsegformer', 'resnet')
  frames = small_maps.batch(config, 2)['frames'] / 255

  def gradients(remat):
    config.model.remat = remat
    backbone = maps.backbone_of(config)
    variables = backbone.init(jax.random.key(0), frames, False)

    def loss(params):
      held = {**variables, 'params': params}
      out, new = backbone.apply(held, frames, True, mutable=['statistics'])
      return sum((x**2).sum() for x in out), new

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    assert ('remat' in str(step.trace(variables['params']).jaxpr)) == (remat == 'full')
    return step(variables['params'])

  jax.tree.map(
    lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4),
    gradients('full'),
    gradients('dots'),
  )


@pytest.mark.parametrize(
  ('key', 'value', 'words'),
  [('model.heads', 5, 'must divide the width 32'), ('optimizer.schedule', 'cosine', 'use constant'),
   ('train.frozen_dtype', 'bfloat16', 'use float32'), ('data.image_size', 40, 'multiple of 32'),
   ('model.head', (4,), 'give the widths of two convolutions'),
   ('model.backbone.kind', 'vgg', "use one of ('pvt_v2', 'resnet')"),
   ('model.backbone.reductions', (16, 4, 2, 1), 'use divisors of the maps, which are [8, 4,')],
)  # fmt: skip
def test_values_that_cannot_work_are_refused(key, value, words):
  config = small_maps.get_config('avsegformer')
  config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError) as refusal:
    config_lib.check(config)
  assert f'config.{key} is {value!r}' in str(refusal.value) and words in str(refusal.value)
