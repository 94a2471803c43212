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
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_form_for_tpus_is_the_same_convolution(shape, dtype, monkeypatch):
  """So are its gradients; in bfloat16 rounded once."""
  rng = np.random.default_rng(0)
  arrays = rng.standard_normal(shape), rng.standard_normal((3, 3, shape[-1], 2))
  arrays = [jnp.asarray(a, dtype) for a in (*arrays, rng.standard_normal((*shape[:3], 2)))]

  def results(arrays):
    *inputs, towards = arrays
    value, pull = jax.vjp(convolve, *inputs)
    return [value, *pull(towards)]

  exact = results([a.astype(jnp.float32) for a in arrays])
  monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *a, tpu, default: tpu(*a))
  for a, b in zip(results(arrays), exact):
    assert a.dtype == dtype
    rtol = 1e-5 if dtype == 'float32' else 2**-8
    np.testing.assert_allclose(a.astype(np.float32), b, rtol=rtol, atol=1e-5)


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

  def results(function, *inputs):
    value, pull = jax.vjp(function, *inputs)
    return [value, *pull(towards.astype(value.dtype))]

  for a, b in zip(results(convolve_depthwise, x, kernel), results(grouped, x, kernel)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  x, kernel, towards = (jnp.asarray(a, jnp.bfloat16) for a in (x, kernel, towards))
  exact = results(grouped, x.astype(jnp.float32), kernel.astype(jnp.float32))
  for a, b in zip(results(convolve_depthwise, x, kernel), exact):
    np.testing.assert_allclose(a.astype(np.float32), b, rtol=2**-8, atol=1e-5)
