"""The 3x3 convolution's own gradients."""

import jax
import numpy as np
import pytest

from aavs_jax.models.convolutions import convolve


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
