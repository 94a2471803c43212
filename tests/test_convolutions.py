"""Convolutions and their own gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aavs_jax.models.convolutions import convolve, convolve_depthwise


@pytest.fixture
def float64():
  jax.config.update('jax_enable_x64', True)
  yield
  jax.config.update('jax_enable_x64', False)


def test_gradients_of_the_convolution_by_finite_differences(float64):
  """It is bilinear, so that differences are exact but for rounding."""
  rng = np.random.default_rng(0)
  x, kernel = rng.standard_normal((2, 4, 5, 3)), rng.standard_normal((3, 3, 3, 2))
  towards = rng.standard_normal((2, 4, 5, 2))

  def value(x, kernel):
    return float(np.sum(np.asarray(convolve(x, kernel)) * towards))

  _, pull = jax.vjp(convolve, x, kernel)
  for argument, gradient in enumerate(pull(towards)):
    for index in np.ndindex(gradient.shape):
      more = [x.copy(), kernel.copy()]
      more[argument][index] += 1
      np.testing.assert_allclose(
        gradient[index], value(*more) - value(x, kernel), rtol=1e-9, atol=1e-9
      )


@pytest.mark.parametrize('shape', [(2, 4, 5, 3), (2, 1, 1, 3), (1, 2, 7, 4)])
def test_depthwise_is_the_grouped_convolution(shape):
  """So are its gradients; and in bfloat16 it is rounded once, not after each of nine sums."""
  rng = np.random.default_rng(0)
  x, towards = (rng.standard_normal(shape, np.float32) for _ in range(2))
  kernel = rng.standard_normal((3, 3, 1, shape[-1]), np.float32)

  def grouped(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=shape[-1],
    )  # fmt: skip

  ours, pull = jax.vjp(convolve_depthwise, x, kernel)
  expected, pull_expected = jax.vjp(grouped, x, kernel)
  for a, b in zip([ours, *pull(towards)], [expected, *pull_expected(towards)]):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  halved = [jnp.asarray(a, jnp.bfloat16) for a in (x, kernel)]
  exactly = grouped(*(a.astype(jnp.float32) for a in halved)).astype(jnp.bfloat16)
  low, high = (exactly.astype(jnp.float32) * (1 + side * 2**-7) for side in (-1, 1))
  ours = convolve_depthwise(*halved).astype(jnp.float32)
  assert ((ours >= jnp.minimum(low, high)) & (ours <= jnp.maximum(low, high))).all()
