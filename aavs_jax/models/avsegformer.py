"""AVSegFormer (AAAI 2024, arXiv 2307.01146): from a backbone's maps to logits.

As its release computes it, quirks included. Frames do not see each other.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aavs_jax.models.activations import gelu
from aavs_jax.models.attention import FusedAttention, attend
from aavs_jax.models.audio_queries import TorchDense
from aavs_jax.models.convolutions import Convolution, Head
from aavs_jax.models.deformable_attention import DeformableAttention
from aavs_jax.models.norms import group_norm, layer_norm
from aavs_jax.models.pixel_decoder import sine_positions
from aavs_jax.models.repeat import run_layers
from aavs_jax.models.sampling import resize_maps
from aavs_jax.models.tpavi import fit_prior

_xavier = nn.initializers.xavier_uniform()


class Outputs(NamedTuple):
  logits: Float[Array, 'n h w c']  # at the size of the frames
  mask_features: Float[Array, 'n y x d']  # after the mixer, as its loss reads them


class FeedForward(nn.Module):
  """Dense, GELU, dense, with dropout after both."""

  width: int
  dropout: float
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, 'n q d'], train: bool) -> Float[Array, 'n q d']:
    drop = nn.Dropout(self.dropout, deterministic=not train)
    h = nn.Dense(self.width, kernel_init=_xavier, dtype=self.dtype, name='fc1')(x)
    h = drop(gelu(h))
    return drop(nn.Dense(x.shape[-1], kernel_init=_xavier, dtype=self.dtype, name='fc2')(h))


class EncoderLayer(nn.Module):
  """Deformable self-attention over the levels and an MLP, each with residual and LayerNorm."""

  heads: int
  points: int
  ffn: int
  dropout: float
  sampling: str
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, 'n q d'], positions, reference, shapes, train: bool):
    attention = DeformableAttention(
      self.heads, self.points, 'none', self.sampling, self.dtype, name='attention'
    )
    h = attention(x, positions, reference, shapes)
    h = nn.Dropout(self.dropout, deterministic=not train)(h)
    x = layer_norm(self.dtype, 'norm1')(x + h)
    h = FeedForward(self.ffn, self.dropout, self.dtype, name='mlp')(x, train)
    return layer_norm(self.dtype, 'norm2')(x + h)


class QueryLayer(nn.Module):
  """Self-attention among queries, attention to what is given, MLP; residual and LayerNorm each.

  A layer of the query generator (without biases, with one key: the sound) and of the decoder.
  """

  heads: int
  ffn: int
  bias: bool
  dropout: float
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, 'n q d'], memory: Float[Array, 'n k d'], train: bool
  ) -> Float[Array, 'n q d']:
    def attention(name):
      return FusedAttention(self.heads, self.bias, self.dropout, self.dtype, name=name)

    drop = nn.Dropout(self.dropout, deterministic=not train)
    x = layer_norm(self.dtype, 'norm1')(x + drop(attention('self')(x, x, train)))
    x = layer_norm(self.dtype, 'norm2')(x + drop(attention('cross')(x, memory, train)))
    mlp = FeedForward(self.ffn, self.dropout, self.dtype, name='mlp')
    return layer_norm(self.dtype, 'norm3')(x + mlp(x, train))


class QueryLayers(nn.Module):
  """Query layers, one after the other."""

  layers: int
  heads: int
  ffn: int
  bias: bool
  dropout: float
  remat: str
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, 'n q d'], memory: Float[Array, 'n k d'], train: bool
  ) -> Float[Array, 'n q d']:
    layer = functools.partial(QueryLayer, self.heads, self.ffn, self.bias, self.dropout, self.dtype)
    x, _ = run_layers(
      self,
      [layer] * self.layers,
      [f'layer{i}' for i in range(self.layers)],
      lambda layer, _, x: (layer(x, memory, train), None),
      x,
      period=1,
      remat=self.remat,
      rng='dropout' if train and self.dropout > 0 else None,
    )
    return x


class Encoder(nn.Module):
  """The three coarser levels, finest first, through deformable layers."""

  layers: int
  heads: int
  points: int
  ffn: int
  dropout: float
  sampling: str
  remat: str
  dtype: Any

  @nn.compact
  def __call__(
    self, maps: list[Float[Array, 'n y x d']], train: bool
  ) -> tuple[Float[Array, 'n k d'], Float[Array, 'n y x d']]:
    """All tokens, and those of the finest of the maps as a map."""
    n, *_, width = maps[0].shape
    level_embedding = self.param('level_embedding', nn.initializers.normal(1.0), (3, width))
    shapes = tuple(x.shape[1:3] for x in maps)
    positions, reference = [], []
    for level, (rows, columns) in enumerate(shapes):
      sines = sine_positions(rows, columns, width, normalised=False).reshape(-1, width)
      positions.append(sines + level_embedding[level])
      y, x = np.divmod(np.arange(rows * columns), columns)
      reference.append(np.stack([(x + 0.5) / columns, (y + 0.5) / rows], -1))
    positions = jnp.concatenate(positions)
    reference = jnp.asarray(np.concatenate(reference), jnp.float32)
    layer = functools.partial(
      EncoderLayer, self.heads, self.points, self.ffn, self.dropout, self.sampling, self.dtype
    )
    x, _ = run_layers(
      self,
      [layer] * self.layers,
      [f'layer{i}' for i in range(self.layers)],
      lambda layer, _, x: (layer(x, positions, reference, shapes, train), None),
      jnp.concatenate([x.reshape(n, -1, width) for x in maps], 1),
      period=1,
      remat=self.remat,
      rng='dropout' if train and self.dropout > 0 else None,
    )
    rows, columns = shapes[0]
    return x, x[:, : rows * columns].reshape(n, rows, columns, width)


class Mixer(nn.Module):
  """A gate in 0..1 for every channel: the sound looks at the mask features (section 3.4)."""

  heads: int
  dtype: Any

  @nn.compact
  def __call__(
    self, sound: Float[Array, 'n d'], features: Float[Array, 'n y x d']
  ) -> Float[Array, 'n d']:
    n, *_, width = features.shape

    def dense(out, name, use_bias=False):
      return nn.Dense(out, use_bias, kernel_init=_xavier, dtype=self.dtype, name=name)

    query = dense(width, 'query')(sound)[:, None]
    both = dense(2 * width, 'key_value')(features.reshape(n, -1, width))
    h = attend(query, *jnp.split(both, 2, axis=-1), self.heads)[:, 0]
    return nn.sigmoid(dense(width, 'projection', use_bias=True)(h))


class AVSegFormer(nn.Module):
  """All but the backbone and VGGish; fields are those of config.model.

  What the release has and never uses is there under `spare`, so that no tensor is lost.
  """

  classes: int
  hidden: int
  heads: int
  queries: int
  encoder_layers: int
  encoder_ffn: int
  encoder_points: int
  decoder_layers: int
  decoder_ffn: int
  generator_layers: int
  generator_ffn: int
  mlp_hidden: int
  spare_fpn: int
  head: tuple[int, int]
  dropout: float
  sampling: str
  remat: str
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    maps: list[Float[Array, 'n y x c']],
    audio: Float[Array, 'n a'],
    real: Float[Array, ' n'] | None,
    prior: Float[Array, 'n e e'] | None,
    train: bool,
  ) -> Outputs:
    """Logits of n frames.

    Args:
      maps: of the backbone, strides 4 to 32.
      audio: VGGish embedding of each frame's second, not negative.
      real: 0 for frames that fill up a clip, 1 for others; None if all are real.
      prior: what sounds, in 0..1, added to the mask features; None without.
      train: draws dropout from the rng stream 'dropout'.
    """
    dtype, hidden = self.dtype, self.hidden

    def flagged(x):
      return x if real is None else x * real[:, None, None, None].astype(x.dtype)

    def convolution(features, size, name):
      return Convolution(features, size, dtype, kernel_init=_xavier, name=name)

    def norm(name):
      return group_norm(min(32, hidden), dtype, name)

    sound = TorchDense(hidden, dtype, name='audio_projection')(audio)
    inputs = [
      norm(f'input{i}_norm')(convolution(hidden, 1, f'input{i}')(flagged(x)))
      for i, x in enumerate(maps)
    ]
    memory, finest = Encoder(
      self.encoder_layers,
      self.heads,
      self.encoder_points,
      self.encoder_ffn,
      self.dropout,
      self.sampling,
      self.remat,
      dtype,
      name='encoder',
    )(inputs[1:], train)

    m = norm('lateral_norm')(convolution(hidden, 1, 'lateral')(inputs[0]))
    m = m + resize_maps(finest, m.shape[1:3])
    m = nn.relu(norm('smooth_norm')(convolution(hidden, 3, 'smooth')(m)))
    gate = Mixer(self.heads, dtype, name='mixer')(sound, m)
    m = m * gate[:, None, None]

    generated = self.param('generated_queries', _xavier, (self.queries, hidden)).astype(dtype)
    x = QueryLayers(
      self.generator_layers,
      self.heads,
      self.generator_ffn,
      False,
      0.0,
      self.remat,
      dtype,
      name='generator',
    )(jnp.broadcast_to(generated, (len(m), *generated.shape)), sound[:, None], train)
    x = x + self.param('learned_queries', _xavier, (self.queries, hidden)).astype(dtype)
    x = QueryLayers(
      self.decoder_layers,
      self.heads,
      self.decoder_ffn,
      True,
      self.dropout,
      self.remat,
      dtype,
      name='decoder',
    )(x, memory, train)

    features = m if prior is None else m + fit_prior(prior, m)
    r = jnp.einsum('nqd,nyxd->nyxq', x, features)
    for i, width in enumerate((self.mlp_hidden, self.mlp_hidden, hidden)):
      r = convolution(width, 1, f'query_mlp{i}')(r if i == 0 else nn.relu(r))
    head = functools.partial(
      Head, widths=self.head, scale=4, use_bias=False, dtype=dtype, kernel_init=_xavier
    )
    if self.is_initializing():
      head(classes=self.classes, name='spare_attention')(m)
      for i in range(3):
        convolution(self.spare_fpn, 3, f'spare_fpn{i}')(jnp.zeros((1, 1, 1, self.spare_fpn)))
    return Outputs(flagged(head(classes=self.classes, name='head')(features + r)), flagged(m))
