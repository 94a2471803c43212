"""AVS of multiple sources (MS3): binary labels over v1m."""

from aavs_jax.configs import base

VARIANTS = base.RECIPES


def get_config(variant='release'):
  config = base.get_config()
  config.data.subsets = ('v1m',)
  return base.with_recipe(config, variant, paper_epochs=50)
