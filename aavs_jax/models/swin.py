"""Swin transformer with adapters A1 and A3 in every block."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aavs_jax.models.activations import gelu
from aavs_jax.models.adapters import Adapter
from aavs_jax.models.norms import layer_norm
from aavs_jax.models.repeat import run_layers

_trunc_normal = nn.initializers.truncated_normal(0.02)


def relative_position_index(window: int) -> np.ndarray:
  """int [L, L], L = window**2: row of the bias table for each pair of positions of a window."""
  y, x = np.divmod(np.arange(window * window), window)
  dy = y[:, None] - y[None, :] + window - 1
  dx = x[:, None] - x[None, :] + window - 1
  return dy * (2 * window - 1) + dx


def shift_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
  """float32 [windows, L, L]: -100 between positions that only the cyclic shift made neighbours."""

  def regions(length):
    return np.repeat([0, 1, 2], [length - window, window - shift, shift])

  region = regions(height)[:, None] * 3 + regions(width)[None, :]
  region = region.reshape(height // window, window, width // window, window)
  region = region.transpose(0, 2, 1, 3).reshape(-1, window * window)
  return np.where(region[:, :, None] == region[:, None, :], 0.0, -100.0).astype(np.float32)


def quarters(window: int, first: int) -> np.ndarray:
  """int [L]: positions of a window, y * window + x, quarter by quarter.

  Rows and columns are divided after the first `first`; the quarters are top left, top right, bottom
  left, bottom right.
  """
  halves = np.split(np.arange(window), [first])
  return np.concatenate([(y[:, None] * window + x).ravel() for y in halves for x in halves])


def partition(x: Float[Array, 'n h w d'], window: int) -> Float[Array, 'n r c l d']:
  """A map as rows and columns of windows, filled up with zeros; positions in quarters.

  Windows shifted by half of their side consist of whole quarters of four windows. Blocks stay in
  this order: to the TPU compiler, taking the map apart and rolling it in each block is a third of
  a block of the first stage at the published size, a sixth of one of the third stage.
  """
  n, height, width, d = x.shape
  x = jnp.pad(x, ((0, 0), (0, -height % window), (0, -width % window), (0, 0)))
  rows, columns = x.shape[1] // window, x.shape[2] // window
  x = x.reshape(n, rows, window, columns, window, d).transpose(0, 1, 3, 2, 4, 5)
  halves = jnp.split(x, [window // 2], 3)
  parts = [part for half in halves for part in jnp.split(half, [window // 2], 4)]
  return jnp.concatenate([part.reshape(n, rows, columns, -1, d) for part in parts], 3)


def unite(
  x: Float[Array, 'n r c l d'], window: int, height: int, width: int
) -> Float[Array, 'n h w d']:
  """The map of `partition`."""
  n, rows, columns, _, d = x.shape
  sides = (window // 2, window - window // 2)
  halves, start = [], 0
  for high in sides:
    half = []
    for wide in sides:
      half.append(x[..., start : start + high * wide, :].reshape(n, rows, columns, high, wide, d))
      start += high * wide
    halves.append(jnp.concatenate(half, 4))
  x = jnp.concatenate(halves, 3).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(n, rows * window, columns * window, d)[:, :height, :width]


def shifted(x: Float[Array, 'n r c l d'], window: int) -> Float[Array, 'n r c l d']:
  """Windows that begin half a side further down and right, cyclically; see `quarters`.

  Their quarters are divided after the first window - window // 2.
  """
  s, r = window // 2, window - window // 2
  x = jnp.concatenate([x[..., s * window :, :], jnp.roll(x[..., : s * window, :], -1, 1)], 3)
  upper, lower = x[..., : r * window, :], x[..., r * window :, :]
  return jnp.concatenate(
    [
      upper[..., r * s :, :],
      jnp.roll(upper[..., : r * s, :], -1, 2),
      lower[..., s * s :, :],
      jnp.roll(lower[..., : s * s, :], -1, 2),
    ],
    3,
  )


def shifted_back(x: Float[Array, 'n r c l d'], window: int) -> Float[Array, 'n r c l d']:
  """The windows of which `shifted` made these."""
  s, r = window // 2, window - window // 2
  upper, lower = x[..., : r * window, :], x[..., r * window :, :]
  x = jnp.concatenate(
    [
      jnp.roll(upper[..., r * r :, :], 1, 2),
      upper[..., : r * r, :],
      jnp.roll(lower[..., s * r :, :], 1, 2),
      lower[..., : s * r, :],
    ],
    3,
  )
  return jnp.concatenate([jnp.roll(x[..., r * window :, :], 1, 1), x[..., : r * window, :]], 3)


@jax.custom_vjp
def scaled_scores(
  query: Float[Array, 'n v q h c'], key: Float[Array, 'n v k h c']
) -> Float[Array, 'n v h q k']:
  """Products of queries and keys by the root of their width, float32."""
  scores = jnp.einsum('nvqhc,nvkhc->nvhqk', query, key).astype(jnp.float32)
  return scores * query.shape[-1] ** -0.5


def _score_gradients(arrays, g):
  query, key = arrays
  g = g * query.shape[-1] ** -0.5
  # To the TPU compiler the gradient of bfloat16 scores is an array to be written, that of float32
  # scores a part of both products: a third of what the attention takes. GPUs multiply bfloat16.
  return jax.lax.platform_dependent(
    g, query, key, tpu=_by_float32_scores, default=_by_scores_as_queries
  )


def _by_float32_scores(g, query, key):
  by_query = jnp.einsum('nvhqk,nvkhc->nvqhc', g, key.astype(jnp.float32))
  by_key = jnp.einsum('nvhqk,nvqhc->nvkhc', g, query.astype(jnp.float32))
  return by_query.astype(query.dtype), by_key.astype(key.dtype)


def _by_scores_as_queries(g, query, key):
  g = g.astype(query.dtype)
  return jnp.einsum('nvhqk,nvkhc->nvqhc', g, key), jnp.einsum('nvhqk,nvqhc->nvkhc', g, query)


scaled_scores.defvjp(lambda *arrays: (scaled_scores(*arrays), arrays), _score_gradients)


class WindowAttention(nn.Module):
  """Multi-head self-attention inside windows with relative position bias.

  order: int [L], the positions of a window as they stand in x.
  """

  heads: int
  window: int
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, 'n v l d'], order: np.ndarray, mask: Float[Array, 'v l l'] | None
  ) -> Float[Array, 'n v l d']:
    width = x.shape[-1]

    def project(name):
      h = nn.Dense(width, kernel_init=_trunc_normal, dtype=self.dtype, name=name)(x)
      return h.reshape(*x.shape[:-1], self.heads, width // self.heads)

    query, key, value = project('query'), project('key'), project('value')
    rows = (2 * self.window - 1) ** 2
    table = self.param('relative_position_bias_table', _trunc_normal, (rows, self.heads))
    index = relative_position_index(self.window)[np.ix_(order, order)]
    bias = table.T[:, index]  # a head's values beside each other, as the scores are
    scores = scaled_scores(query, key) + bias
    if mask is not None:
      scores = scores + mask[:, None]
    weights = jax.nn.softmax(scores, -1).astype(self.dtype)
    h = jnp.einsum('nvhqk,nvkhc->nvqhc', weights, value).reshape(x.shape)
    h = nn.Dense(width, kernel_init=_trunc_normal, dtype=self.dtype, name='projection')(h)
    return Adapter(residual=True, dtype=self.dtype, name='adapter')(h)  # A1


class SwinBlock(nn.Module):
  """Window attention and MLP, each with an adapter; stochastic depth on the attention alone.

  height, width: of the map, see `partition`.
  """

  heads: int
  window: int
  shifted: bool
  mlp_ratio: int
  drop_path: float
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, 'n r c l d'], height: int, width: int, train: bool
  ) -> Float[Array, 'n r c l d']:
    n, rows, columns, length, dim = x.shape
    # As the release computes it: a map no larger than the window is padded and shifted all the
    # same (published Swin would shrink the window and not shift).
    window = self.window
    shift = window // 2 if self.shifted else 0

    h = layer_norm(self.dtype, 'norm1')(x)
    if (height, width) != (rows * window, columns * window):
      inside = partition(jnp.ones((1, height, width, 1), bool), window)
      h = jnp.where(inside, h, 0)
    mask = None
    order = quarters(window, window - shift if shift else window // 2)
    if shift:
      h = shifted(h, window)
      mask = shift_mask(rows * window, columns * window, window, shift)
      mask = jnp.asarray(mask[:, order][:, :, order])
    attention = WindowAttention(self.heads, window, self.dtype, name='attention')
    h = attention(h.reshape(n, rows * columns, length, dim), order, mask).reshape(x.shape)
    if shift:
      h = shifted_back(h, window)
    if train and self.drop_path > 0:
      keep = 1.0 - self.drop_path
      kept = jax.random.bernoulli(self.make_rng('drop_path'), keep, (n, 1, 1, 1, 1))
      h = jnp.where(kept, h / keep, 0).astype(h.dtype)
    x = x + h

    h = layer_norm(self.dtype, 'norm2')(x)
    h = nn.Dense(dim * self.mlp_ratio, kernel_init=_trunc_normal, dtype=self.dtype, name='fc1')(h)
    h = gelu(h)
    h = nn.Dense(dim, kernel_init=_trunc_normal, dtype=self.dtype, name='fc2')(h)
    return x + Adapter(residual=True, dtype=self.dtype, name='adapter')(h)  # A3


class PatchMerging(nn.Module):
  """Halves the resolution, doubles the width; odd sizes are padded with zeros."""

  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, 'n h w d']) -> Float[Array, 'n y x e']:
    _, height, width, dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    # Column-major inside the 2x2 patch, the order of the published weights.
    x = jnp.concatenate([x[:, i::2, j::2] for j in range(2) for i in range(2)], -1)
    x = layer_norm(self.dtype, 'norm')(x)
    return nn.Dense(
      2 * dim, use_bias=False, kernel_init=_trunc_normal, dtype=self.dtype, name='reduction'
    )(x)


class Swin(nn.Module):
  """Four feature maps at strides 4, 8, 16, 32, each through a LayerNorm of its own.

  Published size (Swin-B): embed_dim 128, depths (2, 2, 18, 2), heads (4, 8, 16, 32), window 12.
  drop_path is the same in every block, as in the release.
  """

  embed_dim: int
  depths: tuple[int, ...]
  heads: tuple[int, ...]
  window: int
  mlp_ratio: int
  drop_path: float
  remat: str = 'dots'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, frames: Float[Array, 'n h w 3'], train: bool) -> list[Float[Array, 'n y x d']]:
    height, width = frames.shape[1:3]
    x = jnp.pad(frames, ((0, 0), (0, -height % 4), (0, -width % 4), (0, 0))).astype(self.dtype)
    x = nn.Conv(
      self.embed_dim, (4, 4), (4, 4), padding='VALID', dtype=self.dtype, name='patch_embed'
    )(x)
    x = layer_norm(self.dtype, 'patch_norm')(x)
    maps = []
    for stage, (depth, heads) in enumerate(zip(self.depths, self.heads)):
      blocks = [
        functools.partial(
          SwinBlock,
          heads,
          self.window,
          i % 2 == 1,
          self.mlp_ratio,
          self.drop_path,
          self.dtype,
        )
        for i in range(depth)
      ]
      size = x.shape[1:3]
      x, _ = run_layers(
        self,
        blocks,
        [f'stage{stage}_block{i}' for i in range(depth)],
        lambda block, _, x, size=size: (block(x, *size, train), None),
        partition(x, self.window),
        period=2,
        remat=self.remat,
        rng='drop_path' if train and self.drop_path > 0 else None,
      )
      x = unite(x, self.window, *size)
      norm = layer_norm(self.dtype, f'stage{stage}_norm')
      maps.append(norm(x))
      if stage < len(self.depths) - 1:
        x = PatchMerging(self.dtype, name=f'stage{stage}_merge')(x)
    return maps
