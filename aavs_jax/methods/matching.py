"""Exact one-to-one matching of queries and targets, on the device."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt8

from aavs_jax.devices.mesh import on_each_device
from aavs_jax.models.sampling import corners


@flax.struct.dataclass
class Targets:
  """Ground truth of a batch of frames: label maps and the label values present in each."""

  labels: UInt8[Array, 'n h w']
  classes: Int[Array, 'n k']  # -1 = padding
  weight: Float[Array, ' n']
  group: Int[Array, ' n']  # which clip of the batch: the loss is a mean over these; in 0..n-1


def matching_cost(
  class_logits: Float[Array, 'n q c'],
  mask_logits: Float[Array, 'n q p'],
  target_classes: Int[Array, 'n k'],
  target_masks: Float[Array, 'n k p'],
  config: Any,
) -> Float[Array, 'n q k']:
  """Cost of giving target k to query q, from the mask logits and targets at p shared points.

  Weighted as config.loss says: -class probability, mean sigmoid cross-entropy, dice. Padded targets
  (class -1) cost nothing anywhere, so they take the queries that the real ones leave over.
  """
  probability = jax.nn.softmax(class_logits, -1)
  index = jnp.maximum(target_classes, 0)[:, None, :]
  class_cost = -jnp.take_along_axis(probability, index, axis=-1)
  points = mask_logits.shape[-1]
  # softplus(-x) t + softplus(x) (1 - t), rearranged into one product and one sum.
  mask_cost = jnp.sum(jax.nn.softplus(mask_logits), -1)[..., None] - jnp.einsum(
    'nqp,nkp->nqk', mask_logits, target_masks
  )
  sigmoid = jax.nn.sigmoid(mask_logits)
  overlap = jnp.einsum('nqp,nkp->nqk', sigmoid, target_masks)
  total = jnp.sum(sigmoid, -1)[..., None] + jnp.sum(target_masks, -1)[:, None, :]
  dice_cost = 1 - (2 * overlap + 1) / (total + 1)
  cost = (
    config.matching_class_weight * class_cost
    + config.matching_mask_weight * mask_cost / points
    + config.matching_dice_weight * dice_cost
  )
  return jnp.where(target_classes[:, None, :] >= 0, cost, 0.0)


def match(cost: Float[Array, 'n q k']) -> Int[Array, 'n k']:
  """The query of each target under the assignment of least total cost; needs q >= k.

  NaN and infinite costs count as very large ones, so that a diverged model fails in its loss, which
  names the step, not in an endless search here.
  """
  cost = jnp.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6)

  def one(matrix):
    query, target = optax.assignment.hungarian_algorithm(matrix)
    return jnp.zeros(matrix.shape[1], jnp.int32).at[target].set(query.astype(jnp.int32))

  return on_each_device(jax.vmap(one))(cost)


def sample_targets(
  labels: UInt8[Array, 'n h w'],
  classes: Int[Array, 'n k'],
  points: Float[Array, 'n k p 2'] | Float[Array, 'n 1 p 2'],
) -> Float[Array, 'n k p']:
  """Target masks at points, bilinear, zeros outside: one set of points a target, or one for all."""
  n, height, width = labels.shape
  flat = labels.reshape(n, 1, -1)

  def weight_inside(index, weight):
    found = jnp.take_along_axis(flat, index, axis=-1, mode='clip').astype(jnp.int32)
    return jnp.where(found == classes[:, :, None], weight, 0.0)

  return sum(weight_inside(*corner) for corner in corners(points, height, width))
