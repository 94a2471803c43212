"""Ablation of stage 2: neither mask fusion nor robust key."""

from aavs_jax.configs import without_mask_fusion

VARIANTS = without_mask_fusion.VARIANTS


def get_config(variant='release'):
  config = without_mask_fusion.get_config(variant)
  config.model.robust_key = False
  return config
