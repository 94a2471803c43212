"""AVSS, stage 2, which has met in training what is wrong with stage 1's masks."""

from aavs_jax.configs import avss_stage2

VARIANTS = avss_stage2.VARIANTS


def get_config(variant='release'):
  config = avss_stage2.get_config(variant)
  config.prior.predicted = 0.7
  config.prior.none = 0.3
  return config
