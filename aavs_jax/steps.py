"""The jitted steps: pure functions of state and batch."""

import jax
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
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimiser step on one batch.

  Random numbers come from the run's key and the step alone, so a restarted run draws the same ones.

  Returns:
    The next state, and float32 scalars: loss, the final prediction set's weighted class, mask and
    dice terms, and the norm of the gradient before clipping.
  """
  key = jax.random.fold_in(key, state.step)
  drop_path_key, points_key = jax.random.split(key)

  def loss_of(trained):
    outputs = method.apply(merge(trained, state.frozen), batch, drop_path_key)
    return method.loss(outputs, batch, points_key)

  (loss, terms), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.trained)
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.trained)
  trained = optax.apply_updates(state.trained, updates)
  metrics = {
    'loss': loss,
    **{f'loss_{name}': terms[name][-1] for name in ('class', 'mask', 'dice')},
    'gradient_norm': optax.global_norm(gradient),
  }
  return state.replace(step=state.step + 1, trained=trained, opt_state=opt_state), metrics


def predict_step(params: Params, batch: Batch, *, method: Method) -> jax.Array:
  """Predictions of the final set, see Method.predict."""
  return method.predict(method.apply(params, batch))
