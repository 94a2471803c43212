"""Stepping Stones on TPAVI, stage 2 (what): the prior is added to the last features."""

from aavs_jax.configs import tpavi_avss

VARIANTS = tpavi_avss.VARIANTS


def get_config(backbone='pvt_v2'):
  config = tpavi_avss.get_config(backbone)
  config.use_prior = True
  return config
