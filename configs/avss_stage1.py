"""AVSS, stage 1 (where): binary labels over v1s, v1m and v2."""

from configs import base


def get_config():
  return base.get_config()
