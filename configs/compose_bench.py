"""Where do stepping stones pay? Made clips of few and of many classes, each way of training."""

from aavs_jax.configs import avss_stage2_robust, quickstart


def get_config():
  config = quickstart.get_config()
  with config.ignore_type():
    config.num_classes = (8, 24, 70)
  config.clips = dict(
    train=dict(v1s=240, v1m=480, v2=240),
    val=dict(v1s=10, v1m=40, v2=10),
    test=dict(v1s=40, v1m=120, v2=40),
  )
  config.end_to_end = True
  config.looks = config.stage2.copy_and_resolve_references()
  config.looks.use_prior = False
  config.looks.train.steps = 1500  # with 600 one stage names 65 % of 24 classes, with these 79
  config.stage1.train.steps = 400
  config.stage2.train.steps = 400
  config.robust = config.stage2.copy_and_resolve_references()
  config.robust.prior.update(avss_stage2_robust.get_config().prior)
  for stage in (config.looks, config.stage1, config.stage2, config.robust):
    stage.train.eval_every_steps = stage.train.steps  # half way the best is chosen by luck
  return config
