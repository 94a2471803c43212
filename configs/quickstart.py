"""The quickstart: made clips, both stages, every evaluation; about ten minutes on two cores."""

import ml_collections

from aavs_jax.configs import quick_stage1, quick_stage2


def get_config() -> ml_collections.ConfigDict:
  """A study: the clips to make, the configs of its stages, and the seeds to repeat it with."""
  config = ml_collections.ConfigDict()
  config.clips = dict(
    train=dict(v1s=240, v1m=240, v2=120),
    val=dict(v1s=12, v1m=20, v2=8),
    test=dict(v1s=30, v1m=60, v2=30),
  )
  config.num_classes = 8
  config.image = (160, 120)
  config.stage1 = quick_stage1.get_config()
  config.stage2 = quick_stage2.get_config()
  for stage in (config.stage1, config.stage2):  # what hears comes with the start, and stays
    stage.train.trainable = (r'^(?!vggish/)',)
  config.seeds = (0,)
  # A stage that learns the looks of the classes before both stages begin, from silent clips in
  # which all that can be seen is labelled; None leaves it out.
  config.looks = None
  # A stage 2 that is trained beside the published one, with config.prior; None leaves it out.
  config.robust = None
  # Also train the same model on semantic labels from the start, for as many frames as both stages
  # together; False leaves it out.
  config.end_to_end = False
  # Other methods on the same clips: their names, and stage1 and stage2 of each.
  config.others = ml_collections.ConfigDict()
  return config
