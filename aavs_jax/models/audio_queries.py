"""The adaptive audio query generator (equation 1) and the audio projection before it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def torch_linear_init(fan_in: int):
  """Uniform in +-1/sqrt(fan_in), the initialisation of a new linear layer in the release."""

  def init(key, shape, dtype=jnp.float32):
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class TorchDense(nn.Module):
  """Dense layer initialised as the release initialises linears that its checkpoint lacks."""

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, h: Float[Array, '... i']) -> Float[Array, '... o']:
    init = torch_linear_init(h.shape[-1])
    return nn.Dense(
      self.features, kernel_init=init, bias_init=init, dtype=self.dtype, name='linear'
    )(h)


class AudioProjection(nn.Module):
  """Linear, ReLU, Linear: from VGGish's embedding to the hidden size."""

  features: int
  hidden: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, embedding: Float[Array, 'n a']) -> Float[Array, 'n d']:
    h = nn.relu(TorchDense(self.hidden, self.dtype, name='down')(embedding))
    return TorchDense(self.features, self.dtype, name='up')(h)


class AudioQueryGenerator(nn.Module):
  """q[i, t] = Q[i] + cos(P[i], a_t) a_t: each query takes as much of the sound as it resembles it.

  P serves as prototype here and as the queries' position embedding in every decoder layer. With
  adaptive=False the sound is added with weight 1 (the paper's "origin audio query").
  """

  num_queries: int
  adaptive: bool

  @nn.compact
  def __call__(
    self, audio: Float[Array, 'n d']
  ) -> tuple[Float[Array, 'n q d'], Float[Array, 'q d']]:
    shape = (self.num_queries, audio.shape[-1])
    features = self.param('features', nn.initializers.normal(1.0), shape)
    positions = self.param('positions', nn.initializers.normal(1.0), shape)
    # The cosine stays in float32: it weighs the whole audio pathway.
    audio = audio.astype(jnp.float32)
    if self.adaptive:
      norms = _safe_norm(positions) * _safe_norm(audio)[:, None]
      cosine = audio @ positions.T / jnp.maximum(norms, 1e-8)
    else:
      cosine = jnp.ones((audio.shape[0], self.num_queries))
    return features + cosine[..., None] * audio[:, None, :], positions


def _safe_norm(x: Float[Array, '... d']) -> Float[Array, '...']:
  """Euclidean norm whose gradient at zero is zero, not NaN (silence may embed to exactly zero,
  and a position may start so)."""
  squared = jnp.sum(x * x, -1)
  return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
