"""AVSegFormer as a method (arXiv 2307.01146)."""

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float

from aavs_jax.methods import maps
from aavs_jax.methods.method import Method
from aavs_jax.models.avsegformer import AVSegFormer
from aavs_jax.models.sampling import resize_maps

MAY_BE_ZERO = (*maps.MAY_BE_ZERO, 'model.dropout', 'loss.mixer_weight')


def method(config: ml_collections.ConfigDict) -> Method:
  """The network of config.model and config.vggish on the task of config.task."""
  binary = config.task == 'binary'
  sizes = config.model.to_dict()
  del sizes['backbone']
  network = AVSegFormer(classes=maps.outputs(config), dtype=jnp.dtype(config.dtype), **sizes)

  def loss(outputs, batch, share):
    labels = batch['labels']
    truth = maps.sounding(labels)
    mean = outputs.mask_features.astype(jnp.float32).mean(-1, keepdims=True)
    mean = resize_maps(mean, labels.shape[1:])[..., 0]
    mixer = (dice(mean, truth) * share).sum() * config.loss.mixer_weight
    if binary:
      wrong = dice(outputs.logits[..., 0], truth)
    else:
      wrong = maps.class_entropy(outputs.logits, labels)
    wrong = (wrong * share).sum()
    return wrong + mixer, {'segmentation': wrong, 'mixer': mixer}

  return maps.method(
    config,
    'avsegformer',
    network,
    loss,
    released_batch=2,
    phase2_only=('^backbone/',),
    phase2_continues=True,
    stage_specific=(r'avsegformer/(head|spare_attention)/conv2/',),
    must_match=('model.heads', 'model.encoder_points'),
    forms={'model.sampling': 'gather', 'model.remat': 'none'},
  )


def dice(logits: Float[Array, 'n h w'], truth: Float[Array, 'n h w']) -> Float[Array, ' n']:
  """With squares below, as in the release: near 1 where nothing sounds, whatever is predicted."""
  p = jax.nn.sigmoid(logits)
  both, squares = (p * truth).sum((1, 2)), (p * p + truth * truth).sum((1, 2))
  return 1 - 2 * both / (squares + 0.002)


def check(config: ml_collections.ConfigDict, need) -> None:
  """Refuses values of model, vggish and loss that cannot work, see config.check."""
  maps.check(config, need)
  model = config.model
  need('model.heads', model.hidden % model.heads == 0, f'it must divide the width {model.hidden}')
  need('model.hidden', model.hidden % 32 == 0, 'use a multiple of 32')
  need('model.sampling', model.sampling in ('gather', 'dense'), "'gather' or 'dense'")
  need('model.dropout', model.dropout < 1, 'use a probability below 1')
  need(
    'optimizer.schedule',
    config.optimizer.schedule == 'constant' or not config.train.phase2_epoch,
    'the optimiser goes on when the backbone begins to train, use constant',
  )
  need(
    'train.frozen_dtype',
    config.train.frozen_dtype == 'float32' or not config.train.phase2_epoch,
    'the backbone is frozen at first and must lose nothing, use float32',
  )
