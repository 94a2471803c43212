"""Bilinear resizing and point sampling as PyTorch defines them, align_corners false by default."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def resize(
  maps: Float[Array, '...'], size: tuple[int, int], axes: tuple[int, int] = (-2, -1)
) -> Float[Array, '...']:
  """Bilinear resize of two axes without antialiasing, also where it shrinks.

  Two pixels an axis are read, but on TPUs, which multiply instead. For gradients use resize_maps:
  those of reading pixels are added up one by one.
  """

  def product(maps):
    shape = list(maps.shape)
    for axis, length in zip(axes, size):
      shape[axis] = length
    return jax.image.resize(maps, shape, 'bilinear', antialias=False)

  def pixels(maps):
    for axis, length in zip(axes, size):
      maps = _between(maps, length, axis)
    return maps

  return jax.lax.platform_dependent(maps, tpu=product, default=pixels)


def _between(maps: Float[Array, '...'], length: int, axis: int) -> Float[Array, '...']:
  """Resizes one axis, with positions in float32 as PyTorch has them."""
  axis %= maps.ndim
  last = maps.shape[axis] - 1
  scale, half = np.float32(maps.shape[axis] / length), np.float32(0.5)
  at = np.maximum(scale * (np.arange(length, dtype=np.float32) + half) - half, 0)
  low = np.minimum(at.astype(np.int32), last)
  share = (at - low).astype(maps.dtype).reshape(-1, *[1] * (maps.ndim - 1 - axis))
  near = jnp.take(maps, jnp.asarray(low), axis=axis, mode='clip')
  far = jnp.take(maps, jnp.asarray(np.minimum(low + 1, last)), axis=axis, mode='clip')
  return near * (1 - share) + far * share


def resize_maps(maps: Float[Array, 'n h w c'], size: tuple[int, int]) -> Float[Array, 'n y x c']:
  """The same of maps whose channels are last, as products."""
  shape = (maps.shape[0], *size, maps.shape[-1])
  return jax.image.resize(maps, shape, 'bilinear', antialias=False)


def enlarge_aligned(maps: Float[Array, 'n h w c']) -> Float[Array, 'n 2h 2w c']:
  """Twice the size, bilinear with align_corners true: corners of both stand on each other."""

  def weights(length):
    at = np.arange(2 * length) * ((length - 1) / (2 * length - 1))
    near = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(length)))
    return jnp.asarray(near, maps.dtype)

  maps = jnp.einsum('nhwc,yh->nywc', maps, weights(maps.shape[1]))
  return jnp.einsum('nywc,xw->nyxc', maps, weights(maps.shape[2]))


def hat(distance: Float[Array, '*b']) -> Float[Array, '*b']:
  """Bilinear weight of a pixel at this distance along an axis."""
  return jax.nn.relu(1.0 - jnp.abs(distance))


def pixel_distance(position: Float[Array, '...'], length: int) -> Float[Array, '... length']:
  """From the centre of every pixel of one axis to position (in 0..1), in pixels."""
  return _from_each(position * length - 0.5, length)


def _from_each(position, length):
  """From pixels 0 to length - 1 to a position that is in pixels."""
  return position[..., None] - jnp.arange(length, dtype=position.dtype)


def corners(
  points: Float[Array, '*b p 2'], height: int, width: int
) -> list[tuple[Int[Array, '*b p'], Float[Array, '*b p']]]:
  """The four pixels around each point (x, y in 0..1): flat index and weight of each.

  Pixels outside the image have weight 0 and an index inside it.
  """
  x = points[..., 0] * width - 0.5
  y = points[..., 1] * height - 0.5
  found = []
  for row in (jnp.floor(y), jnp.floor(y) + 1):
    for column in (jnp.floor(x), jnp.floor(x) + 1):
      weight = (1 - jnp.abs(x - column)) * (1 - jnp.abs(y - row))
      inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
      index = jnp.clip(row, 0, height - 1) * width + jnp.clip(column, 0, width - 1)
      found.append((index.astype(jnp.int32), jnp.where(inside, weight, 0.0)))
  return found


def sample(
  maps: Float[Array, '*b m h w'], points: Float[Array, '*b p 2'], sampling: str
) -> Float[Array, '*b m p']:
  """Values of m maps at p shared points (x, y in 0..1), zeros outside the maps.

  sampling 'dense' multiplies with hat weights, 'gather' reads the four pixels; the same numbers.
  """
  height, width = maps.shape[-2:]
  if sampling == 'dense':
    return _sample_blocks(maps, points)
  flat = maps.reshape(*maps.shape[:-2], height * width)
  # A corner at a time, not a sum over an axis of four, which vector units make little of.
  return sum(
    jnp.take_along_axis(flat, index[..., None, :], axis=-1, mode='clip') * weight[..., None, :]
    for index, weight in corners(points, height, width)
  )


_BLOCKS = 3


def _sample_blocks(maps, points):
  """`sample` by hat weights, of a block of rows a point.

  Two products of small dense matrices, for no gather forwards and no scatter backwards: what TPUs
  want, and what is fastest on any device while the maps are small. A product of a few columns costs
  a TPU what one of four times as many does, and what costs is how many rows of sums come out of it.
  So blocks of rows lie side by side, as columns: a point's hat is in the columns of its block, and
  there are only the sums of a block's rows.
  """
  height, width = maps.shape[-2:]
  # Outside the map as far as it matters: further columns are another block's.
  x = jnp.clip(points[..., 0] * width - 0.5, -1, width)
  y = points[..., 1] * height - 0.5
  rows = -(-height // _BLOCKS)
  block = jnp.clip(jnp.floor(y / rows), 0, _BLOCKS - 1)
  # The row after a block's last is in it too, and a column of zeros between it and the next.
  below = [(0, 0)] * (maps.ndim - 2) + [(0, _BLOCKS * rows + 1 - height), (0, 1)]
  padded = jnp.pad(maps, below)
  blocks = [padded[..., b * rows : (b + 1) * rows + 1, :] for b in range(_BLOCKS)]
  columns = jnp.concatenate(blocks, -1)
  across = hat(_from_each(x + block * (width + 1), columns.shape[-1]))
  down = hat(_from_each(y - block * rows, rows + 1))
  found = jnp.einsum('...mhw,...pw->...mhp', columns, across)
  return jnp.einsum('...mhp,...ph->...mp', found, down)


def rows_at(maps: Float[Array, '*b h w d'], index: Int[Array, '*b p']) -> Float[Array, '*b p d']:
  """Pixels of maps by their flat index, which is inside; the d of a pixel at once."""
  *batch, height, width, depth = maps.shape
  flat = maps.reshape(*batch, height * width, depth)
  return jnp.take_along_axis(flat, index[..., None], axis=-2, mode='clip')


def sample_rows(
  maps: Float[Array, '*b h w d'], points: Float[Array, '*b p 2']
) -> Float[Array, '*b p d']:
  """Values of many maps at p shared points, as `sample`."""
  *_, height, width, _ = maps.shape
  total = sum(
    rows_at(maps, index) * weight[..., None] for index, weight in corners(points, height, width)
  )
  return total.astype(maps.dtype)
