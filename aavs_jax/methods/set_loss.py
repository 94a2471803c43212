"""The set loss of Mask2Former: matched, point-sampled, on every prediction set."""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from aavs_jax.devices.mesh import on_each_device
from aavs_jax.methods.matching import Targets, match, matching_cost, sample_targets
from aavs_jax.models.mask_decoder import Outputs, mask_logits
from aavs_jax.models.sampling import corners, rows_at, sample, sample_rows

# Each function's `config` is config.loss, see configs/base.py: attributes, whatever holds them.


@flax.struct.dataclass
class PointDraws:
  """Every random number of the loss: uniform points (x, y) in 0..1.

  The loss is a pure function of predictions, targets and these; training draws them anew each step
  (draw_points), a parity test passes recorded ones in. All are of one prediction set.
  """

  matcher: Float[Array, 'n p 2']  # shared by all pairs of a frame
  candidates: Float[Array, 'n k o 2']  # for each pair
  extra: Float[Array, 'n k r 2']  # taken whatever the logit is


@flax.struct.dataclass
class Totals:
  """What the terms of each frame are divided by; known before any prediction."""

  targets: Float[Array, ' n']
  class_weight: Float[Array, ' n']


def extra_points(config: Any) -> int:
  """How many points of a pair are taken whatever the logit is."""
  return config.points - int(config.uncertain_share * config.points)


def draw_points(
  key: jax.Array, index: jax.Array, frames: Int[Array, ' n'], targets: int, config: Any
) -> PointDraws:
  """Fresh draws: points of the matcher, candidates and extra points of each pair.

  Each frame has its own stream, so that a part of a batch, or a device's share of it, draws what
  the whole would.

  Args:
    key: of the step.
    index: of the prediction set.
    frames: place of each frame in the whole batch.
    targets: pairs of a frame.
    config: config.loss.
  """
  points = config.points

  def draw(frame):
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, index), frame), 3)
    return PointDraws(
      matcher=jax.random.uniform(keys[0], (points, 2)),
      candidates=jax.random.uniform(keys[1], (targets, config.oversample * points, 2)),
      extra=jax.random.uniform(keys[2], (targets, extra_points(config), 2)),
    )

  return jax.vmap(draw)(frames)


def _real(targets: Targets) -> Bool[Array, 'n k']:
  """Targets that are neither padding nor of a frame without weight."""
  return (targets.classes >= 0) & (targets.weight > 0)[:, None]


def totals(targets: Targets, queries: int, config: Any) -> Totals:
  """Of a whole batch, the global one under jit with a sharded batch.

  The loss of a batch is the mean, over its groups with any weight, of the published loss of each:
  one clip a step is the published recipe, more of them average its gradients, whatever their
  lengths and numbers of targets. Every target takes one query, which then weighs 1 in the class
  loss and not null_weight, so that the weight is known without the matching.
  """
  taken = jnp.sum(targets.classes >= 0, -1)
  weight = targets.weight * (taken + config.null_weight * (queries - taken))
  of_frame = jnp.stack([jnp.sum(_real(targets), -1), weight, targets.weight > 0], -1)
  # As products: the frames of a group may be on different devices, which add up n x 3 numbers.
  member = jax.nn.one_hot(targets.group, len(targets.group))
  of_group = jnp.matmul(member.T, of_frame, precision='highest')
  groups = jnp.maximum(jnp.sum(of_group[:, 2] > 0), 1)
  divisors = groups * jnp.maximum(of_group[:, :2], jnp.array([1, 1e-12]))
  divisors = jnp.matmul(member, divisors, precision='highest')
  return Totals(divisors[:, 0], divisors[:, 1])


