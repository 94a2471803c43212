"""Upper bound of stage 2: ground-truth masks as the prior in validation and test too."""

from aavs_jax.configs import avss_stage2

VARIANTS = avss_stage2.VARIANTS


def get_config(variant='release'):
  config = avss_stage2.get_config(variant)
  config.oracle_prior = True
  return config
