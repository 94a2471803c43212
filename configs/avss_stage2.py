"""AVSS, stage 2 (what): semantic labels; the prior is the truth in training, then the masks."""

from aavs_jax.configs import base

VARIANTS = base.RECIPES


def get_config(variant='release'):
  config = base.get_config()
  config.task = 'semantic'
  config.num_classes = 71
  config.use_prior = True
  config.data.max_targets = 8
  config.model.num_queries = 100
  config.model.adapter_variant = 'after'
  config.optimizer.clip_norm = 0.0
  config.train.phase2_epoch = 20
  config.train.trainable = (  # without the query features, with the keys of the prior
    r'aavs/queries/positions',
    r'aavs/.*adapter/',
    r'aavs/decoder/class_predictor/',
    r'aavs/decoder/(silent|uncertain|sounding)_key',
    r'aavs/audio_projection/',
  )
  return base.with_recipe(config, variant, paper_epochs=30)
