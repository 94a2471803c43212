"""Multi-scale deformable attention (Deformable DETR) with AAVS's adapter."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from aavs_jax.devices.mesh import on_each_device
from aavs_jax.models.adapters import AdaptedProjection
from aavs_jax.models.repeat import SAMPLED
from aavs_jax.models.sampling import corners, hat_weights


def attend_dense(
  values: Sequence[Float[Array, 'n h w a c']],
  locations: Float[Array, 'n q a l p 2'],
  weights: Float[Array, 'n q a l p'],
) -> Float[Array, 'n q a c']:
  """Weighted sum of samples as one product a level of an attention map and the values.

  Hat weights make the map, queries x pixels a head: no gather and no scatter, as TPUs want it.
  One frame's head after the other, each computed again in the backward pass, so that its map (14 MB
  in bfloat16 at the published size) stays on the chip; queries, the longest axis, are the last.
  """
  heads = values[0].shape[3]

  @jax.checkpoint
  def one_map(head):
    values, locations, weights = head
    total = 0.0
    for level, value in enumerate(values):
      height, width, _ = value.shape
      x = hat_weights(locations[level, :, 0], width).swapaxes(-1, -2)  # p w q
      y = hat_weights(locations[level, :, 1], height).swapaxes(-1, -2)
      y = y * weights[level, :, None]
      # As an einsum this would be a product of 4 terms for each of thousands of queries.
      attention = sum(y[p, :, None] * x[p] for p in range(x.shape[0]))  # h w q
      # Over both axes at once: then the TPU compiler makes the map inside the product.
      total = total + jnp.einsum('hwq,hwc->qc', attention.astype(value.dtype), value)
    return total

  def maps(values, locations, weights):
    out = jax.lax.map(one_map, jax.tree.map(_frames_and_heads, (values, locations, weights)))
    return out.reshape(-1, heads, *out.shape[1:])

  out = on_each_device(maps)(
    [jnp.moveaxis(value, 3, 1) for value in values],  # n a h w c
    jnp.moveaxis(locations, 1, -1),  # n a l p 2 q
    jnp.moveaxis(weights, 1, -1),
  )
  return jnp.moveaxis(out, 1, 2)


def _frames_and_heads(x: Float[Array, 'n a ...']) -> Float[Array, 'n*a ...']:
  return x.reshape(-1, *x.shape[2:])


def attend_gather(
  values: Sequence[Float[Array, 'n h w a c']],
  locations: Float[Array, 'n q a l p 2'],
  weights: Float[Array, 'n q a l p'],
) -> Float[Array, 'n q a c']:
  """The same by reading four pixels a point; costs queries x points, so it is for large maps."""
  on_gpu = jax.checkpoint(read_at_once)
  return jax.lax.platform_dependent(
    values, locations, weights, cuda=on_gpu, rocm=on_gpu, default=read_in_turn
  )


def read_at_once(values, locations, weights):
  """Pixels are multiplied and added as they are read, so that no array holds them.

  In float32: GPUs add that to gradients in hardware, bfloat16 ten times as slowly.
  """
  locations, weights = jnp.moveaxis(locations, 2, 1), jnp.moveaxis(weights, 2, 1)  # n a q ...
  total = 0.0
  for level, value in enumerate(values):
    n, height, width, heads, channels = value.shape
    value = jnp.moveaxis(value.reshape(n, height * width, heads, channels), 2, 1)
    index, weight = _reads(locations[..., level, :, :], weights[..., level, :], height, width)
    # The smaller a map, the more often two threads would add to a pixel's gradient at once.
    copies = -(-values[-1].shape[1] * values[-1].shape[2] // (height * width))
    value = jnp.tile(value, (1, 1, copies, 1))
    index += (jnp.arange(index.shape[2]) % copies * height * width)[:, None]
    # Or they would be computed for every channel.
    index, weight = jax.lax.optimization_barrier((index, weight))
    rows = jnp.take_along_axis(
      value.astype(jnp.float32), index.reshape(n, heads, -1, 1), axis=2, mode='clip'
    )
    total = total + (rows.reshape(*index.shape, channels) * weight[..., None]).sum(3)
  return jnp.moveaxis(total, 1, 2).astype(values[0].dtype)


def read_in_turn(values, locations, weights):
  """One head after the other, each computed again in the backward pass.

  The rows that all heads read are several gigabytes at the published size.
  """

  @jax.checkpoint
  def one_head(head):
    values, locations, weights = head
    total = 0.0
    for level, value in enumerate(values):
      n, height, width, channels = value.shape
      index, weight = _reads(locations[:, :, level], weights[:, :, level], height, width)
      rows = jnp.take_along_axis(
        value.reshape(n, height * width, channels),
        index.reshape(n, -1, 1),
        axis=1,
        mode='clip',  # they are inside already: no row has to be looked at
      )
      rows = rows.reshape(*index.shape, channels)
      total = total + jnp.einsum('nqr,nqrc->nqc', weight.astype(value.dtype), rows)
    return total

  heads_first = (
    [jnp.moveaxis(value, 3, 0) for value in values],
    jnp.moveaxis(locations, 2, 0),
    jnp.moveaxis(weights, 2, 0),
  )
  return jnp.moveaxis(jax.lax.map(one_head, heads_first), 0, 2)


def _reads(locations, weights, height, width):
  """Flat index and weight of each pixel that a query reads of a level, [... q r]."""
  index, corner = (jnp.stack(c, -1) for c in zip(*corners(locations, height, width)))
  weight = weights[..., None] * corner
  return index.reshape(*index.shape[:-2], -1), weight.reshape(*weight.shape[:-2], -1)


def _offset_bias(heads: int, levels: int, points: int):
  """Point i of head a starts i + 1 pixels away in the head's own direction (Deformable DETR)."""
  angle = np.arange(heads) * (2 * np.pi / heads)
  direction = np.stack([np.cos(angle), np.sin(angle)], -1)
  direction = direction / np.abs(direction).max(-1, keepdims=True)
  grid = np.tile(direction[:, None, None], (1, levels, points, 1))
  grid = grid * (np.arange(points) + 1)[None, None, :, None]
  return lambda key, shape, dtype=jnp.float32: jnp.asarray(grid.reshape(shape), dtype)


