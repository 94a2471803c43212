"""Stepping Stones on TPAVI, stage 2 (what): the prior is added to the last features."""

from aavs_jax.configs import tpavi_avss

VARIANTS = ()  # :resnet50 is there, without a row of its own in `aavs recipe`


def get_config(backbone='pvt_v2'):
  config = tpavi_avss.get_config(backbone)
  config.use_prior = True
  return config
