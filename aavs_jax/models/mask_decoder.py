"""Masked-attention decoder, with the three places where the prior mask enters in stage 2."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from aavs_jax.models.adapters import AdaptedProjection
from aavs_jax.models.attention import attend
from aavs_jax.models.audio_queries import TorchDense
from aavs_jax.models.norms import layer_norm
from aavs_jax.models.pixel_decoder import sine_positions
from aavs_jax.models.repeat import run_layers
from aavs_jax.models.sampling import resize

SILENT_BELOW, SOUNDING_ABOVE = 0.4, 0.6  # thresholds of the robust audio-aware key


@flax.struct.dataclass
class Outputs:
  """All prediction sets: before the decoder's first layer and after each; the last is final."""

  class_logits: Float[Array, 's n q c']  # the last of the c entries is the null class
  mask_embeddings: Float[Array, 's n q d']
  mask_features: Float[Array, 'n h w d']  # at stride 4, the same in all sets

  @property
  def mask_logits(self) -> Float[Array, 's n q h w']:
    """Masks of all queries of all sets. Training needs them of the matched queries alone."""
    return jax.vmap(mask_logits, (0, None))(self.mask_embeddings, self.mask_features)


def mask_logits(
  embeddings: Float[Array, 'n q d'], features: Float[Array, 'n h w d']
) -> Float[Array, 'n q h w']:
  """Masks of queries: float32, as losses and thresholds read them."""
  return jnp.einsum('nqd,nhwd->nqhw', embeddings, features, preferred_element_type=jnp.float32)


class MaskedCrossAttention(nn.Module):
  """Queries read one level of the image, each only inside its own mask.

  One fused input projection, as in torch's multi-head attention; keys carry positions, values do
  not.
  """

  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, query, key, value, blocked):
    width = query.shape[-1]
    kernel = self.param('in_kernel', nn.initializers.xavier_uniform(), (width, 3 * width))
    bias = self.param('in_bias', nn.initializers.zeros, (3 * width,))
    kernels = jnp.split(kernel.astype(self.dtype), 3, axis=1)
    biases = jnp.split(bias.astype(self.dtype), 3)
    q, k, v = (x @ w + b for x, w, b in zip((query, key, value), kernels, biases))
    h = attend(q, k, v, self.heads, blocked)
    return nn.Dense(width, dtype=self.dtype, name='projection')(h)


class QuerySelfAttention(nn.Module):
  """Self-attention over queries; positions on queries and keys; the adapter is in the output."""

  heads: int
  adapter_variant: str
  dtype: Any

  @nn.compact
  def __call__(self, x, positions):
    def dense(name):
      return nn.Dense(
        x.shape[-1], kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype, name=name
      )

    placed = x + positions.astype(x.dtype)
    h = attend(dense('query')(placed), dense('key')(placed), dense('value')(x), self.heads)
    return AdaptedProjection(
      self.adapter_variant, nn.initializers.xavier_uniform(), self.dtype, name='output'
    )(h)


class DecoderLayer(nn.Module):
  """Masked cross-attention, self-attention, MLP; residual and LayerNorm after each."""

  heads: int
  ffn: int
  adapter_variant: str
  dtype: Any

  @nn.compact
  def __call__(self, x, positions, memory, memory_positions, blocked):
    def norm(name, h):
      return layer_norm(self.dtype, name)(h)

    key = memory + memory_positions.astype(memory.dtype)
    cross = MaskedCrossAttention(self.heads, self.dtype, name='cross')
    h = cross(x + positions.astype(x.dtype), key, memory, blocked)
    x = norm('cross_norm', x + h)
    h = QuerySelfAttention(self.heads, self.adapter_variant, self.dtype, name='self')(x, positions)
    x = norm('self_norm', x + h)
    h = nn.relu(nn.Dense(self.ffn, dtype=self.dtype, name='fc1')(x))
    h = nn.Dense(x.shape[-1], dtype=self.dtype, name='fc2')(h)
    return norm('ffn_norm', x + h)


