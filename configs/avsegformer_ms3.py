"""AVSegFormer, multiple sources."""

from aavs_jax.configs import avsegformer_s4

VARIANTS = avsegformer_s4.VARIANTS


def get_config(backbone='pvt_v2'):
  config = avsegformer_s4.get_config(backbone, 'ms3')
  config.train.epochs = 60.0
  config.train.phase2_epoch = 10
  return config