# That a round of mask_losses has room for, on average. Most frames of AVSBench-semantic have the
# background and one or two classes; data.max_targets is for the few that have more.
_TARGETS_A_FRAME = 3


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def mask_losses(
  config: Any,
  sampling: str,
  masks: Float[Array, 'n k h w'],
  labels: UInt8[Array, 'n y x'],
  classes: Int[Array, 'n k'],
  real: Bool[Array, 'n k'],
  candidates: Float[Array, 'n k o 2'],
  extra: Float[Array, 'n k r 2'],
) -> tuple[Float[Array, 'n k'], Float[Array, 'n k']]:
  """Cross-entropy and dice loss of each target at its points; 0 of what is not real.

  Frames have few targets and room for many, so the real ones of all frames are put first and taken
  in rounds, as many as there are. The gradients of each loss, by the masks alone, are computed with
  it, so that of all the points nothing is kept.
  """
  return _losses_and_gradients(config, sampling, masks, labels, classes, real, candidates, extra)[0]


def _losses_and_gradients(config, sampling, masks, labels, classes, real, candidates, extra):
  n, k = real.shape
  size = n * min(k, _TARGETS_A_FRAME)
  order = jnp.argsort(~real.ravel())
  places = jnp.argsort(order)
  order = jnp.pad(order, (0, -(n * k) % size))

  def one_round(i, found):
    now = jax.lax.dynamic_slice_in_dim(order, i * size, size)

    def of_these(array):
      return jnp.take(array.reshape(n * k, 1, *array.shape[2:]), now, axis=0)

    def points_of_these(points):
      # An axis at a time, or TPUs copy the points into another layout first.
      return jnp.stack([of_these(position) for position in jnp.unstack(points, axis=-1)], -1)

    masks_now = of_these(masks)
    points = _loss_points(
      masks_now, points_of_these(candidates), points_of_these(extra), config, sampling
    )
    labels_now = jnp.take(labels, now // k, axis=0)
    truth = sample_targets(labels_now, of_these(classes), points)
    losses, pull = jax.vjp(lambda masks: _at_points(masks, points, truth, sampling), masks_now)
    one, none = jnp.ones((size, 1)), jnp.zeros((size, 1))
    gradients = (*pull((one, none)), *pull((none, one)))
    return jax.tree.map(
      lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part[:, 0], i * size, 0),
      found,
      (losses, gradients),
    )

  def in_place(found):
    found = jnp.take(found, places, axis=0).reshape(n, k, *found.shape[1:])
    return jnp.where(real.reshape(n, k, *[1] * (found.ndim - 2)), found, 0)

  nothing = (jnp.zeros(len(order)),) * 2, (jnp.zeros((len(order), *masks.shape[2:])),) * 2
  rounds = -(-jnp.sum(real) // size)
  return jax.tree.map(in_place, jax.lax.fori_loop(0, rounds, one_round, nothing))


def _pull_masks(config, sampling, gradients, g):
  by_masks = sum(each[..., None, None] * gradient for each, gradient in zip(g, gradients))
  return by_masks, None, None, None, None, None


mask_losses.defvjp(_losses_and_gradients, _pull_masks)


def _at_points(masks, points, truth, sampling):
  """Cross-entropy and dice loss of each pair."""
  logits = _at_own_points(masks, points, sampling)
  cross_entropy = jnp.mean(jax.nn.softplus(logits) - logits * truth, -1)
  probability = jax.nn.sigmoid(logits)
  overlap = jnp.sum(probability * truth, -1)
  dice = 1 - (2 * overlap + 1) / (jnp.sum(probability, -1) + jnp.sum(truth, -1) + 1)
  return cross_entropy, dice


def _at_own_points(masks, points, sampling):
  return sample(masks[:, :, None], points, sampling)[:, :, 0]


def _loss_points(masks, candidates, extra, config, sampling):
  """Points of a pair's loss: the most uncertain candidates and the extra ones. No gradient."""
  logits = _at_own_points(masks, candidates, sampling)
  kept = candidates.shape[-2] // config.oversample - extra.shape[-2]
  _, index = jax.lax.top_k(-jnp.abs(logits), kept)
  uncertain = jnp.stack(
    [jnp.take_along_axis(candidates[..., axis], index, axis=-1) for axis in range(2)], -1
  )
  return jnp.concatenate([uncertain, extra], -2)


def _mask_logits_at(
  embeddings: Float[Array, 'n q d'],
  features: Float[Array, 'n h w d'],
  points: Float[Array, 'n p 2'],
  sampling: str,
) -> Float[Array, 'n q p']:
  """Masks at points. Sampling is linear, and there are fewer points than pixels times queries.

  sampling 'dense': the product with the features of each corner comes before their sum. It is four
  products for one, but what is gathered meets nothing else: an eighth of the TPU compiler's cycles.
  """

  def product(rows):
    return jnp.einsum('nqd,npd->nqp', embeddings, rows, preferred_element_type=jnp.float32)

  if sampling == 'gather':
    return product(sample_rows(features, points))
  _, height, width, _ = features.shape
  return sum(
    product(rows_at(features, index)) * weight[:, None]
    for index, weight in corners(points, height, width)
  )


def set_loss(
  class_logits: Float[Array, 'n q c'],
  embeddings: Float[Array, 'n q d'],
  features: Float[Array, 'n h w d'],
  targets: Targets,
  draws: PointDraws,
  totals: Totals,
  config: Any,
  sampling: str,
) -> dict[str, jax.Array]:
  """Weighted terms 'class', 'mask', 'dice' of one prediction set; 'query': matches int32 [n, k]."""
  null = class_logits.shape[-1] - 1
  with jax.named_scope('matching'):
    cost = matching_cost(
      *jax.lax.stop_gradient(
        (class_logits, _mask_logits_at(embeddings, features, draws.matcher, sampling))
      ),
      targets.classes,
      sample_targets(targets.labels, targets.classes, draws.matcher[:, None]),
      config,
    )
    query = match(cost)
  real = _real(targets)

  # Class loss over all queries; those without a target should say null.
  # Compared, not scattered: for a scatter, some TPU compilers gather the frames of all devices.
  holds = query[:, None, :] == jnp.arange(class_logits.shape[1])[:, None]  # n q k, one k at most
  goal = jnp.max(jnp.where(holds, targets.classes[:, None, :], -1), -1)  # padding has -1 too
  goal = jnp.where(goal >= 0, goal, null)
  weight = jnp.where(goal == null, config.null_weight, 1.0) * targets.weight[:, None]
  log_probability = jax.nn.log_softmax(class_logits, -1)
  picked = jnp.take_along_axis(log_probability, goal[..., None], -1)[..., 0]
  class_loss = -jnp.sum(weight * picked / totals.class_weight[:, None])

  # Not embeddings[frame, query], for which those of all devices' frames would be gathered.
  of_matched = jnp.take_along_axis(embeddings, query[..., None], axis=1)  # n k d
  matched = mask_logits(of_matched, features)
  with jax.named_scope('points'):
    cross_entropy, dice = on_each_device(functools.partial(mask_losses, config, sampling))(
      matched, targets.labels, targets.classes, real, draws.candidates, draws.extra
    )
  per_target = totals.targets[:, None]
  return {
    'class': config.class_weight * class_loss,
    'mask': config.mask_weight * jnp.sum(cross_entropy / per_target),
    'dice': config.dice_weight * jnp.sum(dice / per_target),
    'query': query,
  }


def loss(
  outputs: Outputs,
  targets: Targets,
  draw: Callable[[jax.Array], PointDraws],
  totals: Totals,
  config: Any,
  sampling: str,
) -> tuple[Float[Array, ''], dict[str, jax.Array]]:
  """Total loss and its weighted terms.

  Args:
    outputs: all prediction sets.
    targets: ground truth; frames of weight 0 take no part.
    draw: the random points of a prediction set by its index.
    totals: of these frames, from the whole batch where they are a part of it: then the losses of
      the parts add up to that of the whole.
    config: config.loss.
    sampling: 'dense' or 'gather', see models.sampling.sample.

  Returns:
    The sum over sets and terms, and 'class', 'mask', 'dice' float32 [s], 'query' int32 [s, n, k].
  """
  # One set after the other: the points of all sets at once would be the peak of memory.
  terms = jax.lax.map(
    lambda x: set_loss(
      *x[:2], outputs.mask_features, targets, draw(x[2]), totals, config, sampling
    ),
    (
      outputs.class_logits,
      outputs.mask_embeddings,
      jnp.arange(outputs.class_logits.shape[0]),
    ),
  )
  return sum(jnp.sum(terms[name]) for name in ('class', 'mask', 'dice')), terms
