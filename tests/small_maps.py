"""TPAVI and AVSegFormer small enough to compile in seconds: --config tests/small_maps.py:tpavi.

Of S4 so, of AVSS's two stages as tests/small_maps.py:tpavi_stage1.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from aavs_jax import methods
from aavs_jax.configs import (
  avsegformer_avss_stage1,
  avsegformer_avss_stage2,
  avsegformer_s4,
  tpavi_avss_stage1,
  tpavi_avss_stage2,
  tpavi_s4,
)
from aavs_jax.methods.method import Method
from aavs_jax.perf import bench
from aavs_jax.training.state import Flat, flat_shapes, unflatten

SMALL_PVT = dict(
  kind='pvt_v2', dims=(4, 4, 8, 8), depths=(1, 1, 1, 1), reductions=(8, 4, 2, 1), mlp_ratio=2,
  drop_path=0.0,
)  # fmt: skip
SMALL_RESNET = dict(kind='resnet', stem=4, planes=(2, 2, 2, 2), blocks=(1, 1, 1, 1))


_FILES = {
  'tpavi': tpavi_s4, 'tpavi_stage1': tpavi_avss_stage1, 'tpavi_stage2': tpavi_avss_stage2,
  'avsegformer': avsegformer_s4, 'avsegformer_stage1': avsegformer_avss_stage1,
  'avsegformer_stage2': avsegformer_avss_stage2,
}  # fmt: skip


def get_config(name='tpavi', backbone='pvt_v2'):
  """Of a key of _FILES; on ResNet also as 'tpavi+resnet'."""
  name, _, other = name.partition('+')
  backbone = other or backbone
  config = _FILES[name].get_config({'pvt_v2': 'pvt_v2', 'resnet': 'resnet50'}[backbone])
  config.data.image_size = config.data.eval_size = 32
  config.data.batch_items = 2
  config.model.backbone = SMALL_PVT if backbone == 'pvt_v2' else SMALL_RESNET
  config.model.head = (4, 4)
  if config.method == 'tpavi':
    config.model.width = 8
  else:
    config.model.update(
      hidden=32, heads=2, queries=3, encoder_layers=1, encoder_ffn=8, decoder_layers=1,
      decoder_ffn=8, generator_layers=1, generator_ffn=8, mlp_hidden=8, spare_fpn=4,
    )  # fmt: skip
    config.train.phase2_epoch = int(name == 'avsegformer')
  config.vggish.conv_widths = (2, 2, 4, 4, 4, 4)
  config.vggish.dense_widths = (16, 16)
  config.vggish.embedding = 8
  config.optimizer.lr = config.optimizer.lr_phase2 = 1e-3
  config.train.epochs = 2.0
  config.train.checkpoint_every_steps = 4
  config.train.log_every_steps = 1
  return config


class Model(NamedTuple):
  """A model and what it gives in evaluation, compiled once for each number of frames."""

  config: ml_collections.ConfigDict
  method: Method
  flat: Flat
  outputs: Callable


@functools.cache
def model(name, backbone='pvt_v2', use_prior=False):
  """Of the binary task. With a prior it has the same numbers as without."""
  config = get_config(name, backbone)
  config.use_prior = use_prior
  method = methods.of(config)
  flat = numbers(method)
  run = jax.jit(lambda batch: method.apply(unflatten(flat), batch)[0])
  return Model(config, method, flat, run)


def numbers(method):
  """All numbers of a model, none of them such that it does nothing; not compiled, so at once."""
  rng = np.random.default_rng(0)
  flat = {}
  for path, leaf in flat_shapes(method).items():
    if path.endswith(('/scale', '/var')):
      flat[path] = np.ones(leaf.shape, np.float32)
    elif path.startswith('statistics/'):
      flat[path] = np.zeros(leaf.shape, leaf.dtype)
    else:
      spread = 0.1 if path.endswith('bias') else max(math.prod(leaf.shape[:-1]), 1) ** -0.5
      flat[path] = spread * rng.standard_normal(leaf.shape, np.float32)
  return flat


def batch(config, frames):
  """A batch of noise with an object in each frame."""
  return {name: np.asarray(value) for name, value in bench.random_batch(config, frames).items()}
