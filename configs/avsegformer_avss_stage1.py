"""Stepping Stones on AVSegFormer, stage 1 (where): binary labels over v1s, v1m and v2."""

from aavs_jax.configs import _maps, avsegformer_avss

VARIANTS = ()  # :resnet50 is there, without a row of its own in `aavs recipe`


def get_config(backbone='pvt_v2'):
  return _maps.stage1(avsegformer_avss.get_config(backbone))
