"""Ablation "frozen backbone": Swin as it was trained before, its adapters zero all the time."""

from aavs_jax.configs import avss_end_to_end, base, ms3, s4

VARIANTS = {'s4': s4, 'ms3': ms3, 'avss': avss_end_to_end}


def get_config(variant='avss'):
  base.check_variant(variant, VARIANTS)
  config = VARIANTS[variant].get_config()
  config.train.phase2_epoch = int(config.train.epochs)  # phase 1 to the end
  return config
