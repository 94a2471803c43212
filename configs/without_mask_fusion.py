"""Ablation of stage 2: the prior is not added to the mask features."""

from aavs_jax.configs import avss_stage2

VARIANTS = avss_stage2.VARIANTS


def get_config(variant='release'):
  config = avss_stage2.get_config(variant)
  config.model.mask_fusion = False
  return config
