"""AVSS without Stepping Stones: semantic labels from the start, no prior.

The release has no such run, but only its stage 1 can do without masks. So this is stage 1, with its
adapters, clipping, trained queries and phases, on the task of stage 2.
"""

from aavs_jax.configs import base

VARIANTS = base.RECIPES


def get_config(variant='release'):
  config = base.get_config()
  config.task = 'semantic'
  config.num_classes = 71
  config.data.max_targets = 8
  config.model.num_queries = 100
  return base.with_recipe(config, variant, paper_epochs=30)
