"""TPAVI, multiple sources."""

from aavs_jax.configs import tpavi_s4

VARIANTS = tpavi_s4.VARIANTS


def get_config(backbone='pvt_v2'):
  config = tpavi_s4.get_config(backbone, 'ms3')
  config.loss.matching_weight = 0.5
  config.train.epochs = 30.0
  return config
