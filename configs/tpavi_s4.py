"""TPAVI, single source, on PVT-v2-B5 or ResNet-50 that ImageNet has trained."""

from aavs_jax.configs import _maps

VARIANTS = tuple(_maps.BACKBONES)


def get_config(backbone='pvt_v2', task='s4'):
  config = _maps.get_config('tpavi', task, backbone)
  config.model.width = 256
  config.model.head = (128, 32)  # widths before the last convolution
  config.loss.matching_weight = 0.0  # of the audio-visual matching
  config.optimizer.lr = config.optimizer.lr_phase2 = 1e-4
  config.optimizer.weight_decay = 0.0
  config.train.epochs = 15.0
  config.train.trainable = (r'^backbone/(?!spare)', r'^tpavi/(?!path3/unit1/)')
  return config
