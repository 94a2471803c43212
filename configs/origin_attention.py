"""Ablation of stage 2: the prior is unused, also in the first attention mask."""

from aavs_jax.configs import without_both

VARIANTS = without_both.VARIANTS


def get_config(variant='release'):
  config = without_both.get_config(variant)
  config.model.prior_attention = False
  return config
