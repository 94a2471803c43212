"""AVSegFormer, semantic labels over v1s, v1m and v2."""

from aavs_jax.configs import avsegformer_s4

VARIANTS = avsegformer_s4.VARIANTS


def get_config(backbone='pvt_v2'):
  return avsegformer_s4.get_config(backbone, 'avss')
