"""LayerNorm and GroupNorm as PyTorch computes them.

By default Flax takes the variance for a difference of two means, which loses digits where the mean
is large: in float32 ten times as much as PyTorch does. In bfloat16 that difference is no loss.
The exact form takes 5 % more of the quickstart's forward pass on two CPU cores.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp


def layer_norm(dtype: Any, name: str) -> nn.LayerNorm:
  """Over the last axis, with scale and bias."""
  return nn.LayerNorm(epsilon=1e-5, use_fast_variance=_fast(dtype), dtype=dtype, name=name)


def group_norm(groups: int, dtype: Any, name: str) -> nn.GroupNorm:
  """Over groups of channels, which are the last axis, and all positions."""
  return nn.GroupNorm(groups, epsilon=1e-5, use_fast_variance=_fast(dtype), dtype=dtype, name=name)


def _fast(dtype: Any) -> bool:
  return jnp.dtype(dtype) != jnp.float32
