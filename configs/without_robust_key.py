"""Ablation of stage 2: the keys do not say what is silent, uncertain or sounding."""

from aavs_jax.configs import avss_stage2

VARIANTS = avss_stage2.VARIANTS


def get_config(variant='release'):
  config = avss_stage2.get_config(variant)
  config.model.robust_key = False
  return config
