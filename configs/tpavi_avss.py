"""TPAVI, semantic labels over v1s, v1m and v2."""

from aavs_jax.configs import tpavi_s4

VARIANTS = tpavi_s4.VARIANTS


def get_config(backbone='pvt_v2'):
  config = tpavi_s4.get_config(backbone, 'avss')
  config.loss.matching_weight = 0.5
  config.train.epochs = 60.0
  return config
