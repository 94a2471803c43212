"""Checkpoints such as the release and torchvggish have, of any size, with random weights."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from aavs_jax import methods
from aavs_jax.models.swin import relative_position_index
from aavs_jax.models.vggish import VGGish
from aavs_jax.pytorch.names import released_name, released_order, to_released_layout
from aavs_jax.training.state import flatten
from aavs_jax.types import Variables
from tests import tiny


def small(stage='stage1'):
  """A config of a released model smaller still, and with a VGGish such as torchvggish's."""
  config = tiny.get_config(stage)
  config.vggish.dense_widths = (16, 16)
  # 'replace' and 'after' as in the release.
  config.model.adapter_variant = 'after' if config.use_prior else 'replace'
  return config


def random_released(config: ml_collections.ConfigDict, seed: int) -> dict[str, np.ndarray]:
  """The state dict, in its order, of a released model of the config's sizes, buffers included."""
  template = jax.eval_shape(methods.of(config).init, jax.random.key(0)).params
  tensors = _random({'aavs': template['aavs']}, seed)
  index = relative_position_index(config.model.swin.window)
  for name in list(tensors):
    if name.endswith('relative_position_bias_table'):
      tensors[name.replace('bias_table', 'index')] = index
  return {name: tensors[name] for name in sorted(tensors, key=released_order)}


def random_vggish(config: ml_collections.ConfigDict, seed: int) -> dict[str, np.ndarray]:
  """The state dict of a torchvggish network of the config's sizes, which has two dense layers."""
  model = VGGish(**config.vggish.to_dict())
  template = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 96, 64)))
  tensors = _random({'vggish': template['params']}, seed)

  def order(name):
    part, number, parameter = name.split('.')
    return part == 'embeddings', int(number), parameter == 'bias'

  return {name: tensors[name] for name in sorted(tensors, key=order)}


def _random(template, seed):
  """Standard normals over the root of the fan in; norms about one, all else small."""
  rng = np.random.default_rng(seed)
  tensors = {}
  for path, leaf in flatten(Variables(template, {})).items():
    value = rng.standard_normal(leaf.shape, np.float32)
    if path.endswith('kernel'):
      value *= np.float32(np.prod(leaf.shape[:-1]) ** -0.5)
    else:
      value *= np.float32(0.1)
      value += np.float32(path.endswith('scale'))
    tensors[released_name(path)] = np.ascontiguousarray(to_released_layout(path, value))
  return tensors
