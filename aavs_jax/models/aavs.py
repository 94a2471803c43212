"""AAVS: Mask2Former with Swin, adapters and audio queries."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from aavs_jax.models.audio_queries import AudioProjection, AudioQueryGenerator
from aavs_jax.models.mask_decoder import MaskDecoder, Outputs
from aavs_jax.models.pixel_decoder import PixelDecoder
from aavs_jax.models.swin import Swin


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
  adaptive_query: bool
  mask_fusion: bool
  robust_key: bool
  prior_attention: bool
  sampling: str
  remat: str
  dtype: Any = jnp.float32

  def setup(self):
    self.backbone = Swin(**self.swin, remat=self.remat, dtype=self.dtype)
    self.pixel_decoder = PixelDecoder(
      hidden=self.hidden,
      layers=self.encoder_layers,
      heads=self.heads,
      points=self.encoder_points,
      ffn=self.encoder_ffn,
      adapter_variant=self.adapter_variant,
      sampling=self.sampling,
      remat=self.remat,
      dtype=self.dtype,
    )
    self.audio_projection = AudioProjection(self.hidden, self.audio_hidden, self.dtype)
    self.queries = AudioQueryGenerator(self.num_queries, self.adaptive_query)
    self.decoder = MaskDecoder(
      num_classes=self.num_classes,
      layers=self.decoder_layers,
      heads=self.heads,
      ffn=self.decoder_ffn,
      adapter_variant=self.adapter_variant,
      use_prior=self.use_prior,
      mask_fusion=self.mask_fusion,
      robust_key=self.robust_key,
      prior_attention=self.prior_attention,
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
