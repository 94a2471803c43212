"""What the recorded runs do not show: frames of weight 0 and padded targets take no part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aavs_jax import methods
from aavs_jax.configs import base
from aavs_jax.methods import set_loss
from aavs_jax.methods.matching import Targets, sample_targets
from aavs_jax.methods.set_loss import PointDraws, draw_points
from aavs_jax.models.mask_decoder import Outputs
from tests import tiny

SETS, FRAMES, QUERIES, CLASSES = 2, 3, 5, 4
LOSS = base.get_config().loss
LOSS.points = 8


@functools.partial(jax.jit, static_argnames='sampling')
def run(outputs, targets, draws, totals=None, *, sampling='gather'):
  """The loss with draws of all sets (a leading axis)."""
  totals = set_loss.totals(targets, QUERIES, LOSS) if totals is None else totals
  draw = lambda index: jax.tree.map(lambda leaf: leaf[index], draws)  # noqa: E731
  return set_loss.loss(outputs, targets, draw, totals, LOSS, sampling)


def outputs_of(masks, classes):
  """Outputs with these masks: features that are all of them, of which each set embeds its own."""
  masks = jnp.asarray(masks)
  features = jnp.moveaxis(masks, 1, 0).reshape(FRAMES, SETS * QUERIES, 6, 6)
  embeddings = jnp.eye(SETS * QUERIES).reshape(SETS, 1, QUERIES, -1)
  embeddings = jnp.broadcast_to(embeddings, (SETS, FRAMES, *embeddings.shape[2:]))
  return Outputs(jnp.asarray(classes), embeddings, jnp.moveaxis(features, 1, -1))


def draw_all(key, targets):
  of_sets = [draw_points(key, s, jnp.arange(FRAMES), targets, LOSS) for s in range(SETS)]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_sets)


@pytest.fixture(scope='module')
def case():
  rng = np.random.default_rng(0)
  outputs = outputs_of(
    rng.standard_normal((SETS, FRAMES, QUERIES, 6, 6)).astype(np.float32),
    rng.standard_normal((SETS, FRAMES, QUERIES, CLASSES + 1)).astype(np.float32),
  )
  labels = jnp.asarray(rng.integers(0, 2, (FRAMES, 12, 12)) * 2, jnp.uint8)
  classes, group = jnp.asarray([[0, 2]] * FRAMES), jnp.zeros(FRAMES, int)
  targets = Targets(labels, classes, jnp.ones(FRAMES), group)
  return outputs, targets, draw_all(jax.random.key(0), 2)


def _frames(tree, chosen, axis):
  return jax.tree.map(lambda leaf: jnp.take(leaf, jnp.asarray(chosen), axis=axis), tree)


def _of(outputs, chosen):
  features = _frames(outputs.mask_features, chosen, 0)
  return _frames(outputs, chosen, 1).replace(mask_features=features)


def test_frames_of_weight_0_take_no_part(case):
  outputs, targets, draws = case
  masked = targets.replace(weight=jnp.asarray([1.0, 0.0, 1.0]))
  total, _ = run(outputs, masked, draws)
  alone, _ = run(
    _of(outputs, [0, 2]), _frames(targets, [0, 2], 0), _frames(draws, [0, 2], 1),
  )  # fmt: skip
  whole, _ = run(outputs, targets, draws)
  assert total == pytest.approx(float(alone), rel=1e-5)
  assert abs(float(total) - float(whole)) > 1e-3


@pytest.mark.parametrize('real_share', [0.0, 0.3, 1.0])  # no round, one, three
def test_targets_in_rounds_have_the_losses_and_gradients_of_each_alone(real_share):
  targets = 8
  rng = np.random.default_rng(0)
  masks = jnp.asarray(rng.standard_normal((FRAMES, targets, 6, 6)), jnp.float32)
  labels = jnp.asarray(rng.integers(0, 3, (FRAMES, 12, 12)), jnp.uint8)
  classes = jnp.asarray(rng.integers(0, 3, (FRAMES, targets)))
  real = jnp.asarray(rng.random((FRAMES, targets)) < real_share)
  draws = draw_points(jax.random.key(0), 0, jnp.arange(FRAMES), targets, LOSS)
  points = draws.candidates, draws.extra
  run = functools.partial(set_loss.mask_losses, LOSS, 'gather')
  losses, pull = jax.vjp(lambda masks: run(masks, labels, classes, real, *points), masks)
  weights = [jnp.asarray(rng.standard_normal(real.shape), jnp.float32) for _ in losses]
  (gradient,) = pull(tuple(weights))

  def alone(masks, label, value, candidates, extra):
    points = set_loss._loss_points(jax.lax.stop_gradient(masks), candidates, extra, LOSS, 'gather')
    truth = sample_targets(label, value, points)
    return set_loss._at_points(masks, points, truth, 'gather')

  for n, k in np.ndindex(*real.shape):
    one = (slice(n, n + 1), slice(k, k + 1))
    given = labels[one[0]], classes[one], *(each[one] for each in points)
    expected, pull_one = jax.vjp(lambda masks: alone(masks, *given), masks[one])  # noqa: B023
    (by_mask,) = pull_one(tuple(weight[one] for weight in weights))
    for found, value in zip((*losses, gradient), (*expected, by_mask)):
      np.testing.assert_allclose(found[one], value * real[n, k], atol=1e-6)


def test_the_losses_of_parts_add_up_to_that_of_the_whole(case):
  outputs, targets, draws = case
  classes, group = jnp.asarray([[0, 2], [2, -1], [0, 2]]), jnp.asarray([0, 0, 2])
  targets = targets.replace(classes=classes, group=group)
  totals = set_loss.totals(targets, QUERIES, LOSS)
  whole, _ = run(outputs, targets, draws)
  parts = [
    run(_of(outputs, part), _frames(targets, part, 0), _frames(draws, part, 1),
        _frames(totals, part, 0))[0]
    for part in ([0, 2], [1])
  ]  # fmt: skip
  assert sum(map(float, parts)) == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize('silent', [False, True])
def test_the_loss_of_a_batch_is_the_mean_of_its_clips_each_as_if_it_were_alone(case, silent):
  outputs, targets, draws = case
  # A clip of frames 0 and 2, with fewer targets, and a clip of frame 1, which may have no weight.
  targets = targets.replace(
    classes=jnp.asarray([[0, 2], [0, 2], [2, -1]]),
    group=jnp.asarray([2, 1, 2]),
    weight=jnp.asarray([1.0, 0.0 if silent else 1.0, 1.0]),
  )
  together, _ = run(outputs, targets, draws)
  alone = []
  for frames in ([0, 2], [1])[: 1 if silent else 2]:
    clip = _frames(targets, frames, 0).replace(group=jnp.zeros(len(frames), int))
    parts = _of(outputs, frames), clip, _frames(draws, frames, 1)
    alone.append(float(run(*parts)[0]))
  assert float(together) == pytest.approx(np.mean(alone), rel=1e-5)


def test_a_frame_draws_the_same_in_any_part_of_the_batch():
  key = jax.random.key(0)
  whole = draw_points(key, 1, jnp.arange(FRAMES), 2, LOSS)
  part = draw_points(key, 1, jnp.asarray([2]), 2, LOSS)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2], b[0]), whole, part)
  assert (whole.matcher[0] != whole.matcher[1]).any()
  assert (whole.matcher != draw_points(key, 0, jnp.arange(FRAMES), 2, LOSS).matcher).any()


def test_padded_targets_take_no_part(case):
  outputs, targets, draws = case
  padded = targets.replace(classes=jnp.asarray([[0, 2, -1, -1]] * FRAMES))
  more = draw_all(jax.random.key(9), 4)
  more = PointDraws(
    matcher=draws.matcher,
    candidates=more.candidates.at[:, :, :2].set(draws.candidates),
    extra=more.extra.at[:, :, :2].set(draws.extra),
  )
  total, terms = run(outputs, targets, draws)
  with_padding, padded_terms = run(outputs, padded, more)
  assert float(with_padding) == pytest.approx(float(total), rel=1e-5)
  np.testing.assert_array_equal(padded_terms['query'][:, :, :2], terms['query'])


def test_a_batch_without_any_weight_has_no_loss(case):
  outputs, targets, draws = case
  empty = targets.replace(weight=jnp.zeros(FRAMES))
  assert float(run(outputs, empty, draws)[0]) == 0


def test_perfect_predictions_have_almost_no_loss(case):
  _, targets, draws = case
  truth = np.stack([targets.labels[:, ::2, ::2] == value for value in (0, 2)], 1)
  masks = np.full((SETS, FRAMES, QUERIES, 6, 6), -50.0, np.float32)
  classes = np.zeros((SETS, FRAMES, QUERIES, CLASSES + 1), np.float32)
  classes[..., CLASSES] = 50
  for query, (value, mask) in enumerate(zip((0, 2), truth.transpose(1, 0, 2, 3))):
    masks[:, :, query] = np.where(mask, 50, -50)
    classes[:, :, query] = 50 * np.eye(CLASSES + 1)[value]
  # Truth at the resolution of the logits, so that both are sampled alike.
  labels = jnp.where(jnp.asarray(truth[:, 1]), 2, 0).astype(jnp.uint8)
  exact = targets.replace(labels=labels)
  _, terms = run(outputs_of(masks, classes), exact, draws)
  assert float(terms['class'].max()) < 1e-6
  np.testing.assert_array_equal(terms['query'], np.tile([0, 1], (SETS, FRAMES, 1)))


def test_each_weight_weighs_its_term(case):
  outputs, targets, draws = case
  before = run(outputs, targets, draws)[1]
  other = LOSS.copy_and_resolve_references()
  other.update(
    class_weight=2 * LOSS.class_weight, mask_weight=0.0, dice_weight=LOSS.dice_weight / 5
  )
  totals = set_loss.totals(targets, QUERIES, other)
  draw = lambda index: jax.tree.map(lambda leaf: leaf[index], draws)  # noqa: E731
  total, after = set_loss.loss(outputs, targets, draw, totals, other, 'gather')
  for name, factor in (('class', 2), ('mask', 0), ('dice', 1 / 5)):
    np.testing.assert_allclose(after[name], factor * before[name], rtol=1e-5)
  np.testing.assert_array_equal(after['query'], before['query'])
  assert total == pytest.approx(sum(float(after[n].sum()) for n in ('class', 'dice')), rel=1e-5)


def test_the_null_class_weighs_as_the_config_says():
  """Of one frame with one target, whose query is right: the class loss is a weighted mean."""
  logits = jnp.zeros((1, QUERIES, CLASSES + 1))
  targets = Targets(
    jnp.ones((1, 4, 4), jnp.uint8), jnp.asarray([[1]]), jnp.ones(1), jnp.zeros(1, int)
  )
  config = LOSS.copy_and_resolve_references()
  for config.null_weight in (0.1, 0.5):
    found = np.asarray(set_loss.totals(targets, QUERIES, config).class_weight)
    assert found[0] == pytest.approx(1 + config.null_weight * (QUERIES - 1))
    draws = draw_points(jax.random.key(0), 0, jnp.arange(1), 1, config)
    product = jnp.zeros((1, QUERIES, 8)), jnp.zeros((1, 4, 4, 8))
    # Every class is as likely as any other, so that each query's loss is the same: so is the mean.
    terms = set_loss.set_loss(
      logits, *product, targets, draws, set_loss.totals(targets, QUERIES, config), config,
      'gather',
    )  # fmt: skip
    assert float(terms['class']) == pytest.approx(
      config.class_weight * np.log(CLASSES + 1), rel=1e-5
    )
    sure = logits.at[:, :, CLASSES].set(50.0)  # only the target's query is wrong
    terms = set_loss.set_loss(
      sure, *product, targets, draws, set_loss.totals(targets, QUERIES, config), config,
      'gather',
    )  # fmt: skip
    assert float(terms['class']) == pytest.approx(config.class_weight * 50 / found[0], rel=1e-4)


def test_the_method_gives_the_loss_of_its_batch_and_the_terms_of_the_final_set(case):
  outputs, targets, _ = case
  config = tiny.get_config('stage1')
  config.num_classes, config.model.num_queries, config.loss = CLASSES, QUERIES, LOSS
  method, key = methods.of(config), jax.random.key(0)
  targets = targets.replace(weight=jnp.asarray([1.0, 0.0, 1.0]), group=jnp.asarray([0, 0, 2]))
  position = [2, 0, 1]
  batch = {
    'labels': targets.labels, 'target_classes': targets.classes, 'weight': targets.weight,
    'group': targets.group, 'position': jnp.asarray(position),
  }  # fmt: skip
  total, terms = jax.jit(method.loss)(outputs, batch, method.totals(batch), key)
  draws = _frames(draw_all(key, 2), position, 1)
  expected, of_sets = run(outputs, targets, draws, sampling=config.model.sampling)
  assert float(total) == pytest.approx(float(expected), rel=1e-5)
  assert terms.keys() == {'class', 'mask', 'dice'}
  for name, value in terms.items():
    np.testing.assert_allclose(value, of_sets[name][-1], rtol=1e-5)


@pytest.mark.parametrize('stage', ['stage1', 'stage2'])
def test_what_is_predicted_is_the_final_set(case, stage):
  outputs, _, _ = case
  config = tiny.get_config(stage)
  config.num_classes = CLASSES
  predict = methods.of(config).predict
  last, first = (
    outputs.replace(
      class_logits=outputs.class_logits[chosen], mask_embeddings=outputs.mask_embeddings[chosen]
    )
    for chosen in (slice(-1, None), slice(1))
  )
  found = np.asarray(predict(outputs))
  np.testing.assert_array_equal(found, predict(last))
  assert (found != predict(first)).any()


def test_a_quarter_of_the_points_is_taken_whatever_the_mask_says():
  draws = draw_points(jax.random.key(0), 0, jnp.arange(FRAMES), 2, LOSS)  # of 8 points
  assert draws.extra.shape == (FRAMES, 2, 2, 2) and draws.candidates.shape == (FRAMES, 2, 24, 2)
  flat = np.concatenate([np.ravel(points) for points in jax.tree.leaves(draws)])
  assert len(np.unique(flat)) > 0.99 * len(flat)  # each draw is its own
