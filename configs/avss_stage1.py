"""AVSS, stage 1 (where): binary labels over v1s, v1m and v2."""

from aavs_jax.configs import base

VARIANTS = base.RECIPES


def get_config(variant='release'):
  return base.with_recipe(base.get_config(), variant, paper_epochs=30)
