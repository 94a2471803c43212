"""PVT-v2, a pyramid of transformers whose keys are reduced in space (arXiv 2106.13797)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aavs_jax.models.activations import gelu
from aavs_jax.models.attention import attend
from aavs_jax.models.convolutions import DepthwiseConvolution
from aavs_jax.models.norms import layer_norm
from aavs_jax.models.repeat import run_layers

_trunc_normal = nn.initializers.truncated_normal(0.02)
_of_fan_out = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class ReducedAttention(nn.Module):
  """Every position looks at the map, made smaller by a convolution if `reduction` is above 1."""

  heads: int
  reduction: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, 'n h w d']) -> Float[Array, 'n h w d']:
    n, height, width, dim = x.shape

    def dense(features, name):
      return nn.Dense(features, kernel_init=_trunc_normal, dtype=self.dtype, name=name)

    query = dense(dim, 'query')(x).reshape(n, height * width, dim)
    if self.reduction > 1:
      size = (self.reduction, self.reduction)
      x = nn.Conv(
        dim, size, size, 'VALID', kernel_init=_of_fan_out, dtype=self.dtype, name='reduction'
      )(x)
      x = layer_norm(self.dtype, 'reduction_norm')(x)
    key, value = jnp.split(dense(2 * dim, 'key_value')(x).reshape(n, -1, 2 * dim), 2, axis=-1)
    h = attend(query, key, value, self.heads).reshape(n, height, width, dim)
    return dense(dim, 'projection')(h)


class Block(nn.Module):
  """Attention, and an MLP with a depthwise convolution in it; stochastic depth on both."""

  heads: int
  mlp_ratio: int
  reduction: int
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, 'n h w d'], drop_path: Float[Array, ''] | None
  ) -> Float[Array, 'n h w d']:
    """`drop_path` is the probability to leave a branch out, None in evaluation."""
    dim = x.shape[-1]

    def added(h):
      if drop_path is None:
        return x + h
      kept = jax.random.bernoulli(self.make_rng('drop_path'), 1 - drop_path, (len(h), 1, 1, 1))
      return x + jnp.where(kept, h / (1 - drop_path), 0).astype(h.dtype)

    h = layer_norm(self.dtype, 'norm1', 1e-6)(x)
    x = added(ReducedAttention(self.heads, self.reduction, self.dtype, name='attention')(h))
    h = layer_norm(self.dtype, 'norm2', 1e-6)(x)
    wide = dim * self.mlp_ratio
    h = nn.Dense(wide, kernel_init=_trunc_normal, dtype=self.dtype, name='fc1')(h)
    h = DepthwiseConvolution(self.dtype, _of_fan_out, name='depthwise')(h)
    h = gelu(h)
    return added(nn.Dense(dim, kernel_init=_trunc_normal, dtype=self.dtype, name='fc2')(h))


class PVTv2(nn.Module):
  """Four feature maps at strides 4, 8, 16, 32.

  Published size (B5): dims (64, 128, 320, 512), depths (3, 6, 40, 3), reductions (8, 4, 2, 1). All
  PVT-v2 have as many heads of dims[0] channels as a stage's width holds. drop_path rises linearly
  from 0 to its value over the blocks.
  """

  dims: tuple[int, ...]
  depths: tuple[int, ...]
  reductions: tuple[int, ...]
  mlp_ratio: int
  drop_path: float
  remat: str = 'dots'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, frames: Float[Array, 'n h w 3'], train: bool) -> list[Float[Array, 'n y x d']]:
    drops = train and self.drop_path > 0
    x, done = frames.astype(self.dtype), jnp.zeros(())
    last = max(sum(self.depths) - 1, 1)
    maps = []
    for stage, (dim, depth) in enumerate(zip(self.dims, self.depths)):
      size, stride = (3, 2) if stage else (7, 4)
      x = nn.Conv(
        dim,
        (size, size),
        (stride, stride),
        size // 2,
        kernel_init=_of_fan_out,
        dtype=self.dtype,
        name=f'stage{stage}_embed',
      )(x)
      x = layer_norm(self.dtype, f'stage{stage}_embed_norm')(x)
      block = functools.partial(
        Block, dim // self.dims[0], self.mlp_ratio, self.reductions[stage], self.dtype
      )

      def call(block, _, carry):
        x, done = carry
        return (block(x, done / last * self.drop_path if drops else None), done + 1), None

      (x, done), _ = run_layers(
        self,
        [block] * depth,
        [f'stage{stage}_block{i}' for i in range(depth)],
        call,
        (x, done),
        period=1,
        remat=self.remat,
        rng='drop_path' if drops else None,
      )
      x = layer_norm(self.dtype, f'stage{stage}_norm', 1e-6)(x)
      maps.append(x)
    return maps
