"""TPAVI against recorded runs of its release, and piece by piece against its formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aavs_jax import methods
from aavs_jax.input_pipeline.avsbench import SemanticClip
from aavs_jax.input_pipeline.clips import IGNORE
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.methods import maps
from aavs_jax.models.tpavi import ResidualUnit, Tpavi
from aavs_jax.pytorch import maps_recordings
from aavs_jax.training import phases
from aavs_jax.training.state import flatten
from aavs_jax.types import Variables
from tests import parity, small_maps

ALL = set(parity.MAPS_TOLERANCES)
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  'name',
  (pytest.param('tpavi_s4', marks=SLOW), pytest.param('tpavi_ms3', marks=SLOW), 'tpavi_avss'),
)
def test_recorded_run(name):
  parity.require_maps(name, ALL)


def test_recorded_evaluation():
  """Of PVT-v2, which the recorded runs of this file that are not slow do not have."""
  errors = maps_recordings.evaluation_errors(parity.maps_recording('tpavi_s4'))
  for quantity, found in errors.items():
    assert max(found.values()) <= parity.MAPS_TOLERANCES[quantity], quantity


@pytest.mark.parametrize('name', ('tpavi_s4', pytest.param('tpavi_ms3', marks=SLOW), 'tpavi_avss'))
def test_bfloat16_gives_the_same_map(name):
  row = maps_recordings.bfloat16_row(parity.maps_recording(name))
  assert row.error < 0.05, row.where


def _numbers(module, *arguments):
  variables = module.init(jax.random.key(0), *arguments)
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: x if x.dtype == np.int32 else rng.random(x.shape, np.float32) + 0.1, variables
  )


def test_the_short_cut_is_the_matrix_of_all_positions():
  module = Tpavi(True, jnp.float32)
  rng = np.random.default_rng(1)
  f = rng.standard_normal((10, 3, 4, 8)).astype(np.float32)
  audio = rng.random((10, 6), np.float32)
  variables = _numbers(module, f, audio, False)
  params = {path: np.asarray(v) for path, v in flatten(Variables(variables['params'], {})).items()}
  z, s = module.apply(variables, f, audio, False)

  def pointwise(name, x):
    return x @ params[f'{name}/kernel'][0, 0, 0] + params[f'{name}/bias']

  np.testing.assert_allclose(s, audio @ params['align/kernel'] + params['align/bias'], rtol=1e-5)
  for clip in range(2):
    own = slice(5 * clip, 5 * clip + 5)
    positions = f[own].reshape(-1, 8)
    sound = np.repeat(np.asarray(s)[own], 12, 0)
    matrix = pointwise('theta', positions) @ pointwise('phi', sound).T / len(positions)
    y = pointwise('projection', matrix @ pointwise('g', positions))
    norm = {k: np.asarray(v) for k, v in variables['statistics']['projection_norm'].items()}
    y = (y - norm['mean']) / np.sqrt(norm['var'] + 1e-5)
    y = y * params['projection_norm/scale'] + params['projection_norm/bias'] + positions
    y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5)
    y = y * params['norm/scale'] + params['norm/bias']
    np.testing.assert_allclose(np.asarray(z)[own].reshape(-1, 8), y, rtol=1e-4, atol=1e-4)


def test_the_skip_of_a_residual_unit_carries_no_negative():
  module = ResidualUnit(jnp.float32)
  x = np.full((1, 2, 2, 3), -1, np.float32)
  variables = jax.tree.map(jnp.zeros_like, module.init(jax.random.key(0), x))
  np.testing.assert_array_equal(module.apply(variables, x), 0)


def test_clips_do_not_see_each_other_and_frames_of_a_clip_do():
  model = small_maps.model('tpavi')
  batch = small_maps.batch(model.config, 10)
  other = {**batch, 'frames': batch['frames'].copy()}
  other['frames'][7] = 255 - other['frames'][7]
  a, b = (model.outputs(each).logits for each in (batch, other))
  same = [np.array_equal(x, y) for x, y in zip(a, b)]
  assert same == [True] * 5 + [False] * 5


def test_the_matching_loss_of_ms3_is_a_sum_over_frames():
  model = small_maps.model('tpavi')
  config = small_maps.get_config('tpavi')
  config.loss.matching_weight = 0.5
  method = methods.of(config)
  outputs = model.outputs(small_maps.batch(config, 10))
  found = []
  for times in (1, 2):
    batch = small_maps.batch(config, 10)
    batch = {name: np.concatenate([value] * times) for name, value in batch.items()}
    repeated = jax.tree.map(lambda x: jnp.concatenate([x] * times), outputs)  # noqa: B023
    total, terms = method.loss(repeated, batch, method.totals(batch), None)
    np.testing.assert_allclose(total, terms['entropy'] + 0.5 * terms['matching'], rtol=1e-6)
    found.append(terms)
  np.testing.assert_allclose(found[1]['entropy'], found[0]['entropy'], rtol=1e-6)
  np.testing.assert_allclose(found[1]['matching'], 2 * found[0]['matching'], rtol=1e-5)


def test_frames_without_weight_count_in_no_loss():
  model = small_maps.model('tpavi')
  batch = small_maps.batch(model.config, 10)
  outputs = model.outputs(batch)
  batch['weight'] = np.array([1, 0, 0, 0, 0] * 2, np.float32)
  losses = []
  for kept in (1, batch['weight'].astype(np.uint8)[:, None, None]):
    changed = {**batch, 'labels': batch['labels'] * kept}
    losses.append(float(model.method.loss(outputs, changed, model.method.totals(batch), None)[0]))
  assert losses[0] == losses[1]


def test_a_prior_enters_the_last_features_alone():
  model, without = small_maps.model('tpavi', use_prior=True), small_maps.model('tpavi')
  assert 'prior' in model.method.inputs
  batch = small_maps.batch(model.config, 10)
  outputs = [
    model.outputs({**batch, 'prior': np.full_like(batch['prior'], value)}) for value in (0, 255)
  ]
  assert not np.allclose(outputs[0].logits, outputs[1].logits)
  for a, b in zip(outputs[0].features, outputs[1].features):
    np.testing.assert_array_equal(a, b)
  del batch['prior']
  np.testing.assert_array_equal(without.outputs(batch).logits, outputs[0].logits)


def test_a_clip_that_is_not_of_whole_units_is_refused():
  config = small_maps.get_config('tpavi')
  clips = [SemanticClip('', f'c{frames}', 'v2', 'train', frames) for frames in (10, 7)]
  with pytest.raises(UserError, match=r'v2/c7 has 7 frames, but tpavi sees 5 of a clip together'):
    phases.require_whole(config, clips, methods.of(config).unit)
  phases.require_whole(config, clips[:1], 5)


def test_ignored_pixels_sound_nowhere_and_count_as_if_certain():
  labels = np.array([[[0, 2], [IGNORE, 1]]], np.uint8)
  np.testing.assert_array_equal(maps.sounding(labels), [[[0, 1], [0, 1]]])
  # Three of four pixels are as likely to be of any of five classes.
  logits = np.zeros((1, 2, 2, 5), np.float32)
  assert maps.class_entropy(logits, labels) == pytest.approx(0.75 * np.log(5), rel=1e-6)
