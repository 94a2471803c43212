"""What TPAVI and AVSegFormer have in common: one map of logits a class, and the task's loss on it.

A frame's truth counts where batch['weight'] is 1. A batch may have two keys more than types.Batch
says, which recordings of the releases need: 'audio' [n a], VGGish's embeddings instead of log_mel,
and 'real' [n], 0 for the frames that fill up a clip in AVSS. Our own batches have no such frames.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, UInt8

from aavs_jax.input_pipeline.clips import IGNORE
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.methods.aavs import normalise
from aavs_jax.methods.method import Method, need_whole
from aavs_jax.models.pvt_v2 import PVTv2
from aavs_jax.models.repeat import REMAT_POLICIES
from aavs_jax.models.resnet import ResNet
from aavs_jax.models.sampling import resize_maps
from aavs_jax.models.vggish import VGGish
from aavs_jax.types import Variables

_BACKBONES = {'pvt_v2': PVTv2, 'resnet': ResNet}
MAY_BE_ZERO = ('model.backbone.drop_path',)


def outputs(config: ml_collections.ConfigDict) -> int:
  """Maps that a network has: one a class, or the one of what sounds."""
  return 1 if config.task == 'binary' else config.num_classes


def backbone_of(config: ml_collections.ConfigDict) -> nn.Module:
  """The one that config.model.backbone names; UserError if there is none of that kind."""
  sizes = config.model.backbone.to_dict()
  kind = sizes.pop('kind')
  if kind not in _BACKBONES:
    raise UserError(f'config.model.backbone.kind is {kind!r}: use one of {tuple(_BACKBONES)}')
  return _BACKBONES[kind](**sizes, remat=config.model.remat, dtype=jnp.dtype(config.dtype))


def method(
  config: ml_collections.ConfigDict,
  name: str,
  network: nn.Module,
  loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
  must_match: tuple[str, ...] = (),
  **fields: Any,
) -> Method:
  """The method of a network behind one of the backbones and VGGish.

  Args:
    config: with model.backbone and vggish.
    name: of the network among the parameters.
    network: called as models.tpavi.TPAVI.
    loss: Method.loss without its key, totals of `frames_total`.
    must_match: more of Method.must_match.
    **fields: of Method.
  """
  backbone = backbone_of(config)
  vggish = VGGish(**config.vggish.to_dict(), dtype=jnp.dtype(config.dtype))
  image_size, eval_size = config.data.image_size, config.data.eval_size
  modules = {'backbone': backbone, name: network}

  def init(key):
    keys = jax.random.split(key, 3)
    count = fields.get('unit', 1)
    frames = jnp.zeros((count, 64, 64, 3))
    audio = jnp.zeros((count, config.vggish.embedding))
    made = {'backbone': backbone.init(keys[0], frames, False)}
    maps = jax.eval_shape(lambda: backbone.apply(made['backbone'], frames, False))
    maps = [jnp.zeros(x.shape, x.dtype) for x in maps]
    made[name] = network.init(keys[1], maps, audio, None, None, False)
    params = {module: variables['params'] for module, variables in made.items()}
    params['vggish'] = vggish.init(keys[2], jnp.zeros((1, 96, 64)))['params']
    statistics = {m: v['statistics'] for m, v in made.items() if 'statistics' in v}
    return Variables(params, statistics)

  def apply(variables, batch, key=None):
    train = key is not None
    params, statistics = variables
    real = batch.get('real')
    frames = normalise(batch['frames'])
    if real is not None:
      frames = frames * real[:, None, None, None]
    if 'audio' in batch:
      audio = batch['audio']
    else:
      audio = vggish.apply({'params': params['vggish']}, batch['log_mel'])
    prior = batch['prior'].astype(jnp.float32) / 255 if config.use_prior else None
    new = {}

    def run(module, *arguments):
      held = {'params': params[module], 'statistics': statistics.get(module, {})}
      rngs = {}
      if train:
        of_module = jax.random.fold_in(key, list(modules).index(module))
        names = ('drop_path', 'dropout')
        rngs = dict(zip(names, jax.random.split(of_module)))
      result, changed = modules[module].apply(
        held, *arguments, train, rngs=rngs, mutable=['statistics']
      )
      if module in statistics:
        new[module] = changed['statistics']
      return result

    maps = run('backbone', frames)
    return run(name, maps, audio, real, prior), new

  def totals(batch):
    return jnp.full(batch['weight'].shape, jnp.maximum(batch['weight'].sum(), 1))

  def predict(outputs):
    logits = outputs.logits
    if image_size != eval_size:
      logits = resize_maps(logits, (eval_size, eval_size))
    if config.task == 'semantic':
      return jnp.argmax(logits, -1).astype(jnp.uint8)
    # Scores whose sigmoid(2 s1 - s0), of which the metric takes thresholds, is that of the logit.
    return jnp.stack([jnp.zeros_like(logits[..., 0]), logits[..., 0] / 2], 1)

  return Method(
    init,
    apply,
    totals,
    lambda outputs, batch, totals, key: loss(outputs, batch, batch['weight'] / totals),
    predict,
    inputs=('frames', 'log_mel') + ('prior',) * config.use_prior,
    nonnegative_scores=False,
    must_match=('vggish.final_relu', 'model.backbone.kind', *must_match),
    **fields,
  )


def class_entropy(
  logits: Float[Array, 'n h w c'], labels: UInt8[Array, 'n h w']
) -> Float[Array, ' n']:
  """Cross-entropy of each frame, the mean over its pixels; ignored ones count as if certain."""
  known = labels != IGNORE
  wrong = optax.losses.softmax_cross_entropy_with_integer_labels(
    logits, jnp.where(known, labels, 0).astype(jnp.int32)
  )
  return jnp.where(known, wrong, 0).mean((1, 2))


def sounding(labels: UInt8[Array, 'n h w']) -> Float[Array, 'n h w']:
  """1 where something sounds."""
  return ((labels > 0) & (labels != IGNORE)).astype(jnp.float32)


def check(config: ml_collections.ConfigDict, need) -> None:
  """Refuses values of model.backbone and vggish that cannot work, see config.check."""
  need_whole(config, need, 'model', 'vggish')
  backbone = config.model.backbone
  need('data.image_size', config.data.image_size % 32 == 0, 'use a multiple of 32 pixels')
  need('model.remat', config.model.remat in REMAT_POLICIES, f'use one of {tuple(REMAT_POLICIES)}')
  need('vggish.conv_widths', len(config.vggish.conv_widths) == 6, 'give six numbers')
  need('model.head', len(config.model.head) == 2, 'give the widths of two convolutions')
  if backbone.kind == 'resnet':
    lists = ('planes', 'blocks')
  else:
    lists = ('dims', 'depths', 'reductions')
    divide = all(dim % backbone.dims[0] == 0 for dim in backbone.dims)
    need('model.backbone.dims', divide, 'use multiples of the first, the width of a head')
    sizes = [config.data.image_size // stride for stride in (4, 8, 16, 32)]
    whole = all(size % by == 0 for size, by in zip(sizes, backbone.reductions))
    need('model.backbone.reductions', whole, f'use divisors of the maps, which are {sizes} high')
    need('model.backbone.drop_path', backbone.drop_path < 1, 'use a probability below 1')
  for name in lists:
    need(f'model.backbone.{name}', len(backbone[name]) == 4, 'give one for each of four stages')
