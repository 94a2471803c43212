"""A method as five pure functions; the training loop knows nothing else of the model."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from aavs_jax import losses
from aavs_jax.models.aavs import AAVS
from aavs_jax.models.vggish import VGGish
from aavs_jax.postprocess import class_scores
from aavs_jax.types import Batch, Outputs, Params, Targets

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


class Method(NamedTuple):
  """What a trainer needs of a method."""

  init: Callable[[jax.Array], Params]
  """key -> parameters."""
  apply: Callable[..., Outputs]
  """(params, batch, drop_path_key=None) -> outputs; a key means training."""
  totals: Callable[[Batch], losses.Totals]
  """batch -> what the loss of each of its frames is divided by."""
  loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
  """(outputs, batch, totals, key) -> total and terms; or a part of them, of a part of a batch."""
  predict: Callable[[Outputs], jax.Array]
  """outputs -> scores float32 [n 2 e e] (binary) or class ids uint8 [n e e] (semantic)."""


def normalise(frames: jax.Array) -> jax.Array:
  """uint8 RGB to the backbone's input; on the device, so that frames travel as bytes."""
  return (frames.astype(jnp.float32) / 255 - jnp.array(IMAGE_MEAN)) / jnp.array(IMAGE_STD)


def aavs(config: ml_collections.ConfigDict) -> Method:
  """The AAVS model of config.model and config.vggish on the task of config.task."""
  dtype = jnp.dtype(config.dtype)
  sizes = config.model.to_dict()
  model = AAVS(num_classes=config.num_classes, use_prior=config.use_prior, dtype=dtype, **sizes)
  vggish = VGGish(**config.vggish.to_dict(), dtype=dtype)
  image_size, eval_size = config.data.image_size, config.data.eval_size
  form = config.model.sampling

  def init(key):
    audio_key, model_key = jax.random.split(key)
    log_mel = jnp.zeros((1, 96, 64))
    frames = jnp.zeros((1, image_size, image_size, 3))
    audio = jnp.zeros((1, config.vggish.embedding))
    prior = jnp.zeros((1, eval_size, eval_size)) if config.use_prior else None
    return {
      'aavs': model.init(model_key, frames, audio, prior)['params'],
      'vggish': vggish.init(audio_key, log_mel)['params'],
    }

  def apply(params, batch, drop_path_key=None):
    audio = vggish.apply({'params': params['vggish']}, batch['log_mel'])
    prior = batch['prior'].astype(jnp.float32) / 255 if config.use_prior else None
    train = drop_path_key is not None
    return model.apply(
      {'params': params['aavs']},
      normalise(batch['frames']),
      audio,
      prior,
      train=train,
      rngs={'drop_path': drop_path_key} if train else None,
    )

  def targets_of(batch):
    return Targets(batch['labels'], batch['target_classes'], batch['weight'], batch['group'])

  def totals(batch):
    return losses.totals(targets_of(batch), config.model.num_queries)

  def loss(outputs, batch, totals, key):
    count = batch['target_classes'].shape[1]

    def draw(index):
      return losses.draw_points(key, index, batch['position'], count, config.loss.points)

    return losses.loss(outputs, targets_of(batch), draw, totals, form)

  def predict(outputs):
    scores = class_scores(outputs, image_size, eval_size)
    return scores if config.task == 'binary' else jnp.argmax(scores, 1).astype(jnp.uint8)

  return Method(init, apply, totals, loss, predict)
