"""AAVS: Mask2Former with Swin, adapters and audio queries."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from aavs_jax.models.audio_queries import AudioProjection, AudioQueryGenerator, TorchDense
from aavs_jax.models.mask_decoder import MaskDecoder
from aavs_jax.models.pixel_decoder import PixelDecoder
from aavs_jax.models.swin import Swin
from aavs_jax.types import Outputs


class AAVS(nn.Module):
  """Frames and their sounds to masks and classes (paper, sections 3.2 and 3.3).

  Fields are the sizes of `config.model`; see configs/base.py for what each means.
  """

  num_classes: int
  num_queries: int
  use_prior: bool
  adapter_variant: str
  swin: dict[str, Any]
  hidden: int
  heads: int
  encoder_layers: int
  encoder_ffn: int
  encoder_points: int
  decoder_layers: int
  decoder_ffn: int
  audio_hidden: int
  adaptive_query: bool = True
  mask_fusion: bool = True
  robust_key: bool = True
  prior_attention: bool = True
  sampling: str = 'gather'
  remat: str = 'dots'
  dtype: Any = jnp.float32

  def setup(self):
    self.backbone = Swin(**self.swin, remat=self.remat, dtype=self.dtype)
    self.pixel_decoder = PixelDecoder(
      self.hidden,
      self.encoder_layers,
      self.heads,
      self.encoder_points,
      self.encoder_ffn,
      self.adapter_variant,
      self.sampling,
      remat=self.remat,
      dtype=self.dtype,
    )
    self.audio_projection = AudioProjection(self.hidden, self.audio_hidden, self.dtype)
    self.queries = AudioQueryGenerator(self.num_queries, self.adaptive_query)
    self.decoder = MaskDecoder(
      self.num_classes,
      self.decoder_layers,
      self.heads,
      self.decoder_ffn,
      self.adapter_variant,
      self.use_prior,
      self.mask_fusion,
      self.robust_key,
      self.prior_attention,
      TorchDense,
      remat=self.remat,
      dtype=self.dtype,
    )

  def __call__(
    self,
    frames: Float[Array, 'n h w 3'],
    audio: Float[Array, 'n a'],
    prior: Float[Array, 'n e e'] | None = None,
    *,
    train: bool = False,
  ) -> Outputs:
    """Predictions for n frames.

    Args:
      frames: normalised RGB.
      audio: VGGish embedding of each frame's second.
      prior: what sounds, in 0..1, at any size; required if use_prior.
      train: draws stochastic depth from the rng stream 'drop_path'.
    """
    levels, mask_features = self.pixel_decoder(self.backbone(frames, train))
    queries, positions = self.queries(self.audio_projection(audio))
    return self.decoder(queries, positions, levels, mask_features, prior)
