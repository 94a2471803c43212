"""AVS of a single source (S4): binary labels over v1s."""

from aavs_jax.configs import base

VARIANTS = base.RECIPES


def get_config(variant='release'):
  config = base.get_config()
  config.data.subsets = ('v1s',)
  return base.with_recipe(config, variant, paper_epochs=30)
