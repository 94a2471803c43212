"""TPAVI, the baseline of AVSBench (ECCV 2022, arXiv 2207.05042): from a backbone's maps to logits.

As its release computes it, quirks included.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aavs_jax.models.audio_queries import torch_linear_init
from aavs_jax.models.convolutions import Convolution, Head, torch_init
from aavs_jax.models.norms import BatchNorm, layer_norm
from aavs_jax.models.sampling import enlarge_aligned, resize_maps

TOGETHER = 5  # frames that see each other
_DILATIONS = (3, 6, 12, 18)


class Outputs(NamedTuple):
  logits: Float[Array, 'n h w c']  # at the size of the frames
  features: list[Float[Array, 'n y x d']]  # of each level after TPAVI, for the matching loss
  audio: list[Float[Array, 'n d']]  # aligned with each level


class Channels(nn.Module):
  """Sum of four dilated convolutions, to the width of the model; no norm, no activation."""

  width: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, 'n y x c']) -> Float[Array, 'n y x d']:
    return sum(
      Convolution(
        self.width,
        3,
        self.dtype,
        dilation=dilation,
        kernel_init=nn.initializers.normal(0.01),
        name=f'dilation{i}',
      )(x)
      for i, dilation in enumerate(_DILATIONS)
    )


class Pointwise(nn.Module):
  """torch's Conv3d of 1x1x1, whose kernel has three axes of length 1."""

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, '... c']) -> Float[Array, '... d']:
    kernel = self.param('kernel', torch_init, (1, 1, 1, x.shape[-1], self.features))
    bias = self.param('bias', torch_linear_init(x.shape[-1]), (self.features,))
    return x.astype(self.dtype) @ kernel[0, 0, 0].astype(self.dtype) + bias.astype(self.dtype)


class Tpavi(nn.Module):
  """Every position of five frames takes from all positions what resembles their sound in it.

  The paper's alpha = theta(f) phi(s)^T / N, equation 4, has a row and a column for each position of
  the five frames. But phi is the same at all positions of a frame, so that alpha g(f) is a sum over
  five frames: of the product with the frame's phi, times the sum of its g.
  """

  align_bias: bool
  dtype: Any

  @nn.compact
  def __call__(
    self, f: Float[Array, 'n y x d'], audio: Float[Array, 'n a'], train: bool
  ) -> tuple[Float[Array, 'n y x d'], Float[Array, 'n d']]:
    n, height, width, channels = f.shape
    pointwise = functools.partial(Pointwise, channels // 2, self.dtype)
    s = nn.Dense(
      channels,
      use_bias=self.align_bias,
      kernel_init=torch_init,
      bias_init=torch_linear_init(audio.shape[-1]),
      dtype=self.dtype,
      name='align',
    )(audio)

    def grouped(x):
      return x.reshape(n // TOGETHER, TOGETHER, *x.shape[1:])

    theta, g = (grouped(pointwise(name=name)(f)) for name in ('theta', 'g'))
    phi = grouped(pointwise(name='phi')(s))
    share = jnp.einsum('btyxc,bsc->btyxs', theta, phi)
    sums = jnp.sum(g, (2, 3), dtype=jnp.float32) / (TOGETHER * height * width)
    y = jnp.einsum('btyxs,bsc->btyxc', share, sums.astype(self.dtype)).reshape(n, height, width, -1)
    y = Pointwise(channels, self.dtype, name='projection')(y)
    y = BatchNorm(self.dtype, nn.initializers.zeros, name='projection_norm')(y, train)
    return layer_norm(self.dtype, 'norm')(y + f), s


class ResidualUnit(nn.Module):
  """relu(x) plus two convolutions of it: the release's ReLU works in place, on the skip as well."""

  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, 'n y x d']) -> Float[Array, 'n y x d']:
    x = nn.relu(x)
    h = nn.relu(Convolution(x.shape[-1], 3, self.dtype, name='conv1')(x))
    return x + Convolution(x.shape[-1], 3, self.dtype, name='conv2')(h)


class Path(nn.Module):
  """A step of the decoder: what comes from the coarser level, if any, and z, at twice the size."""

  dtype: Any

  @nn.compact
  def __call__(
    self, h: Float[Array, 'n y x d'] | None, z: Float[Array, 'n y x d']
  ) -> Float[Array, 'n 2y 2x d']:
    if h is not None:
      z = h + ResidualUnit(self.dtype, name='unit1')(z)
    elif self.is_initializing():
      ResidualUnit(self.dtype, name='unit1')(z)  # is in the release, where nothing uses it
    return enlarge_aligned(ResidualUnit(self.dtype, name='unit2')(z))


class TPAVI(nn.Module):
  """All but the backbone and VGGish; fields are those of config.model.

  align_bias: of the projection of the sound, there in S4 and MS3, not in AVSS.
  """

  classes: int
  width: int
  head: tuple[int, int]
  align_bias: bool
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    maps: list[Float[Array, 'n y x c']],
    audio: Float[Array, 'n a'],
    real: Float[Array, ' n'] | None,
    prior: Float[Array, 'n e e'] | None,
    train: bool,
  ) -> Outputs:
    """Logits of n frames, five of a clip after each other.

    Args:
      maps: of the backbone, strides 4 to 32.
      audio: VGGish embedding of each frame's second, not negative.
      real: 0 for frames that fill up a clip, 1 for others; None if all are real.
      prior: what sounds, in 0..1, added to the last features; None without.
      train: normalises by the batch.
    """

    def flagged(x):
      flag = 1 if real is None else real.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)
      return x * flag

    audio = flagged(audio)
    features, aligned = [], []
    for i, x in enumerate(maps):
      f = flagged(Channels(self.width, self.dtype, name=f'channels{i}')(x))
      z, s = Tpavi(self.align_bias, self.dtype, name=f'level{i}')(f, audio, train)
      features.append(flagged(z))
      aligned.append(s)
    h = None
    for i in reversed(range(4)):
      h = flagged(Path(self.dtype, name=f'path{i}')(h, features[i]))
    if prior is not None:
      h = h + fit_prior(prior, h)
    logits = Head(self.classes, self.head, 2, use_bias=True, dtype=self.dtype, name='head')(h)
    return Outputs(flagged(logits), [nn.relu(z) for z in features], aligned)


def fit_prior(prior: Float[Array, 'n e e'], like: Float[Array, 'n y x d']) -> jax.Array:
  """The prior at the size of features, for every channel of them."""
  return resize_maps(prior[..., None], like.shape[1:3]).astype(like.dtype)
