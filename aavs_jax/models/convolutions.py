"""3x3, 1x1 and depthwise convolutions, in the forms that are fast on CPUs and TPUs.

They begin as PyTorch's if nothing else is said, uniform in +-1/sqrt(fan in).
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aavs_jax.models.audio_queries import torch_linear_init
from aavs_jax.models.sampling import resize_maps

torch_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')  # +-1/sqrt(fan in)


@jax.custom_vjp
def convolve(
  x: Float[Array, 'n h w c'], kernel: Float[Array, 'k k c d']
) -> Float[Array, 'n h w d']:
  """2D convolution, padded to the same size; k is odd.

  The gradient of x is written as the convolution that it is, with the kernel turned: left to JAX,
  XLA on CPUs takes five times as long for it inside a loop (a generic product, 0.45 for 0.09 s).

  On TPUs it is a sum of products with the shifted map. For a batch of a few frames XLA's own cuts
  the map into pieces, and all that is around it with them: the step from the backbone's largest map
  to the mask features takes three times the cycles, forward and backward.
  """
  return jax.lax.platform_dependent(x, kernel, tpu=_by_products, default=_by_xla)


def _by_xla(x, kernel):
  numbers = ('NHWC', 'HWIO', 'NHWC')
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=numbers)


def _by_products(x, kernel):
  def product(place, part):
    return jnp.matmul(part, kernel[place], preferred_element_type=jnp.float32)

  return sum(product(*piece) for piece in _shifted(x, len(kernel))).astype(x.dtype)


def _convolve_forward(x, kernel):
  return convolve(x, kernel), (x, kernel)


def _convolve_backward(kept, gradient):
  x, kernel = kept
  _, gradient_of_kernel = jax.vjp(functools.partial(convolve.fun, x), kernel)
  turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
  return convolve(gradient, turned), *gradient_of_kernel(gradient)


convolve.defvjp(_convolve_forward, _convolve_backward)


class Convolution(nn.Module):
  """Of a kernel of `size` x `size`, 1 or 3, padded to the same size.

  With a dilation it is a sum of products with the shifted map. Those which meet nothing but padding
  are left out, all but one where the map is no larger than the dilation, and a dilated convolution
  falls to a generic loop in XLA on CPUs.
  """

  features: int
  size: int
  dtype: Any
  dilation: int = 1
  use_bias: bool = True
  kernel_init: Callable = torch_init
  bias_init: Callable | None = None  # torch's

  @nn.compact
  def __call__(self, x: Float[Array, 'n h w c']) -> Float[Array, 'n h w d']:
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param('kernel', self.kernel_init, shape).astype(self.dtype)
    x = x.astype(self.dtype)
    if self.size == 1:
      h = x @ kernel[0, 0]
    elif self.dilation == 1:
      h = convolve(x, kernel)
    else:
      h = _dilated(x, kernel, self.dilation)
    if self.use_bias:
      bias_init = self.bias_init or torch_linear_init(shape[0] * shape[1] * shape[2])
      h = h + self.param('bias', bias_init, (self.features,)).astype(self.dtype)
    return h


def _dilated(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
  _, height, width, _ = x.shape
  total = 0.0
  for row in range(3):
    for column in range(3):
      dy, dx = (row - 1) * dilation, (column - 1) * dilation
      if abs(dy) >= height or abs(dx) >= width:
        continue
      part = x[:, max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)]
      pad = ((0, 0), (max(-dy, 0), max(dy, 0)), (max(-dx, 0), max(dx, 0)), (0, 0))
      total = total + jnp.pad(part @ kernel[row, column], pad)
  return total


@jax.custom_vjp
def convolve_depthwise(
  x: Float[Array, 'n h w c'], kernel: Float[Array, '3 3 1 c']
) -> Float[Array, 'n h w c']:
  """Every channel by its own kernel, padded to the same size, summed in float32.

  Nine products with the shifted map. XLA's grouped convolution takes 30 times as long for the same
  on a CPU; compiled for TPU v5e, the MLP around it takes three to four times the cycles with that
  in PVT-v2's large maps (in the last and smallest, a fifth less). With the gradients written out
  nothing but the inputs is kept.
  """
  return sum(part * kernel[*place, 0] for place, part in _in_float32(x)).astype(x.dtype)


def _in_float32(x: jax.Array) -> Iterator[tuple[tuple[int, int], jax.Array]]:
  return ((place, part.astype(jnp.float32)) for place, part in _shifted(x, 3))


def _shifted(x: jax.Array, size: int) -> Iterator[tuple[tuple[int, int], jax.Array]]:
  """Each place of a kernel of size x size, and the map as it meets it, zeros beyond its sides."""
  _, height, width, _ = x.shape
  side = size // 2
  padded = jnp.pad(x, ((0, 0), (side, side), (side, side), (0, 0)))
  for row, column in itertools.product(range(size), range(size)):
    yield (row, column), padded[:, row : row + height, column : column + width]


def _depthwise_forward(x, kernel):
  return convolve_depthwise(x, kernel), (x, kernel)


def _depthwise_backward(kept, gradient):
  x, kernel = kept
  of_kernel = [jnp.sum(part * gradient, (0, 1, 2)) for _, part in _in_float32(x)]
  of_kernel = jnp.stack(of_kernel).reshape(kernel.shape).astype(kernel.dtype)
  return convolve_depthwise(gradient, jnp.flip(kernel, (0, 1))), of_kernel


convolve_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


class DepthwiseConvolution(nn.Module):
  """3x3, with bias, padded to the same size."""

  dtype: Any
  kernel_init: Callable

  @nn.compact
  def __call__(self, x: Float[Array, 'n h w c']) -> Float[Array, 'n h w c']:
    channels = x.shape[-1]
    kernel = self.param('kernel', self.kernel_init, (3, 3, 1, channels)).astype(self.dtype)
    bias = self.param('bias', nn.initializers.zeros, (channels,)).astype(self.dtype)
    return convolve_depthwise(x.astype(self.dtype), kernel) + bias


class Head(nn.Module):
  """From features to logits of each class at `scale` times their size, float32 (both methods)."""

  classes: int
  widths: tuple[int, int]
  scale: int
  use_bias: bool  # of the last convolution
  dtype: Any
  kernel_init: Callable = torch_init

  @nn.compact
  def __call__(self, x: Float[Array, 'n h w d']) -> Float[Array, 'n y x c']:
    _, height, width, _ = x.shape
    first, second = self.widths

    def convolution(features, size, name, **options):
      return Convolution(
        features, size, self.dtype, kernel_init=self.kernel_init, name=name, **options
      )

    h = convolution(first, 3, 'conv0')(x)
    h = resize_maps(h, (height * self.scale, width * self.scale))
    h = nn.relu(convolution(second, 3, 'conv1')(h))
    h = convolution(self.classes, 1, 'conv2', use_bias=self.use_bias)(h)
    return h.astype(jnp.float32)
