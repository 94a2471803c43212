"""Bottleneck adapters, the trained part of a mostly frozen network."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

small_normal = nn.initializers.normal(0.02)


class Adapter(nn.Module):
  """MLP(h) = W2 relu(W1 h + b1) + b2 with a bottleneck of a quarter of the width.

  Swin's adapters A1 and A3 add it to h; those of the pixel decoder and of the mask decoder pass it
  on alone (the release has no residual there).
  """

  residual: bool
  kernel_init: Callable = small_normal
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, h: Float[Array, '... d']) -> Float[Array, '... d']:
    width = h.shape[-1]
    down = nn.Dense(width // 4, kernel_init=self.kernel_init, dtype=self.dtype, name='down')
    up = nn.Dense(width, kernel_init=self.kernel_init, dtype=self.dtype, name='up')
    change = up(nn.relu(down(h)))
    return h + change if self.residual else change


class AdaptedProjection(nn.Module):
  """The output projection of an attention with an adapter in it.

  variant 'replace' (stage 1 of the release): the adapter takes the projection's place, whose
  parameters stay in the tree unused. 'after' (stage 2): projection, then adapter. A checkpoint of
  one variant is meaningless in the other. 'none': the projection alone, as in Mask2Former itself.
  """

  variant: str
  kernel_init: Callable = small_normal
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, h: Float[Array, '... d']) -> Float[Array, '... d']:
    # Computed in all variants so that all have its parameters; dead code to the compiler where it
    # is replaced.
    projected = nn.Dense(h.shape[-1], dtype=self.dtype, name='projection')(h)
    if self.variant == 'none':
      return projected
    adapter = Adapter(
      residual=False, kernel_init=self.kernel_init, dtype=self.dtype, name='adapter'
    )
    return adapter(projected if self.variant == 'after' else h)
