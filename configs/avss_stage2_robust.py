"""AVSS, stage 2, which has met in training what is wrong with stage 1's masks."""

from aavs_jax.configs import avss_stage2

VARIANTS = avss_stage2.VARIANTS


def get_config(variant='release'):
  config = avss_stage2.get_config(variant)
  config.prior.predicted = 0.7
  config.prior.none = 0.3
  # It begins with adapters that a one-stage training has taught: a first phase would take them out.
  config.train.phase2_epoch = 0
  return config