class DeformableAttention(nn.Module):
  """Each position looks at a few learned points of every level.

  sampling: 'dense' or 'gather', two forms of the same sum; see attend_dense, attend_gather.
  """

  heads: int
  points: int
  adapter_variant: str
  sampling: str
  dtype: Any

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'n q d'],
    positions: Float[Array, 'q d'],
    reference: Float[Array, 'q 2'],
    shapes: tuple[tuple[int, int], ...],
  ) -> Float[Array, 'n q d']:
    n, queries, width = x.shape
    levels, heads = len(shapes), self.heads
    where = x + positions.astype(x.dtype)
    value = nn.Dense(width, dtype=self.dtype, name='value')(x)
    # Where to look is computed in float32: bfloat16 would move samples by whole pixels.
    offsets = nn.Dense(
      heads * levels * self.points * 2,
      kernel_init=nn.initializers.zeros,
      bias_init=_offset_bias(heads, levels, self.points),
      name='offsets',
    )(where.astype(jnp.float32)).reshape(n, queries, heads, levels, self.points, 2)
    weights = nn.Dense(
      heads * levels * self.points, kernel_init=nn.initializers.zeros, name='weights'
    )(where.astype(jnp.float32)).reshape(n, queries, heads, levels * self.points)
    weights = jax.nn.softmax(weights, -1).reshape(n, queries, heads, levels, self.points)
    sizes = jnp.asarray([(w, h) for h, w in shapes], jnp.float32)
    locations = reference[:, None, None, None] + offsets / sizes[:, None]

    values, start = [], 0
    for h, w in shapes:
      part = value[:, start : start + h * w]
      values.append(part.reshape(n, h, w, heads, width // heads))
      start += h * w
    attend = attend_dense if self.sampling == 'dense' else attend_gather
    h = attend(values, locations, weights).reshape(n, queries, width)
    h = checkpoint_name(h, SAMPLED)
    return AdaptedProjection(self.adapter_variant, dtype=self.dtype, name='output')(h)
