"""What the configs of TPAVI and AVSegFormer share: backbones, VGGish, one map of logits a class."""

import ml_collections

from aavs_jax.configs import base

BACKBONES = {
  'pvt_v2': dict(
    kind='pvt_v2',
    dims=(64, 128, 320, 512),
    depths=(3, 6, 40, 3),
    reductions=(8, 4, 2, 1),
    mlp_ratio=4,
    drop_path=0.1,
  ),
  'resnet50': dict(kind='resnet', stem=64, planes=(64, 128, 256, 512), blocks=(3, 4, 6, 3)),
}
SUBSETS = {'s4': ('v1s',), 'ms3': ('v1m',), 'avss': ('v1s', 'v1m', 'v2')}


def get_config(method: str, task: str, backbone: str) -> ml_collections.ConfigDict:
  """What does not depend on the method, with the base's values where these are its own.

  Args:
    method: of config.method.
    task: a key of SUBSETS.
    backbone: a key of BACKBONES.

  Raises:
    ValueError: no such backbone.
  """
  base.check_variant(backbone, BACKBONES)
  config = base.get_config()
  config.method = method
  config.data.subsets = SUBSETS[task]
  config.data.image_size = 224
  config.data.all_frames = True
  if task == 'avss':
    config.task = 'semantic'
    config.num_classes = 71
    config.data.max_targets = 8
  config.data.item_frames = 0 if task == 'avss' else 5
  # The releases fill clips of five frames up with empty ones, four clips of ten frames a step. Here
  # eight slots of five frames have no empty ones in them, and one to two more clips.
  config.data.batch_items = 8 if task == 'avss' else 4
  config.model = ml_collections.ConfigDict()
  config.model.backbone = BACKBONES[backbone]
  config.model.remat = 'dots'
  config.vggish.final_relu = True
  config.loss = ml_collections.ConfigDict()
  config.optimizer.clip_norm = 0.0
  config.train.phase2_epoch = 0
  config.train.eval_every_epochs = 2.0 if task == 'avss' else 1.0
  return config


def stage1(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A config of AVSS with the task of MS3, one map of what sounds; changed in place."""
  config.task, config.num_classes, config.data.max_targets = 'binary', 2, 2
  return config
