"""A model of a few numbers that compiles at once, where a test is not about the model.

Each pixel's colour and the loudness of its frame give the scores of that pixel.
"""

import jax
import jax.numpy as jnp
import optax

from aavs_jax import evaluate, flops, train
from aavs_jax.methods import Method, normalise


def method(config):
  def init(key):
    return {'aavs': {'colour': jax.random.normal(key, (3, 2)), 'loudness': jnp.zeros(2)}}

  def apply(params, batch, drop_path_key=None):
    loudness = batch['log_mel'].mean(axis=(1, 2))[:, None, None, None]
    model = params['aavs']
    return normalise(batch['frames']) @ model['colour'] + loudness * model['loudness']

  def totals(batch):
    return jnp.full(batch['weight'].shape, jnp.maximum(batch['weight'].sum(), 1))

  def loss(outputs, batch, totals, key):
    wrong = optax.losses.softmax_cross_entropy_with_integer_labels(outputs, batch['labels'] % 255)
    loss = (wrong.mean(axis=(1, 2)) * batch['weight'] / totals).sum()
    return loss, dict.fromkeys(('class', 'mask', 'dice'), loss[None])

  def predict(outputs):
    return outputs.transpose(0, 3, 1, 2)

  return Method(init, apply, totals, loss, predict)


def take_its_place(patch=setattr):
  """Whatever trains or runs a model from now on, it is this one."""
  for module in (train, evaluate, flops):
    patch(module, 'aavs', method)
