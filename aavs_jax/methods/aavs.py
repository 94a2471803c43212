"""AAVS, the model and loss of Stepping Stones, as a method (paper, sections 3.2 and 3.3)."""

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float

from aavs_jax.methods import set_loss
from aavs_jax.methods.matching import Targets
from aavs_jax.methods.method import Method, need_whole
from aavs_jax.models.aavs import AAVS
from aavs_jax.models.mask_decoder import mask_logits
from aavs_jax.models.repeat import REMAT_POLICIES
from aavs_jax.models.sampling import resize
from aavs_jax.models.vggish import VGGish
from aavs_jax.types import Variables

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

SWIN_ADAPTERS = (r'aavs/backbone/.*adapter/',)
STAGE_SPECIFIC = (
  r'aavs/decoder/class_predictor/',
  r'aavs/decoder/(silent|uncertain|sounding)_key',
  r'aavs/queries/',
)
MAY_BE_ZERO = (
  'model.swin.depths', 'model.swin.drop_path', 'model.encoder_layers', 'model.decoder_layers',
  'loss.class_weight', 'loss.mask_weight', 'loss.dice_weight', 'loss.matching_class_weight',
  'loss.matching_mask_weight', 'loss.matching_dice_weight', 'loss.uncertain_share',
)  # fmt: skip


def method(config: ml_collections.ConfigDict) -> Method:
  """The AAVS model of config.model and config.vggish on the task of config.task."""
  dtype = jnp.dtype(config.dtype)
  sizes = config.model.to_dict()
  model = AAVS(num_classes=config.num_classes, use_prior=config.use_prior, dtype=dtype, **sizes)
  vggish = VGGish(**config.vggish.to_dict(), dtype=dtype)
  image_size, eval_size = config.data.image_size, config.data.eval_size

  def init(key):
    audio_key, model_key = jax.random.split(key)
    log_mel = jnp.zeros((1, 96, 64))
    frames = jnp.zeros((1, image_size, image_size, 3))
    audio = jnp.zeros((1, config.vggish.embedding))
    prior = jnp.zeros((1, eval_size, eval_size)) if config.use_prior else None
    params = {
      'aavs': model.init(model_key, frames, audio, prior)['params'],
      'vggish': vggish.init(audio_key, log_mel)['params'],
    }
    return Variables(params, {})

  def apply(variables, batch, key=None):
    params, statistics = variables
    audio = vggish.apply({'params': params['vggish']}, batch['log_mel'])
    prior = batch['prior'].astype(jnp.float32) / 255 if config.use_prior else None
    outputs = model.apply(
      {'params': params['aavs']},
      normalise(batch['frames']),
      audio,
      prior,
      train=key is not None,
      rngs={} if key is None else {'drop_path': key},
    )
    return outputs, statistics

  def targets_of(batch):
    return Targets(batch['labels'], batch['target_classes'], batch['weight'], batch['group'])

  def totals(batch):
    return set_loss.totals(targets_of(batch), config.model.num_queries, config.loss)

  def loss(outputs, batch, totals, key):
    count = batch['target_classes'].shape[1]

    def draw(index):
      return set_loss.draw_points(key, index, batch['position'], count, config.loss)

    total, terms = set_loss.loss(
      outputs, targets_of(batch), draw, totals, config.loss, config.model.sampling
    )
    # Of the final prediction set alone.
    return total, {name: terms[name][-1] for name in ('class', 'mask', 'dice')}

  def predict(outputs):
    masks = mask_logits(outputs.mask_embeddings[-1], outputs.mask_features)
    scores = class_scores(masks, outputs.class_logits[-1], image_size, eval_size)
    return scores if config.task == 'binary' else jnp.argmax(scores, 1).astype(jnp.uint8)

  return Method(
    init,
    apply,
    totals,
    loss,
    predict,
    inputs=('frames', 'log_mel') + ('prior',) * config.use_prior,
    dilated_truth=True,
    phase2_only=SWIN_ADAPTERS,
    stage_specific=STAGE_SPECIFIC,
    must_match=('model.adapter_variant', 'model.heads', 'model.swin.heads', 'vggish.final_relu'),
    forms={'model.sampling': 'gather', 'model.remat': 'none'},
  )


def normalise(frames: jax.Array) -> jax.Array:
  """uint8 RGB to the backbone's input; on the device, so that frames travel as bytes."""
  return (frames.astype(jnp.float32) / 255 - jnp.array(IMAGE_MEAN)) / jnp.array(IMAGE_STD)


def class_scores(
  masks: Float[Array, 'n q h w'],
  class_logits: Float[Array, 'n q c'],
  image_size: int,
  out_size: int,
) -> Float[Array, 'n k e e']:
  """score[c] = sum over queries of class probability times mask probability; none of null.

  Masks (logits, stride 4) are resized to the image before the sigmoid, scores to out_size after the
  sum; both bilinear without antialiasing. The argmax over c is the predicted map.
  """
  masks = resize(jnp.moveaxis(masks, 1, -1), (image_size, image_size), (1, 2))
  classes = jax.nn.softmax(class_logits, -1)[..., :-1]
  scores = jnp.einsum('nhwq,nqc->nhwc', jax.nn.sigmoid(masks), classes)
  return jnp.moveaxis(resize(scores, (out_size, out_size), (1, 2)), -1, 1)


def check(config: ml_collections.ConfigDict, need) -> None:
  """Refuses values of model, vggish and loss that cannot work, see config.check."""
  need_whole(config, need, 'model', 'vggish')
  model, swin, loss = config.model, config.model.swin, config.loss
  need(
    'model.adapter_variant',
    model.adapter_variant in ('replace', 'after', 'none'),
    "use 'replace' (stage 1 of the release), 'after' (stage 2) or 'none' (Mask2Former)",
  )
  need('model.sampling', model.sampling in ('gather', 'dense'), "'gather' or 'dense'")
  need('model.remat', model.remat in REMAT_POLICIES, f'use one of {tuple(REMAT_POLICIES)}')
  need(
    'data.max_targets',
    config.data.max_targets <= model.num_queries,
    f'there are {model.num_queries} queries, each takes one target at most',
  )
  need('data.image_size', config.data.image_size % 32 == 0, 'use a multiple of 32 pixels')
  need('model.swin.depths', len(swin.depths) == 4, 'give the blocks of four stages')
  need('model.swin.heads', len(swin.heads) == 4, 'give four numbers')
  need('model.swin.drop_path', swin.drop_path < 1, 'use a probability below 1')
  need('model.hidden', model.hidden % 32 == 0, 'use a multiple of 32')
  need('model.heads', model.hidden % model.heads == 0, f'it must divide the width {model.hidden}')
  widths = [swin.embed_dim * 2**stage for stage in range(4)]
  divide = all(width % heads == 0 for width, heads in zip(widths, swin.heads))
  need('model.swin.heads', divide, f'they must divide the widths {widths}')
  need('vggish.conv_widths', len(config.vggish.conv_widths) == 6, 'give six numbers')
  need('loss.uncertain_share', loss.uncertain_share <= 1, 'use a share of at most 1')
