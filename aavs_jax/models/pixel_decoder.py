"""Pixel decoder: a deformable encoder over strides 32, 16, 8 and one step up to stride 4."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aavs_jax.models.convolutions import Convolution
from aavs_jax.models.deformable_attention import DeformableAttention
from aavs_jax.models.norms import group_norm, layer_norm
from aavs_jax.models.repeat import run_layers
from aavs_jax.models.sampling import resize_maps


def sine_positions(
  height: int, width: int, features: int, *, normalised: bool = True
) -> np.ndarray:
  """float32 [height, width, features]: sines of the position, y half first, then x.

  Positions are 1, 2, ... along an axis; normalised, the last one is 2 pi.
  """
  half = features // 2
  scale = 10000.0 ** (2 * (np.arange(half) // 2) / half)

  def encode(length):
    place = np.arange(1, length + 1)
    if normalised:
      place = place / (length + 1e-6) * 2 * np.pi
    angle = place[:, None] / scale
    return np.stack([np.sin(angle[:, 0::2]), np.cos(angle[:, 1::2])], -1).reshape(length, half)

  y = np.broadcast_to(encode(height)[:, None], (height, width, half))
  x = np.broadcast_to(encode(width)[None, :], (height, width, half))
  return np.concatenate([y, x], -1).astype(np.float32)


class EncoderLayer(nn.Module):
  """Deformable self-attention and a ReLU MLP, each with residual and LayerNorm after it."""

  heads: int
  points: int
  ffn: int
  adapter_variant: str
  sampling: str
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, 'n q d'], positions, reference, shapes):
    attention = DeformableAttention(
      self.heads, self.points, self.adapter_variant, self.sampling, self.dtype, name='attention'
    )
    h = attention(x, positions, reference, shapes)
    x = layer_norm(self.dtype, 'norm1')(x + h)
    h = nn.relu(nn.Dense(self.ffn, dtype=self.dtype, name='fc1')(x))
    h = nn.Dense(x.shape[-1], dtype=self.dtype, name='fc2')(h)
    return layer_norm(self.dtype, 'norm2')(x + h)


class PixelDecoder(nn.Module):
  """From the backbone's four maps to three maps (strides 32, 16, 8) and the mask features.

  The paper calls it an FPN; the release, like Mask2Former, has a deformable encoder of `layers`
  layers and one FPN step at the end.
  """

  hidden: int
  layers: int
  heads: int
  points: int
  ffn: int
  adapter_variant: str
  sampling: str
  remat: str = 'dots'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, maps: Sequence[Float[Array, 'n y x c']]
  ) -> tuple[list[Float[Array, 'n y x d']], Float[Array, 'n h w d']]:
    def norm(name):
      return group_norm(min(32, self.hidden), self.dtype, name)

    convolution = functools.partial(
      Convolution,
      self.hidden,
      dtype=self.dtype,
      kernel_init=nn.initializers.lecun_normal(),
      bias_init=nn.initializers.zeros,
    )
    level_embedding = self.param('level_embedding', nn.initializers.normal(1.0), (3, self.hidden))
    tokens, positions, reference, shapes = [], [], [], []
    for level, features in enumerate(reversed(maps[1:])):
      n, height, width, _ = features.shape
      projection = convolution(size=1, name=f'input{level}_projection')
      h = norm(f'input{level}_norm')(projection(features))
      tokens.append(h.reshape(n, height * width, self.hidden))
      sines = sine_positions(height, width, self.hidden).reshape(-1, self.hidden)
      positions.append(sines + level_embedding[level])
      y, x = np.divmod(np.arange(height * width), width)
      reference.append(np.stack([(x + 0.5) / width, (y + 0.5) / height], -1))
      shapes.append((height, width))
    x = jnp.concatenate(tokens, 1)
    positions = jnp.concatenate(positions)
    reference = jnp.asarray(np.concatenate(reference), jnp.float32)
    layer = functools.partial(
      EncoderLayer,
      self.heads,
      self.points,
      self.ffn,
      self.adapter_variant,
      self.sampling,
      self.dtype,
    )
    x, _ = run_layers(
      self,
      [layer] * self.layers,
      [f'layer{i}' for i in range(self.layers)],
      lambda layer, _, x: (layer(x, positions, reference, tuple(shapes)), None),
      x,
      period=1,
      remat=self.remat,
    )

    outputs, start = [], 0
    for height, width in shapes:
      part = x[:, start : start + height * width]
      outputs.append(part.reshape(-1, height, width, self.hidden))
      start += height * width

    lateral = convolution(size=1, use_bias=False, name='lateral')
    h = norm('lateral_norm')(lateral(maps[0]))
    h = h + resize_maps(outputs[-1], maps[0].shape[1:3])
    smooth = convolution(size=3, use_bias=False, name='smooth')
    h = nn.relu(norm('smooth_norm')(smooth(h)))
    return outputs, convolution(size=1, name='mask_features')(h)
