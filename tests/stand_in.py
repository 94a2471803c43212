"""A method that is traced in no time: for tests of what goes on around a model.

Each pixel's colour and the loudness of its frame give the scores of that pixel.
"""

import jax
import jax.numpy as jnp
import optax

from aavs_jax.methods import aavs
from aavs_jax.methods.method import Method
from aavs_jax.types import Variables

# Any config of AAVS becomes one of this by it.
STAND_IN = '--config.method=tests.stand_in'

MAY_BE_ZERO = aavs.MAY_BE_ZERO
check = aavs.check


def method(config) -> Method:
  """0.3 M parameters, so that saving takes a moment; as stochastic depth does, training draws."""

  def init(key):
    features, wide = jax.random.normal(key, (4, 2)), jax.random.normal(key, (512, 512))
    return Variables({'aavs': {'queries': {'features': features, 'positions': wide}}}, {})

  def apply(variables, batch, key=None):
    params, statistics = variables
    frames = aavs.normalise(batch['frames'])
    if key is not None:
      frames += 0.1 * jax.random.normal(key, frames.shape[1:])
    loudness = jnp.broadcast_to(batch['log_mel'].mean((1, 2))[:, None, None, None], frames.shape)
    queries = params['aavs']['queries']
    scores = jnp.concatenate([frames, loudness[..., :1]], -1) @ queries['features']
    return (scores, (queries['positions'] ** 2).mean()), statistics

  def totals(batch):
    return jnp.full(batch['weight'].shape, jnp.maximum(batch['weight'].sum(), 1))

  def loss(outputs, batch, totals, key):
    scores, decay = outputs
    sounding = (batch['labels'] == 1).astype(jnp.int32)
    wrong = optax.losses.softmax_cross_entropy_with_integer_labels(scores, sounding)
    wrong = (wrong.mean((1, 2)) * batch['weight'] / totals).sum()
    return wrong + 1e-2 * decay, {'entropy': wrong}

  def predict(outputs):
    return jax.nn.softmax(outputs[0]).transpose(0, 3, 1, 2)

  return Method(init, apply, totals, loss, predict, inputs=('frames', 'log_mel'))
