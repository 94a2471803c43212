"""A stand-in for the model, traced in no time: for tests of what goes on around it in training."""

import jax
import jax.numpy as jnp
import optax

from aavs_jax import flops, train
from aavs_jax.methods import Method

# The command line with it, for runs.start.
STAND_IN = """
import sys
from aavs_jax import cli
from tests import stand_in

stand_in.use()
sys.exit(cli.main())
"""


def use() -> None:
  """Colour and loudness instead of a network, 0.3 M parameters, from now on in this process."""

  def init(key):
    wide = jax.random.normal(key, (512, 512))
    return {'aavs': {'queries': {'features': jnp.zeros((4, 2)), 'positions': wide}}}

  def apply(params, batch, drop_path_key=None):
    frames = batch['frames'].astype(jnp.float32) / 255
    if drop_path_key is not None:
      frames += 0.1 * jax.random.normal(drop_path_key, frames.shape)
    loud = jnp.broadcast_to(batch['log_mel'].mean((1, 2))[:, None, None, None], frames.shape)
    seen = jnp.concatenate([frames, loud[..., :1]], -1)
    queries = params['aavs']['queries']
    return jnp.moveaxis(seen @ queries['features'], -1, 1), (queries['positions'] ** 2).mean()

  def loss(outputs, batch, totals, key):
    scores, decay = outputs
    wrong = optax.softmax_cross_entropy_with_integer_labels(
      jnp.moveaxis(scores, 1, -1), (batch['labels'] == 1).astype(jnp.int32)
    ).mean()
    terms = dict.fromkeys(('class', 'mask', 'dice'), wrong[None])
    return wrong + 1e-2 * decay, terms

  train.aavs = lambda config: Method(
    init, apply, lambda batch: (), loss, lambda outputs: outputs[0]
  )
  flops.step_flops = lambda *_: 0
