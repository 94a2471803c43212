"""Stepping Stones on AVSegFormer, stage 2 (what): the prior is added to the last features."""

from aavs_jax.configs import avsegformer_avss

VARIANTS = ()  # :resnet50 is there, without a row of its own in `aavs recipe`


def get_config(backbone='pvt_v2'):
  config = avsegformer_avss.get_config(backbone)
  config.use_prior = True
  return config
