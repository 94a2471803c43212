"""The quickstart's configs, small enough to compile in seconds: --config tests/tiny.py:stage1."""

from aavs_jax.configs import quick_stage1, quick_stage2


def get_config(stage='stage1'):
  config = {'stage1': quick_stage1, 'stage2': quick_stage2}[stage].get_config()
  config.data.image_size = 32
  config.data.eval_size = 32
  config.data.batch_items = 2
  config.model.num_queries = 6
  config.model.swin.embed_dim = 8
  config.model.swin.depths = (1, 1, 1, 1)
  config.model.swin.heads = (1, 1, 1, 1)
  config.model.swin.window = 2
  config.model.hidden = 32
  config.model.heads = 2
  config.model.encoder_layers = 1
  config.model.encoder_ffn = 32
  config.model.decoder_layers = 1
  config.model.decoder_ffn = 32
  config.model.audio_hidden = 16
  config.vggish.conv_widths = (2, 2, 4, 4, 4, 4)
  config.vggish.dense_widths = (16,)
  config.vggish.embedding = 8
  config.loss.points = 16
  config.optimizer.warmup_steps = 2
  config.train.steps = config.train.eval_every_steps = 0
  config.train.epochs = 2.0
  config.train.eval_every_epochs = 1.0
  config.train.checkpoint_every_steps = 4
  config.train.log_every_steps = 1
  return config
