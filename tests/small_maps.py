"""TPAVI and AVSegFormer small enough to compile in seconds: --config tests/small_maps.py:tpavi."""

import jax
import numpy as np

from aavs_jax.configs import avsegformer_s4, tpavi_s4
from aavs_jax.perf import bench
from aavs_jax.training.state import flatten, unflatten

SMALL_PVT = dict(
  kind='pvt_v2', dims=(4, 4, 8, 8), depths=(1, 1, 1, 1), reductions=(8, 4, 2, 1), mlp_ratio=2,
  drop_path=0.0,
)  # fmt: skip
SMALL_RESNET = dict(kind='resnet', stem=4, planes=(2, 2, 2, 2), blocks=(1, 1, 1, 1))


def get_config(method='tpavi', backbone='pvt_v2'):
  config = {'tpavi': tpavi_s4, 'avsegformer': avsegformer_s4}[method].get_config(
    {'pvt_v2': 'pvt_v2', 'resnet': 'resnet50'}[backbone]
  )
  config.data.image_size = config.data.eval_size = 32
  config.data.batch_items = 2
  config.model.backbone = SMALL_PVT if backbone == 'pvt_v2' else SMALL_RESNET
  config.model.head = (4, 4)
  if method == 'tpavi':
    config.model.width = 8
  else:
    config.model.update(
      hidden=32, heads=2, queries=3, encoder_layers=1, encoder_ffn=8, decoder_layers=1,
      decoder_ffn=8, generator_layers=1, generator_ffn=8, mlp_hidden=8, spare_fpn=4,
    )  # fmt: skip
    config.train.phase2_epoch = 1
  config.vggish.conv_widths = (2, 2, 4, 4, 4, 4)
  config.vggish.dense_widths = (16, 16)
  config.vggish.embedding = 8
  config.optimizer.lr = config.optimizer.lr_phase2 = 1e-3
  config.train.epochs = 2.0
  config.train.checkpoint_every_steps = 4
  config.train.log_every_steps = 1
  return config


def numbers(method):
  """All numbers of a model as it is initialised."""
  return flatten(jax.jit(method.init)(jax.random.key(0)))


def batch(config, frames):
  """A batch of noise with an object in each frame."""
  return {name: np.asarray(value) for name, value in bench.random_batch(config, frames).items()}


def outputs(method, flat, batch):
  """What the network gives in evaluation."""
  return jax.jit(lambda *arguments: method.apply(*arguments)[0])(unflatten(flat), batch)
