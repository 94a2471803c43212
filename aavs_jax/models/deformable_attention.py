"""Multi-scale deformable attention (Deformable DETR) with AAVS's adapter."""

import functools
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
from aavs_jax.models.sampling import corners, hat, pixel_distance, rows_at


def attend_dense(
  values: Sequence[Float[Array, 'n h w a c']],
  locations: Float[Array, 'n q a l p 2'],
  weights: Float[Array, 'n q a l p'],
) -> Float[Array, 'n q a c']:
  """Weighted sum of samples as one product a level of an attention map and the values.

  Hat weights make the map, queries x pixels a head: no gather and no scatter, as TPUs want it.
  A frame at a time, so that its maps stay on the chip; queries, the longest axis, are the last.
  """
  out = on_each_device(_through_maps)(
    [jnp.moveaxis(value, 3, 1) for value in values],  # n a h w c
    jnp.moveaxis(locations[..., 0], 1, -1),  # n a l p q
    jnp.moveaxis(locations[..., 1], 1, -1),
    jnp.moveaxis(weights, 1, -1),
  )
  return jnp.moveaxis(out, 1, 2)


@jax.custom_vjp
def _through_maps(values, x, y, weights):
  """From values n a h w c, x, y and weights n a l p q to n a q c."""

  def one_frame(frame):
    values, x, y, weights = frame
    total = 0.0
    for level, value in enumerate(values):
      attention = _attention_map(value, x[:, level], y[:, level], weights[:, level])
      # Over both axes at once: then the TPU compiler makes the map inside the product.
      total = total + jnp.einsum('ahwq,ahwc->aqc', attention, value)
    return total

  return jax.lax.map(one_frame, (values, x, y, weights))


def _attention_map(value, x, y, weights):
  """What each query reads of each pixel of a level, a h w q, from x, y and weights a p q."""
  _, height, width, _ = value.shape
  total = 0.0
  # A point at a time: as an array of all of them, the TPU compiler takes them apart again. As an
  # einsum it would be a product of 4 terms for each of thousands of queries.
  for p in range(x.shape[1]):
    row = hat(_distance(y[:, p], height)) * weights[:, p, None]
    total = total + row[:, :, None] * hat(_distance(x[:, p], width))[:, None]
  return total.astype(value.dtype)


def _distance(position, length):
  """From every pixel of an axis: ... q to ... length q."""
  return pixel_distance(position, length).swapaxes(-1, -2)


def _slope(distance, length):
  """Of the hat by the position that the distance is of."""
  return jnp.where(jnp.abs(distance) < 1, -jnp.sign(distance) * length, 0.0)


def _level_gradients(value, x, y, weights, g):
  """Gradients of value, x, y and weights of one level by g a q c, the gradient of what was read.

  The gradient of the map lives inside one operation too: it is added up over rows, the outermost
  axis, for each point, and never over columns, which share the registers of vector units.
  """
  _, height, width, _ = value.shape
  attention = _attention_map(value, x, y, weights)
  by_value = jnp.einsum('ahwq,aqc->ahwc', attention, g)
  by_map = jnp.einsum('ahwc,aqc->ahwq', value, g, preferred_element_type=jnp.float32)
  by_x, by_y, by_weight = [], [], []
  for p in range(x.shape[1]):
    across, down = _distance(x[:, p], width), _distance(y[:, p], height)
    of_rows = (by_map * hat(down)[:, :, None]).sum(1)  # a w q
    of_slopes = (by_map * _slope(down, height)[:, :, None]).sum(1)
    by_x.append((of_rows * _slope(across, width)).sum(1))
    by_y.append((of_slopes * hat(across)).sum(1))
    by_weight.append((of_rows * hat(across)).sum(1))
  by_x, by_y, by_weight = (jnp.stack(points, 1) for points in (by_x, by_y, by_weight))
  return by_value, weights * by_x, weights * by_y, by_weight


def _gradients(arrays, g):
  values, *points = arrays
  n, heads, levels, _, _ = points[0].shape
  levelwise = []
  for level in range(levels):
    inputs = (values[level], *(array[:, :, level] for array in points), g)
    group = _heads_at_once(*inputs[:2])
    groups = [array.reshape(-1, group, *array.shape[2:]) for array in inputs]
    out = jax.lax.map(lambda inputs: _level_gradients(*inputs), groups)
    levelwise.append([array.reshape(n, heads, *array.shape[2:]) for array in out])
  by_values, *by_points = zip(*levelwise)
  return list(by_values), *(jnp.stack(array, 2) for array in by_points)


def _heads_at_once(value, x) -> int:
  """Whose sums over rows fit beside each other into the 16 MiB that a TPU's operation may have."""
  _, heads, points, queries = x.shape
  one_head = 2 * points * value.shape[3] * queries * 4
  fitting = [k for k in range(1, heads + 1) if heads % k == 0 and k * one_head <= 10 * 2**20]
  return max(fitting, default=1)


_through_maps.defvjp(lambda *arrays: (_through_maps(*arrays), arrays), _gradients)


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


@jax.custom_vjp
def read_in_turn(values, locations, weights):
  """One head after the other: the rows that all heads read are gigabytes at the published size.

  Nor does the forward pass hold those of one head: on CPUs it takes half to a third of the time and
  a third of the memory so. The backward pass holds them, and is slower otherwise.
  """
  return _by_head(_added_as_read, values, locations, weights)


def _by_head(read, values, locations, weights):
  heads_first = (
    [jnp.moveaxis(value, 3, 0) for value in values],
    jnp.moveaxis(locations, 2, 0),
    jnp.moveaxis(weights, 2, 0),
  )
  return jnp.moveaxis(jax.lax.map(lambda head: read(*head), heads_first), 0, 2)


def _added_as_read(values, locations, weights):
  """What a head's queries read, n q c, of values n h w c, locations n q l p 2, weights n q l p."""
  total = 0.0
  for level, value in enumerate(values):
    index, weight = _reads(locations[:, :, level], weights[:, :, level], *value.shape[1:3])
    for i, w in zip(jnp.unstack(index, axis=-1), jnp.unstack(weight[..., None], axis=-2)):
      total = total + rows_at(value, i) * w
  return total.astype(values[0].dtype)


@jax.checkpoint
def _as_products(values, locations, weights):
  """The same of rows that are held, for the backward pass: there of one head after the other."""
  total = 0.0
  for level, value in enumerate(values):
    index, weight = _reads(locations[:, :, level], weights[:, :, level], *value.shape[1:3])
    rows = rows_at(value, index.reshape(len(index), -1)).reshape(*index.shape, -1)
    total = total + jnp.einsum('nqr,nqrc->nqc', weight.astype(value.dtype), rows)
  return total


def _gradients_in_turn(arrays, g):
  _, pull = jax.vjp(functools.partial(_by_head, _as_products), *arrays)
  return pull(g)


read_in_turn.defvjp(lambda *arrays: (read_in_turn(*arrays), arrays), _gradients_in_turn)


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
