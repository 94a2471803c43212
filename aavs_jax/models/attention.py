"""Softmax attention of several heads, and torch's module of it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attend(
  query: Float[Array, 'n q d'],
  key: Float[Array, 'n k d'],
  value: Float[Array, 'n k d'],
  heads: int,
  blocked: Bool[Array, 'n q k'] | None = None,
  drop=lambda weights: weights,
) -> Float[Array, 'n q d']:
  """Softmax attention; `drop` is dropout on its weights [n a q k]."""
  n, queries, width = query.shape

  def split(x):
    return x.reshape(n, -1, heads, width // heads)

  scores = jnp.einsum('nqhc,nkhc->nhqk', split(query), split(key)).astype(jnp.float32)
  scores = scores * (width // heads) ** -0.5
  if blocked is not None:
    scores = jnp.where(blocked[:, None], -jnp.inf, scores)
  weights = drop(jax.nn.softmax(scores, -1)).astype(value.dtype)
  return jnp.einsum('nhqk,nkhc->nqhc', weights, split(value)).reshape(n, queries, width)


class FusedAttention(nn.Module):
  """torch.nn.MultiheadAttention: one kernel for query, key and value, and an output projection."""

  heads: int
  bias: bool
  dropout: float
  dtype: Any

  @nn.compact
  def __call__(
    self, query: Float[Array, 'n q d'], key: Float[Array, 'n k d'], train: bool
  ) -> Float[Array, 'n q d']:
    """Of `query` to `key`, which is the value too. Training draws from the stream 'dropout'."""
    width = query.shape[-1]
    kernel = self.param('in_kernel', nn.initializers.xavier_uniform(), (width, 3 * width))
    kernels = jnp.split(kernel.astype(self.dtype), 3, axis=1)
    q, k, v = (x @ w for x, w in zip((query, key, key), kernels))
    if self.bias:
      bias = self.param('in_bias', nn.initializers.zeros, (3 * width,))
      q, k, v = (x + b for x, b in zip((q, k, v), jnp.split(bias.astype(self.dtype), 3)))
    drop = nn.Dropout(self.dropout, deterministic=not train)
    h = attend(q, k, v, self.heads, drop=drop)
    return nn.Dense(
      width,
      use_bias=self.bias,
      kernel_init=nn.initializers.xavier_uniform(),
      dtype=self.dtype,
      name='projection',
    )(h)
