"""VGGish, the audio network."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


class VGGish(nn.Module):
  """Embeds log-mel examples of 0.96 s.

  Published widths: convolutions (64, 128, 256, 256, 512, 512), dense (4096, 4096), embedding 128.
  Pooling follows the first, second, fourth and sixth convolution. The released checkpoints were
  trained on embeddings without the last ReLU, the common VGGish release has one.
  """

  conv_widths: tuple[int, ...]
  dense_widths: tuple[int, ...]
  embedding: int
  final_relu: bool
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, log_mel: Float[Array, 'n 96 64']) -> Float[Array, 'n a']:
    h = log_mel[..., None].astype(self.dtype)
    for i, width in enumerate(self.conv_widths):
      h = nn.relu(nn.Conv(width, (3, 3), dtype=self.dtype, name=f'conv{i}')(h))
      if i in (0, 1, 3, 5):
        h = nn.max_pool(h, window_shape=(2, 2), strides=(2, 2))
    h = h.reshape(h.shape[0], -1)  # time, band, channel
    for i, width in enumerate(self.dense_widths):
      h = nn.relu(nn.Dense(width, dtype=self.dtype, name=f'dense{i}')(h))
    h = nn.Dense(self.embedding, dtype=self.dtype, name='embedding')(h)
    return nn.relu(h) if self.final_relu else h
