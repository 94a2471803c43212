"""Resizing and point sampling against direct computations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aavs_jax.models.deformable_attention import attend_dense, read_at_once, read_in_turn
from aavs_jax.models.sampling import resize, resize_maps, sample


def _bilinear(image, x, y):
  """Value at pixel coordinates, zeros outside; the textbook formula."""
  height, width = image.shape
  total = 0.0
  for row in (int(np.floor(y)), int(np.floor(y)) + 1):
    for column in (int(np.floor(x)), int(np.floor(x)) + 1):
      if 0 <= row < height and 0 <= column < width:
        total += image[row, column] * (1 - abs(x - column)) * (1 - abs(y - row))
  return total


@pytest.mark.parametrize('form', ['dense', 'gather'])
def test_sample_is_bilinear_with_zeros_outside(form):
  rng = np.random.default_rng(0)
  maps = rng.standard_normal((2, 3, 5, 7)).astype(np.float32)
  points = rng.uniform(-0.2, 1.2, (2, 40, 2)).astype(np.float32)
  expected = [
    [[_bilinear(m, x * 7 - 0.5, y * 5 - 0.5) for x, y in p] for m in ms]
    for ms, p in zip(maps, points)
  ]
  np.testing.assert_allclose(sample(jnp.asarray(maps), points, form), expected, atol=1e-5)


def _dense(values, locations, weights):
  x, y, weights = (
    numbers.transpose(0, 3, 4, 2, 1) for numbers in (*jnp.unstack(locations, axis=-1), weights)
  )
  return attend_dense(values, x, y, weights)


@pytest.mark.parametrize('form', [read_at_once, read_in_turn])
def test_forms_of_deformable_attention_agree_in_value_and_gradient(form):
  rng = np.random.default_rng(1)
  values = [
    jnp.asarray(rng.standard_normal((2, h, w, 2, 4)), jnp.float32) for h, w in [(3, 4), (6, 8)]
  ]
  locations = jnp.asarray(rng.uniform(-0.1, 1.1, (2, 9, 2, 2, 4, 2)), jnp.float32)
  weights = jax.nn.softmax(jnp.asarray(rng.standard_normal((2, 9, 2, 2, 4)), jnp.float32))

  def both(form):
    loss = lambda v, l, w: jnp.sum(jnp.sin(form(v, l, w)))  # noqa: E731
    run = jax.jit(lambda *args: (form(*args), jax.grad(loss, (0, 1, 2))(*args)))
    return run(values, locations, weights)

  for a, b in zip(jax.tree.leaves(both(_dense)), jax.tree.leaves(both(form))):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize('size', [(24, 36), (3, 20), (7, 5)])
def test_resize_by_reading_pixels_is_the_product(size):
  maps = jnp.asarray(np.random.default_rng(2).standard_normal((2, 6, 9, 3)), jnp.float32)
  want = resize_maps(maps, size)
  np.testing.assert_allclose(resize(maps, size, (1, 2)), want, atol=2e-6)
  channels_first = resize(jnp.moveaxis(maps, -1, 1), size)
  np.testing.assert_allclose(jnp.moveaxis(channels_first, 1, -1), want, atol=2e-6)


def test_resize_does_not_antialias():
  image = np.zeros((1, 8, 8), np.float32)
  image[0, ::4] = 1.0  # rows 0 and 4
  # Halving reads rows 0.5, 2.5, 4.5, 6.5: the mean of two neighbours, however much it shrinks.
  np.testing.assert_allclose(resize(jnp.asarray(image), (4, 8))[0, :, 0], [0.5, 0, 0.5, 0])
  np.testing.assert_allclose(resize(jnp.asarray(image), (2, 8))[0, :, 0], [0, 0])
