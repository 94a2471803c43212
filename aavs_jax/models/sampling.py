"""Bilinear resizing and point sampling, as PyTorch defines them (align_corners false)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def resize(maps: Float[Array, '... h w'], size: tuple[int, int]) -> Float[Array, '... y x']:
  """Bilinear resize of the last two axes without antialiasing, also where it shrinks."""
  shape = (*maps.shape[:-2], *size)
  return jax.image.resize(maps, shape, 'bilinear', antialias=False)


def hat_weights(position: Float[Array, '...'], length: int) -> Float[Array, '... length']:
  """Bilinear weights of every pixel of one axis for a sample at position (in 0..1).

  Pixel i has its centre at (i + 0.5) / length and weight max(0, 1 - distance in pixels); a sample
  outside the image finds zeros there. Sampling becomes a product of two small dense matrices: no
  gather forwards, no scatter backwards, which is what TPUs want and what is fastest on any device
  while the maps are small.
  """
  pixel = position[..., None] * length - 0.5
  return jax.nn.relu(1.0 - jnp.abs(pixel - jnp.arange(length, dtype=position.dtype)))


def corners(
  points: Float[Array, '*b p 2'], height: int, width: int
) -> tuple[Int[Array, '*b p 4'], Float[Array, '*b p 4']]:
  """Flat indices of the four pixels around each point (x, y in 0..1), and their weights.

  Pixels outside the image have weight 0 and an index inside it.
  """
  x = points[..., 0] * width - 0.5
  y = points[..., 1] * height - 0.5
  x0, y0 = jnp.floor(x), jnp.floor(y)
  columns = jnp.stack([x0, x0 + 1, x0, x0 + 1], -1)
  rows = jnp.stack([y0, y0, y0 + 1, y0 + 1], -1)
  weight = (1 - jnp.abs(x[..., None] - columns)) * (1 - jnp.abs(y[..., None] - rows))
  inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
  index = jnp.clip(rows, 0, height - 1) * width + jnp.clip(columns, 0, width - 1)
  return index.astype(jnp.int32), jnp.where(inside, weight, 0.0)


def sample(
  maps: Float[Array, '*b m h w'], points: Float[Array, '*b p 2'], form: str
) -> Float[Array, '*b m p']:
  """Values of m maps at p shared points (x, y in 0..1), zeros outside the maps.

  form 'dense' multiplies with hat weights, 'gather' reads the four pixels; the same numbers.
  """
  height, width = maps.shape[-2:]
  if form == 'dense':
    across = jnp.einsum('...mhw,...pw->...mhp', maps, hat_weights(points[..., 0], width))
    return jnp.einsum('...mhp,...ph->...mp', across, hat_weights(points[..., 1], height))
  index, weight = corners(points, height, width)
  flat = maps.reshape(*maps.shape[:-2], height * width)
  index = index.reshape(*index.shape[:-2], 1, -1)
  values = jnp.take_along_axis(flat, index, axis=-1)
  values = values.reshape(*values.shape[:-1], -1, 4)
  return jnp.sum(values * weight[..., None, :, :], -1)
