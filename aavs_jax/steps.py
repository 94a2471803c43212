"""The jitted steps: pure functions of state and batch."""

import functools

import jax
import jax.numpy as jnp
import optax

from aavs_jax.methods import Method
from aavs_jax.state import TrainState, merge
from aavs_jax.types import Batch, Params


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
  same step, but for stochastic depth, in less memory.

  Returns:
    The next state, and float32 scalars: loss, the final prediction set's weighted class, mask and
    dice terms, and the norm of the gradient before clipping.
  """
  key = jax.random.fold_in(key, state.step)
  drop_path_key, points_key = jax.random.split(key)

  totals = method.totals(batch)

  def loss_of(trained, batch, totals, drop_path_key):
    outputs = method.apply(merge(trained, state.frozen), batch, drop_path_key)
    loss, terms = method.loss(outputs, batch, totals, points_key)
    return loss, {f'loss_{name}': terms[name][-1] for name in ('class', 'mask', 'dice')}

  gradient_of = functools.partial(jax.value_and_grad(loss_of, has_aux=True), state.trained)
  if accumulate == 1:
    (loss, terms), gradient = gradient_of(batch, totals, drop_path_key)
  else:
    # Every part takes each accumulate-th frame, so that a sharded batch stays where it is.
    parts = jax.tree.map(
      lambda leaf: leaf.reshape(-1, accumulate, *leaf.shape[1:]).swapaxes(0, 1), (batch, totals)
    )
    keys = jax.random.split(drop_path_key, accumulate)

    def add(gradient, part):
      (batch, totals), key = part
      value, more = gradient_of(batch, totals, key)
      return jax.tree.map(jnp.add, gradient, more), value

    nothing = jax.tree.map(jnp.zeros_like, state.trained)
    gradient, values = jax.lax.scan(add, nothing, (parts, keys))
    loss, terms = jax.tree.map(functools.partial(jnp.sum, axis=0), values)
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.trained)
  trained = optax.apply_updates(state.trained, updates)
  metrics = {
    'loss': loss,
    **terms,
    'gradient_norm': optax.global_norm(gradient),
  }
  return state.replace(step=state.step + 1, trained=trained, opt_state=opt_state), metrics


def predict_step(params: Params, batch: Batch, *, method: Method) -> jax.Array:
  """Predictions of the final set, see Method.predict."""
  return method.predict(method.apply(params, batch))
