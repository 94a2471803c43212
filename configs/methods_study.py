"""Does the strategy help other methods? All three, small, on the same made clips.

As in configs/quickstart.py each begins with an audio network that has learnt to hear. Each is
trained in one stage, and in two, for as many frames.
"""

from aavs_jax.configs import (
  avsegformer_avss_stage1,
  avsegformer_avss_stage2,
  quick_stage1,
  quickstart,
  tpavi_avss_stage1,
  tpavi_avss_stage2,
)

_PVT = dict(
  kind='pvt_v2', dims=(16, 32, 64, 128), depths=(1, 1, 2, 1), reductions=(8, 4, 2, 1),
  mlp_ratio=2, drop_path=0.0,
)  # fmt: skip
_MODELS = {
  'tpavi': dict(width=32, head=(32, 16), remat='none'),
  'avsegformer': dict(
    hidden=64, heads=4, queries=30, encoder_layers=1, encoder_ffn=128, decoder_layers=2,
    decoder_ffn=128, generator_layers=2, generator_ffn=128, mlp_hidden=128, spare_fpn=4,
    head=(32, 16), dropout=0.0, sampling='dense', remat='none',
  ),
}  # fmt: skip
_STAGES = {
  'tpavi': (tpavi_avss_stage1, tpavi_avss_stage2),
  'avsegformer': (avsegformer_avss_stage1, avsegformer_avss_stage2),
}
_STEPS = {'aavs': 200, 'avsegformer': 200, 'tpavi': 400}  # of each stage; TPAVI learns more slowly


def get_config():
  config = quickstart.get_config()
  config.end_to_end = True
  config.others = {name: _stages(name) for name in _STAGES}
  for name, stages in (('aavs', config), *config.others.items()):
    for stage in (stages.stage1, stages.stage2):
      stage.train.steps = _STEPS[name]
      stage.train.eval_every_steps = stage.train.steps
  return config


def _stages(name):
  """Both stages of another method, in the sizes and with the recipe of the quickstart's."""
  stages = {}
  for key, module in zip(('stage1', 'stage2'), _STAGES[name]):
    stage, quick = module.get_config(), quick_stage1.get_config()
    for part in ('image_size', 'eval_size', 'item_frames', 'batch_items', 'threads'):
      stage.data[part] = quick.data[part]
    stage.model.backbone = _PVT
    stage.model.update(_MODELS[name])
    stage.vggish.update(quick.vggish, final_relu=True)
    stage.optimizer = quick.optimizer
    trainable = stage.train.trainable
    stage.train = quick.train
    stage.train.trainable = trainable
    if name == 'tpavi':
      # As on S4: twenty times the cross-entropy here, as what is heard and seen differ in scale, it
      # kept stage 1 at an IoU of 10 for 200 steps.
      stage.loss.matching_weight = 0.0
    stages[key] = stage
  return stages
