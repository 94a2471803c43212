"""The quickstart's stage 1: a small model that trains everything from scratch on made clips."""

from aavs_jax.configs import base


def get_config():
  config = base.get_config()
  config.data.image_size = 96
  config.data.eval_size = 96
  config.data.item_frames = 5
  config.data.batch_items = 4
  config.data.threads = 1
  config.model.num_queries = 10
  config.model.adapter_variant = 'after'  # in both stages, so that stage 2 can start from stage 1
  config.model.swin.embed_dim = 32
  config.model.swin.depths = (1, 1, 2, 1)
  config.model.swin.heads = (1, 2, 4, 8)
  config.model.swin.window = 6
  config.model.swin.mlp_ratio = 2
  config.model.swin.drop_path = 0.0
  config.model.hidden = 64
  config.model.heads = 4
  config.model.encoder_layers = 1
  config.model.encoder_ffn = 128
  config.model.decoder_layers = 3
  config.model.decoder_ffn = 128
  config.model.audio_hidden = 128
  config.model.sampling = 'dense'
  config.model.remat = 'none'  # so small, it fits: a fifth of the step's time
  config.vggish.conv_widths = (8, 16, 24, 24, 32, 32)
  config.vggish.dense_widths = (128,)
  config.vggish.embedding = 64
  config.loss.points = 192
  config.optimizer.lr = 1e-3
  config.optimizer.clip_norm = 1.0
  config.optimizer.warmup_steps = 50
  config.optimizer.schedule = 'cosine'
  config.train.steps = 360  # two epochs of the quickstart's clips; as many on any others
  config.train.phase2_epoch = 0
  config.train.trainable = (r'.*',)
  config.train.eval_every_steps = 120
  config.train.checkpoint_every_steps = 150
  config.train.log_every_steps = 20
  return config
