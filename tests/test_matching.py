"""Matching against brute force, and the padding of targets."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aavs_jax.configs import base
from aavs_jax.methods import matching
from aavs_jax.methods.matching import sample_targets

match = jax.jit(matching.match)
LOSS = base.get_config().loss
LOSS.update(matching_class_weight=1.5, matching_mask_weight=4.0, matching_dice_weight=3.0)
matching_cost = jax.jit(functools.partial(matching.matching_cost, config=LOSS))


def _cost(rng, queries, targets, classes):
  logits = jnp.asarray(rng.standard_normal((1, queries, 5)), jnp.float32)
  masks = jnp.asarray(rng.standard_normal((1, queries, 30)), jnp.float32)
  truth = jnp.asarray(rng.integers(0, 2, (1, targets, 30)), jnp.float32)
  return matching_cost(logits, masks, jnp.asarray([classes]), truth)


def test_match_is_the_best_of_all_assignments():
  rng = np.random.default_rng(0)
  costs = np.stack([_cost(rng, 6, 3, [0, 1, 3])[0] for _ in range(20)])
  for cost, found in zip(costs, np.asarray(match(costs))):
    best = min(
      itertools.permutations(range(6), 3),
      key=lambda queries: sum(cost[q, k] for k, q in enumerate(queries)),
    )
    assert tuple(found) == best


def test_padded_targets_change_no_match():
  rng = np.random.default_rng(1)
  cost = _cost(rng, 6, 5, [0, 2, 3, -1, -1])
  alone = match(cost[:, :, :3])
  padded = np.asarray(match(cost))
  np.testing.assert_array_equal(padded[:, :3], alone)
  assert len(set(padded[0])) == 5


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_match_ends_on_costs_that_are_not_finite(bad):
  assert match(jnp.full((2, 4, 3), bad)).shape == (2, 3)


def test_cost_follows_its_formula():
  rng = np.random.default_rng(2)
  logits = rng.standard_normal((1, 2, 3)).astype(np.float32)
  masks = rng.standard_normal((1, 2, 7)).astype(np.float32)
  truth = rng.integers(0, 2, (1, 2, 7)).astype(np.float32)
  found = matching_cost(*map(jnp.asarray, (logits, masks, np.array([[1, 0]]), truth)))
  for q, k in itertools.product(range(2), range(2)):
    probability = np.exp(logits[0, q]) / np.exp(logits[0, q]).sum()
    p, t = 1 / (1 + np.exp(-masks[0, q])), truth[0, k]
    entropy = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    expected = -1.5 * probability[[1, 0][k]] + 4 * entropy + 3 * dice
    assert found[0, q, k] == pytest.approx(expected, rel=1e-5)


def test_ignored_pixels_belong_to_no_target():
  labels = np.full((1, 4, 4), 255, np.uint8)
  labels[0, :2] = 1
  centres = jnp.asarray([[[[0.375, 0.125], [0.375, 0.875]]]])  # a pixel of class 1, one ignored
  found = sample_targets(jnp.asarray(labels), jnp.asarray([[0, 1]]), centres)
  np.testing.assert_allclose(found[0], [[0, 0], [1, 0]])