class MaskDecoder(nn.Module):
  """From queries, three feature maps and mask features to all prediction sets.

  use_prior gives it the embeddings of the robust key; mask_fusion, robust_key and prior_attention
  switch the three places off one by one (the paper's ablations).
  """

  num_classes: int
  layers: int
  heads: int
  ffn: int
  adapter_variant: str
  use_prior: bool
  mask_fusion: bool
  robust_key: bool
  prior_attention: bool
  remat: str = 'dots'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    queries: Float[Array, 'n q d'],
    query_positions: Float[Array, 'q d'],
    levels: Sequence[Float[Array, 'n y x d']],
    mask_features: Float[Array, 'n h w d'],
    prior: Float[Array, 'n e e'] | None,
  ) -> Outputs:
    n, _, _, hidden = mask_features.shape
    level_embedding = self.param('level_embedding', nn.initializers.xavier_uniform(), (3, hidden))
    if self.use_prior:
      small = nn.initializers.normal(0.02)
      silent, uncertain, sounding = (
        self.param(f'{name}_key', small, (1, hidden))
        for name in ('silent', 'uncertain', 'sounding')
      )
      if self.mask_fusion:
        stride4 = resize(prior, mask_features.shape[1:3])
        mask_features = mask_features + stride4[..., None].astype(mask_features.dtype)

    memory, memory_positions, small_features = [], [], []
    for i, features in enumerate(levels):
      height, width = features.shape[1:3]
      small_features.append(shrink(mask_features, (height, width)))
      memory.append(features.reshape(n, -1, hidden) + level_embedding[i].astype(features.dtype))
      positions = jnp.asarray(sine_positions(height, width, hidden).reshape(1, -1, hidden))
      if self.use_prior and self.robust_key:
        m = resize(prior, (height, width)).reshape(n, -1, 1)
        positions = positions + jnp.where(
          m <= SILENT_BELOW, silent, jnp.where(m >= SOUNDING_ABOVE, sounding, uncertain)
        )
      memory_positions.append(positions)

    norm = layer_norm(self.dtype, 'norm')
    classify = TorchDense(self.num_classes + 1, name='class_predictor')
    embed = [nn.Dense(hidden, dtype=self.dtype, name=f'mask_embedding{i}') for i in range(3)]

    def predict(x):
      x = norm(x)
      embeddings = embed[2](nn.relu(embed[1](nn.relu(embed[0](x)))))
      return classify(x.astype(jnp.float32)), embeddings

    def blocked_at(embeddings, level):
      return seeing(blocked_outside(embeddings, small_features[level]))

    def call(layer, level, carry):
      x, blocked = carry
      x = layer(x, query_positions, memory[level], memory_positions[level], blocked)
      prediction = predict(x)
      return (x, blocked_at(prediction[1], (level + 1) % len(levels))), prediction

    x = queries.astype(self.dtype)
    first = predict(x)
    if self.use_prior and self.prior_attention:
      blocked = (resize(prior, levels[0].shape[1:3]) < 0.5).reshape(n, 1, -1)
      blocked = seeing(jnp.broadcast_to(blocked, (n, x.shape[1], blocked.shape[-1])))
    else:
      blocked = blocked_at(first[1], 0)
    layer = functools.partial(DecoderLayer, self.heads, self.ffn, self.adapter_variant, self.dtype)
    _, predictions = run_layers(
      self,
      [layer] * self.layers,
      [f'layer{i}' for i in range(self.layers)],
      call,
      (x, blocked),
      period=len(levels),
      remat=self.remat,
    )
    classes, embeddings = map(jnp.stack, zip(first, *predictions))
    return Outputs(classes, embeddings, mask_features)


def shrink(
  mask_features: Float[Array, 'n h w d'], size: tuple[int, int]
) -> Float[Array, 'n y x d']:
  """Mask features as a level of this size has them. No gradient."""
  features = jax.lax.stop_gradient(mask_features)
  return resize(features.astype(jnp.float32), size, (1, 2)).astype(features.dtype)


def seeing(blocked: Bool[Array, 'n q k']) -> Bool[Array, 'n q k']:
  """The same, but a query with everything blocked is unblocked everywhere."""
  return blocked & ~jnp.all(blocked, -1, keepdims=True)


def blocked_outside(
  embeddings: Float[Array, 'n q d'], features: Float[Array, 'n y x d']
) -> Bool[Array, 'n q k']:
  """Where a query may not look: its mask, resized to the level, has probability below one half.

  Resizing is linear: the mask of resized features is the resized mask, for a fraction of the work.
  """
  masks = mask_logits(jax.lax.stop_gradient(embeddings), features)
  return (masks < 0).reshape(*masks.shape[:2], -1)
