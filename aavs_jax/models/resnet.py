"""ResNet of bottlenecks (arXiv 1512.03385), as torchvision has it."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from aavs_jax.models.convolutions import Convolution
from aavs_jax.models.norms import BatchNorm


def _conv(features: int, size: int, stride: int, dtype: Any, name: str) -> nn.Module:
  kernel_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
  common = dict(use_bias=False, kernel_init=kernel_init, dtype=dtype, name=name)
  if stride == 1:
    return Convolution(features, size, **common)
  return nn.Conv(features, (size, size), (stride, stride), size // 2, **common)


class Bottleneck(nn.Module):
  """1x1, 3x3 with the stride, 1x1 to four times the width."""

  planes: int
  stride: int
  shortcut: bool  # whether the skip has a convolution
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, 'n h w c'], train: bool) -> Float[Array, 'n y x d']:
    h = x
    widths = (self.planes, self.planes, 4 * self.planes)
    for i, (size, stride) in enumerate(((1, 1), (3, self.stride), (1, 1))):
      h = _conv(widths[i], size, stride, self.dtype, f'conv{i + 1}')(h)
      h = BatchNorm(self.dtype, name=f'norm{i + 1}')(h, train)
      if i < 2:
        h = nn.relu(h)
    if self.shortcut:
      x = _conv(4 * self.planes, 1, self.stride, self.dtype, 'shortcut')(x)
      x = BatchNorm(self.dtype, name='shortcut_norm')(x, train)
    return nn.relu(x + h)


class ResNet(nn.Module):
  """Four feature maps at strides 4, 8, 16, 32.

  Published size (ResNet-50): stem 64, planes (64, 128, 256, 512), blocks (3, 4, 6, 3). BatchNorm is
  by the batch in training, whether parameters train or not. As in the releases of both methods the
  last two stages are there twice, and the second of them, `spare`, does nothing. remat: 'full' has
  the backward pass compute the blocks again; all other policies keep what they compute.
  """

  stem: int
  planes: tuple[int, ...]
  blocks: tuple[int, ...]
  remat: str = 'none'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, frames: Float[Array, 'n h w 3'], train: bool) -> list[Float[Array, 'n y x d']]:
    block = nn.remat(Bottleneck, static_argnums=2) if self.remat == 'full' else Bottleneck

    def stage(index, x, prefix):
      for i in range(self.blocks[index]):
        stride = 2 if index and not i else 1
        name = f'{prefix}{index}_block{i}'
        x = block(self.planes[index], stride, not i, self.dtype, name=name)(x, train)
      return x

    x = _conv(self.stem, 7, 2, self.dtype, 'stem')(frames.astype(self.dtype))
    x = nn.relu(BatchNorm(self.dtype, name='stem_norm')(x, train))
    x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    maps = []
    for index in range(4):
      x = stage(index, x, 'stage')
      maps.append(x)
    if self.is_initializing():
      stage(3, stage(2, maps[1], 'spare'), 'spare')
    return maps
