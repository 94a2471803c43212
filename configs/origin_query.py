"""Ablation "origin audio query": the sound enters all queries alike; frozen backbone."""

from aavs_jax.configs import frozen_backbone

VARIANTS = frozen_backbone.VARIANTS


def get_config(variant='avss'):
  config = frozen_backbone.get_config(variant)
  config.model.adaptive_query = False
  return config
