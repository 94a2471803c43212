"""A stand-in for the model, traced in no time: for tests of what goes on around it.

Each pixel's colour and the loudness of its frame give the scores of that pixel.
"""

import jax
import jax.numpy as jnp
import optax

from aavs_jax import evaluate, flops, train
from aavs_jax.methods import Method, normalise

# The command line with it, for runs.start.
STAND_IN = """
import sys
from aavs_jax import cli
from tests import stand_in

stand_in.use()
sys.exit(cli.main())
"""


def method(config) -> Method:
  """0.3 M parameters, so that saving takes a moment; as stochastic depth does, training draws."""

  def init(key):
    features, wide = jax.random.normal(key, (4, 2)), jax.random.normal(key, (512, 512))
    return {'aavs': {'queries': {'features': features, 'positions': wide}}}

  def apply(params, batch, drop_path_key=None):
    frames = normalise(batch['frames'])
    if drop_path_key is not None:
      frames += 0.1 * jax.random.normal(drop_path_key, frames.shape[1:])
    loudness = jnp.broadcast_to(batch['log_mel'].mean((1, 2))[:, None, None, None], frames.shape)
    queries = params['aavs']['queries']
    scores = jnp.concatenate([frames, loudness[..., :1]], -1) @ queries['features']
    return scores, (queries['positions'] ** 2).mean()

  def totals(batch):
    return jnp.full(batch['weight'].shape, jnp.maximum(batch['weight'].sum(), 1))

  def loss(outputs, batch, totals, key):
    scores, decay = outputs
    sounding = (batch['labels'] == 1).astype(jnp.int32)
    wrong = optax.losses.softmax_cross_entropy_with_integer_labels(scores, sounding)
    wrong = (wrong.mean((1, 2)) * batch['weight'] / totals).sum()
    return wrong + 1e-2 * decay, dict.fromkeys(('class', 'mask', 'dice'), wrong[None])

  def predict(outputs):
    return outputs[0].transpose(0, 3, 1, 2)

  return Method(init, apply, totals, loss, predict)


def use(patch=setattr) -> None:
  """Whatever trains or runs a model from now on in this process, it is this one."""
  for module in (train, evaluate, flops):
    patch(module, 'aavs', method)
