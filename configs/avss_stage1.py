"""AVSS, stage 1 (where): binary labels over v1s, v1m and v2."""

from configs import base

VARIANTS = base.RECIPES


def get_config(variant='release'):
  return base.with_recipe(base.get_config(), variant, paper_epochs=30)
