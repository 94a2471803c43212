"""Multi-scale deformable attention (Deformable DETR) with AAVS's adapter."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
  x: Float[Array, 'n l p a q'],
  y: Float[Array, 'n l p a q'],
  weights: Float[Array, 'n l p a q'],
) -> Float[Array, 'n q a c']:
  """Weighted sum of samples as one product a level of an attention map and the values.

  Hat weights make the map, queries x pixels a head: no gather and no scatter, as TPUs want it.
  A frame at a time, so that its maps stay on the chip.
  """
  maps = [value.reshape(*value.shape[:3], -1) for value in values]
  return jnp.moveaxis(on_each_device(_through_maps)(maps, x, y, weights), 1, 2)


@jax.custom_vjp
def _through_maps(values, x, y, weights):
  """From values n h w ac, x, y and weights n l p a q to n a q c.

  Heads and channels stay one axis until a frame has its turn: 32 channels would be padded to the
  128 of a TPU's register (of an encoder layer, forward 2.00 to 1.88 M cycles, with gradients 7.34
  to 7.04).
  """

  def one_frame(frame):
    values, x, y, weights = frame
    total = 0.0
    for level, value in enumerate(values):
      value = _heads_first(value, x.shape[2])
      attention = _attention_map(value, x[level], y[level], weights[level])
      # Over both axes at once: then the TPU compiler makes the map inside the product.
      total = total + jnp.einsum('ahwq,ahwc->aqc', attention, value)
    return total

  return jax.lax.map(one_frame, (values, x, y, weights))


def _attention_map(value, x, y, weights):
  """What each query reads of each pixel of a level, a h w q, from x, y and weights p a q."""
  _, height, width, _ = value.shape
  total = 0.0
  # A point at a time: as an array of all of them, the TPU compiler takes them apart again. As an
  # einsum it would be a product of 4 terms for each of thousands of queries.
  for p in range(len(x)):
    row = hat(_distance(y[p], height)) * weights[p][:, None]
    total = total + row[:, :, None] * hat(_distance(x[p], width))[:, None]
  return total.astype(value.dtype)


def _distance(position, length):
  """From every pixel of an axis: ... q to ... length q."""
  return pixel_distance(position, length).swapaxes(-1, -2)


class _Blocks(NamedTuple):
  """A map cut into blocks of rows x columns; each has the row and the column after it as well."""

  rows: int
  columns: int
  down: int  # how many blocks
  across: int


def _blocks(height: int, width: int, channels: int) -> _Blocks:
  """So large that a block's columns fill the 8 rows of a TPU's registers, and that the channels of
  all blocks are 512 at most, over which its four matrix units sum at once.
  """
  columns = min(7, width)
  across = -(-width // columns)
  rows = -(-height // max(1, 512 // (across * channels)))
  return _Blocks(rows, columns, -(-height // rows), across)


def _cut(value: Float[Array, 'n h w ac'], heads: int) -> Float[Array, 'n i j b ac']:
  """Blocks of a map: rows i and columns j of each."""
  _, height, width, all_channels = value.shape
  rows, columns, down, across = _blocks(height, width, all_channels // heads)
  below, right = down * rows + 1 - height, across * columns + 1 - width
  value = jnp.pad(value, [(0, 0), (0, below), (0, right), (0, 0)])
  value = jnp.stack([value[:, i * rows : (i + 1) * rows + 1] for i in range(down)], 1)
  ends = [(j * columns, (j + 1) * columns + 1) for j in range(across)]
  value = jnp.stack([value[:, :, :, begin:end] for begin, end in ends], 3)
  value = value.transpose(0, 2, 4, 1, 3, 5)
  return value.reshape(*value.shape[:3], down * across, all_channels)


def _level_gradients(value, blocks, x, y, weights, g):
  """Gradients of value, as a h w c, x, y and weights p a q of one level by g a c q, the output's.

  What a point reads is in one block, blocks i j b ac. So for x, y and weights there is no need of
  the gradient of a map, queries x pixels: that of a block is one product over channels and blocks,
  of which all but the point's are 0. It is added up over rows inside the product's operation.
  """
  value = _heads_first(value, x.shape[1])
  _, height, width, channels = value.shape
  by_value = jnp.einsum('ahwq,acq->ahwc', _attention_map(value, x, y, weights), g)
  rows, columns, down, across = _blocks(height, width, channels)
  row, from_row = _in_block(y, height, rows, down)
  column, from_column = _in_block(x, width, columns, across)
  block = row * across + column
  blocks = blocks.reshape(*blocks.shape[:-1], -1, channels)
  by_x, by_y, by_weight = [], [], []
  for p in range(len(x)):
    here = block[p][:, None] == jnp.arange(down * across)[:, None]  # a b q
    of_block = jnp.where(here[:, :, None], g[:, None], 0)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    by_map = product('ijbac,abcq->aijq', blocks, of_block)
    distance = from_row[p][:, None] - jnp.arange(rows + 1)[:, None]
    of_rows = (by_map * hat(distance)[:, :, None]).sum(1)  # a j q
    of_slopes = (by_map * _slope(distance, height)[:, :, None]).sum(1)
    distance = from_column[p][:, None] - jnp.arange(columns + 1)[:, None]
    by_x.append((of_rows * _slope(distance, width)).sum(1))
    by_y.append((of_slopes * hat(distance)).sum(1))
    by_weight.append((of_rows * hat(distance)).sum(1))
  by_x, by_y, by_weight = (jnp.stack(points) for points in (by_x, by_y, by_weight))
  return by_value, weights * by_x, weights * by_y, by_weight


def _in_block(position, length, size, count):
  """Along an axis: the block that a point is in, and how many pixels from its first pixel."""
  pixel = position * length - 0.5
  block = jnp.clip(jnp.floor(pixel / size), 0, count - 1)
  return block.astype(jnp.int32), pixel - block * size


def _slope(distance, length):
  """Of the hat by the position that the distance is of."""
  return jnp.where(jnp.abs(distance) < 1, -jnp.sign(distance) * length, 0.0)


def _gradients(arrays, g):
  values, *points = arrays

  def one_frame(frame):
    values, blocks, x, y, weights, g = frame
    levels = zip(values, blocks, x, y, weights)
    by_values, *by_points = zip(*(_level_gradients(*level, g) for level in levels))
    return list(by_values), *(jnp.stack(levels) for levels in by_points)

  by_values, *by_points = jax.lax.map(
    one_frame,
    (values, [_cut(value, g.shape[1]) for value in values], *points, g.swapaxes(2, 3)),
  )
  by_values = [jnp.moveaxis(by_value, 1, 3) for by_value in by_values]
  return [by.reshape(value.shape) for by, value in zip(by_values, values)], *by_points


def _heads_first(value, heads):
  """From h w ac to a h w c."""
  return jnp.moveaxis(value.reshape(*value.shape[:2], heads, -1), 2, 0)


_through_maps.defvjp(lambda *arrays: (_through_maps(*arrays), arrays), _gradients)


def attend_gather(
  values: Sequence[Float[Array, 'n h w a c']],
  x: Float[Array, 'n l p a q'],
  y: Float[Array, 'n l p a q'],
  weights: Float[Array, 'n l p a q'],
) -> Float[Array, 'n q a c']:
  """The same by reading four pixels a point; costs queries x points, so it is for large maps."""
  locations = jnp.stack([x, y], -1).transpose(0, 4, 3, 1, 2, 5)  # n q a l p 2
  weights = weights.transpose(0, 4, 3, 1, 2)
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


class _QueriesLast(nn.Module):
  """A dense layer in float32, with queries on the last axis, the longest, and heads before them.

  So every number fills whole registers of a TPU: of an encoder layer, forward and backward, 7.3 M
  cycles for 7.8. shape: of a query's numbers, a l p or a l p k.
  """

  shape: tuple[int, ...]
  bias_init: Any = nn.initializers.zeros

  @nn.compact
  def __call__(self, x: Float[Array, 'n q d']) -> Float[Array, '... n l p a q']:
    width, features = x.shape[-1], math.prod(self.shape)
    kernel = self.param('kernel', nn.initializers.zeros, (width, features))
    bias = self.param('bias', self.bias_init, (features,)).reshape(self.shape)
    kernel = kernel.reshape(width, *self.shape)
    numbers = jnp.einsum('nqd,dalp...->...nlpaq', x.astype(jnp.float32), kernel)
    return numbers + jnp.einsum('alp...->...lpa', bias)[..., None, :, :, :, None]


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
    each = (heads, levels, self.points)
    to_offsets = _QueriesLast((*each, 2), _offset_bias(*each), name='offsets')
    sizes = jnp.asarray([(w, h) for h, w in shapes], jnp.float32).T[..., None, None, None]
    offsets = zip(reference.T, to_offsets(where), sizes)
    x_at, y_at = (centre + offset / size for centre, offset, size in offsets)
    weights = jax.nn.softmax(_QueriesLast(each, name='weights')(where), (1, 2))

    values, start = [], 0
    for h, w in shapes:
      part = value[:, start : start + h * w]
      values.append(part.reshape(n, h, w, heads, width // heads))
      start += h * w
    attend = attend_dense if self.sampling == 'dense' else attend_gather
    h = attend(values, x_at, y_at, weights).reshape(n, queries, width)
    h = checkpoint_name(h, SAMPLED)
    return AdaptedProjection(self.adapter_variant, dtype=self.dtype, name='output')(h)
