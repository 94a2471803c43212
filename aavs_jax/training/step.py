"""One optimiser step: a pure function of state and batch."""

import functools

import jax
import jax.numpy as jnp
import optax

from aavs_jax.methods.method import Method
from aavs_jax.training.state import TrainState, flatten_statistics
from aavs_jax.types import Batch


def train_step(
  state: TrainState,
  batch: Batch,
  key: jax.Array,
  *,
  method: Method,
  optimizer: optax.GradientTransformation,
  accumulate: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimiser step on one batch.

  Random numbers come from the run's key and the step alone, so a restarted run draws the same ones.
  With accumulate > 1 the frames go through the model in so many parts, one after the other: the
  same step in less memory, but for what a method draws or measures of a part at a time (stochastic
  depth, the statistics of BatchNorm).

  Returns:
    The next state, and float32 scalars: loss, the method's terms of it as loss_NAME, and the norm
    of the gradient before clipping.
  """
  key = jax.random.fold_in(key, state.step)
  apply_key, loss_key = jax.random.split(key)
  totals = method.totals(batch)

  def loss_of(trained, statistics, batch, totals, key):
    variables = state.replace(trained=trained, statistics=statistics).variables
    outputs, statistics = method.apply(variables, batch, key)
    with jax.named_scope('loss'):
      loss, terms = method.loss(outputs, batch, totals, loss_key)
    terms = {f'loss_{name}': value for name, value in terms.items()}
    return loss, ({'loss': loss, **terms}, flatten_statistics(statistics))

  gradient_of = jax.grad(loss_of, has_aux=True)
  if accumulate == 1:
    gradient, (losses, statistics) = gradient_of(
      state.trained, state.statistics, batch, totals, apply_key
    )
  else:
    parts = jax.tree.map(
      functools.partial(_parts, count=accumulate, unit=method.unit), (batch, totals)
    )

    def add(carry, part):
      gradient, statistics = carry
      (batch, totals), key = part
      more, (losses, statistics) = gradient_of(state.trained, statistics, batch, totals, key)
      return (jax.tree.map(jnp.add, gradient, more), statistics), losses

    begin = jax.tree.map(jnp.zeros_like, state.trained), state.statistics
    keys = jax.random.split(apply_key, accumulate)
    (gradient, statistics), losses = jax.lax.scan(add, begin, (parts, keys))
    losses = jax.tree.map(functools.partial(jnp.sum, axis=0), losses)
  with jax.named_scope('optimizer'):
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
  state = state.replace(
    step=state.step + 1,
    trained=trained,
    opt_state=opt_state,
    statistics=statistics,
  )
  return state, {**losses, 'gradient_norm': optax.global_norm(gradient)}


def _parts(leaf: jax.Array, count: int, unit: int) -> jax.Array:
  """[n ...] -> [count n/count ...]. Every part takes each count-th unit, not a run of them, so that
  a sharded batch stays where it is."""
  units = leaf.reshape(-1, count, unit, *leaf.shape[1:]).swapaxes(0, 1)
  return units.reshape(count, -1, *leaf.shape[1:])
