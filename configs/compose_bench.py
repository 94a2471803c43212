"""The longer run on made clips: three seeds, Stepping Stones against training end to end."""

from aavs_jax.configs import quickstart


def get_config():
  config = quickstart.get_config()
  config.seeds = (0, 1, 2)
  config.end_to_end = True
  config.stage1.train.steps = 540
  config.stage2.train.steps = 360
  return config
