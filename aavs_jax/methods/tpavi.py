"""TPAVI, the baseline of AVSBench, as a method (arXiv 2207.05042 and 2301.13190)."""

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float

from aavs_jax.methods import maps
from aavs_jax.methods.method import Method
from aavs_jax.models.tpavi import TOGETHER, TPAVI

MAY_BE_ZERO = (*maps.MAY_BE_ZERO, 'loss.matching_weight')


def method(config: ml_collections.ConfigDict) -> Method:
  """The network of config.model and config.vggish on the task of config.task."""
  binary = config.task == 'binary'
  model = config.model
  network = TPAVI(
    classes=maps.outputs(config),
    width=model.width,
    head=tuple(model.head),
    align_bias=binary,
    dtype=jnp.dtype(config.dtype),
  )

  def loss(outputs, batch, share):
    logits, labels = outputs.logits, batch['labels']
    if binary:
      wrong = optax.losses.sigmoid_binary_cross_entropy(logits[..., 0], maps.sounding(labels))
      entropy = (wrong.mean((1, 2)) * share).sum()
    else:
      entropy = (maps.class_entropy(logits, labels) * share).sum()
    terms = {'entropy': entropy}
    if config.loss.matching_weight:
      # In MS3 the release adds up the frames, in AVSS it takes their mean.
      divergence = matching(outputs, binary)
      terms['matching'] = (divergence * (batch['weight'] if binary else share)).sum()
      entropy = entropy + config.loss.matching_weight * terms['matching']
    return entropy, terms

  return maps.method(
    config,
    'tpavi',
    network,
    loss,
    unit=TOGETHER,
    released_batch=4,
    stage_specific=(r'tpavi/head/conv2/', r'tpavi/level\d/align/bias'),
    forms={'model.remat': 'none'},
  )


def matching(outputs, binary: bool) -> jax.Array:
  """Divergence of what is seen where it is predicted to sound from what is heard, of each frame.

  The paper's audio-visual mapping loss (equation 6), mean over levels. The mask has a gradient in
  the binary task alone; there it is pooled before the sigmoid.
  """
  logits = outputs.logits
  total = 0.0
  for features, heard in zip(outputs.features, outputs.audio):
    height, width = features.shape[1:3]
    if binary:
      mask = jax.nn.sigmoid(_pool(logits[..., 0], height, width))
    else:
      mask = _pool((jnp.argmax(logits, -1) != 0).astype(jnp.float32), height, width)
    # Of all positions: the release does not divide by the area of the mask.
    seen = jnp.einsum('nyxd,nyx->nd', features.astype(jnp.float32), mask) / (height * width)
    log_heard = jax.nn.log_softmax(heard.astype(jnp.float32))
    difference = log_heard - jax.nn.log_softmax(seen)
    total = total + (jnp.exp(log_heard) * difference).sum(-1)
  return total / len(outputs.features)


def _pool(x: Float[Array, 'n h w'], height: int, width: int) -> Float[Array, 'n y x']:
  shape = (len(x), height, x.shape[1] // height, width, x.shape[2] // width)
  return x.reshape(shape).mean((2, 4))


def check(config: ml_collections.ConfigDict, need) -> None:
  """Refuses values of model, vggish and loss that cannot work, see config.check."""
  maps.check(config, need)
  need('model.width', config.model.width % 2 == 0, 'use an even number')
  need(
    'train.phase2_epoch', not config.train.phase2_epoch, 'all of it trains from the start, use 0'
  )
