"""Activations as PyTorch computes them."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def gelu(x: Float[Array, '*b']) -> Float[Array, '*b']:
  """Exact GELU, by erf and in float32, of any dtype.

  JAX's is by erfc, a branch of which holds an exponential: to the TPU compiler an MLP of Swin's
  third stage takes 171 K cycles forwards with it and 103 K with erf, 388 and 303 K with gradients.
  """
  wide = x.astype(jnp.float32)
  return (0.5 * wide * (1 + jax.lax.erf(wide * np.float32(0.5**0.5)))).astype(x.dtype)
