"""The training loss: matched, point-sampled, on every prediction set."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aavs_jax.matching import (
  CLASS_WEIGHT,
  DICE_WEIGHT,
  MASK_WEIGHT,
  match,
  matching_cost,
  sample_targets,
)
from aavs_jax.models.sampling import sample
from aavs_jax.types import Outputs, Targets

NULL_WEIGHT = 0.1  # weight of the null class in the class loss
OVERSAMPLE = 3  # candidates for each loss point
UNCERTAIN_SHARE = 0.75  # share of the loss points taken where the logit is nearest to zero


@flax.struct.dataclass
class PointDraws:
  """Every random number of the loss: uniform points (x, y) in 0..1.

  The loss is a pure function of predictions, targets and these; training draws them anew each step
  (draw_points), a parity test passes recorded ones in.
  """

  matcher: Float[Array, 's n p 2']  # shared by all pairs of a frame
  candidates: Float[Array, 's n k o 2']  # for each pair
  extra: Float[Array, 's n k r 2']  # taken whatever the logit is


def draw_points(key: jax.Array, sets: int, frames: int, targets: int, points: int) -> PointDraws:
  """Fresh draws: `points` for the matcher, 3 points candidates and 0.25 points extra a pair."""
  keys = jax.random.split(key, 3)
  extra = points - int(UNCERTAIN_SHARE * points)
  pairs = (sets, frames, targets)
  return PointDraws(
    matcher=jax.random.uniform(keys[0], (sets, frames, points, 2)),
    candidates=jax.random.uniform(keys[1], (*pairs, OVERSAMPLE * points, 2)),
    extra=jax.random.uniform(keys[2], (*pairs, extra, 2)),
  )


def _loss_points(mask_logits, candidates, extra, form):
  """Points of a pair's loss: the most uncertain candidates and the extra ones. No gradient."""
  logits = sample(mask_logits[..., None, :, :], candidates, form)[..., 0, :]
  kept = int(UNCERTAIN_SHARE * (candidates.shape[-2] // OVERSAMPLE))
  _, index = jax.lax.top_k(-jnp.abs(logits), kept)
  uncertain = jnp.take_along_axis(candidates, index[..., None], axis=-2)
  return jnp.concatenate([uncertain, extra], -2)


def set_loss(
  class_logits: Float[Array, 'n q c'],
  mask_logits: Float[Array, 'n q h w'],
  targets: Targets,
  draws: PointDraws,
  num_targets: Float[Array, ''],
  form: str,
) -> dict[str, jax.Array]:
  """Weighted terms of one prediction set, and the matched queries int32 [n, k].

  draws holds one set (no leading s). Terms are 'class', 'mask', 'dice'.
  """
  null = class_logits.shape[-1] - 1
  still_class, still_masks = jax.lax.stop_gradient((class_logits, mask_logits))
  cost = matching_cost(
    still_class,
    sample(still_masks, draws.matcher, form),
    targets.classes,
    sample_targets(targets, draws.matcher[:, None]),
  )
  query = match(cost)
  real = (targets.classes >= 0) & (targets.weight > 0)[:, None]

  # Class loss over all queries; those without a target should say null.
  frame = jnp.arange(query.shape[0])[:, None]
  goal = jnp.full(class_logits.shape[:2], null)
  # Padded targets hold queries too (the matching is one-to-one), so they write null there.
  goal = goal.at[frame, query].set(jnp.where(targets.classes >= 0, targets.classes, null))
  weight = jnp.where(goal == null, NULL_WEIGHT, 1.0) * targets.weight[:, None]
  log_probability = jax.nn.log_softmax(class_logits, -1)
  picked = jnp.take_along_axis(log_probability, goal[..., None], -1)[..., 0]
  class_loss = -jnp.sum(weight * picked) / jnp.maximum(jnp.sum(weight), 1e-12)

  matched = mask_logits[frame, query]  # n k h w
  points = _loss_points(jax.lax.stop_gradient(matched), draws.candidates, draws.extra, form)
  logits = sample(matched[:, :, None], points, form)[:, :, 0]
  truth = sample_targets(targets, points)
  cross_entropy = jnp.mean(jax.nn.softplus(logits) - logits * truth, -1)
  probability = jax.nn.sigmoid(logits)
  overlap = jnp.sum(probability * truth, -1)
  dice = 1 - (2 * overlap + 1) / (jnp.sum(probability, -1) + jnp.sum(truth, -1) + 1)
  return {
    'class': CLASS_WEIGHT * class_loss,
    'mask': MASK_WEIGHT * jnp.sum(jnp.where(real, cross_entropy, 0.0)) / num_targets,
    'dice': DICE_WEIGHT * jnp.sum(jnp.where(real, dice, 0.0)) / num_targets,
    'query': query,
  }


def loss(
  outputs: Outputs, targets: Targets, draws: PointDraws, form: str
) -> tuple[Float[Array, ''], dict[str, jax.Array]]:
  """Total loss and its weighted terms.

  Args:
    outputs: all prediction sets.
    targets: ground truth; frames of weight 0 take no part. Sums over pairs are divided by the
      number of targets in the whole batch (the global one under jit with a sharded batch).
    draws: the random points.
    form: 'dense' or 'gather', see models.sampling.sample.

  Returns:
    The sum over sets and terms, and 'class', 'mask', 'dice' float32 [s], 'query' int32 [s, n, k].
  """
  real = (targets.classes >= 0) & (targets.weight > 0)[:, None]
  num_targets = jnp.maximum(jnp.sum(real), 1).astype(jnp.float32)
  # One set after the other: the points of all sets at once would be the peak of memory.
  terms = jax.lax.map(
    lambda x: set_loss(x[0], x[1], targets, x[2], num_targets, form),
    (outputs.class_logits, outputs.mask_logits, draws),
  )
  return sum(jnp.sum(terms[name]) for name in ('class', 'mask', 'dice')), terms
