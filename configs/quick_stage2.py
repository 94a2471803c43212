"""The quickstart's stage 2: starts from stage 1, as the published one from Mask2Former."""

from aavs_jax.configs import quick_stage1


def get_config():
  config = quick_stage1.get_config()
  config.task = 'semantic'
  config.num_classes = 71
  config.use_prior = True
  config.data.max_targets = 4
  config.train.steps = 240
  config.train.eval_every_steps = 240  # half way 40 clips chose a model 3 points lower
  return config
