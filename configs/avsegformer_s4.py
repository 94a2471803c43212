"""AVSegFormer, single source, on PVT-v2-B5 or ResNet-50 that ImageNet has trained, at 512x512."""

from aavs_jax.configs import _maps

VARIANTS = tuple(_maps.BACKBONES)


def get_config(backbone='pvt_v2', task='s4'):
  config = _maps.get_config('avsegformer', task, backbone)
  if task != 'avss':
    config.data.image_size = config.data.eval_size = 512  # the paper's text: 224
    config.data.batch_items = 2
  config.model.hidden = 256
  config.model.heads = 8
  config.model.queries = 300
  config.model.encoder_layers = 6
  config.model.encoder_ffn = 2048
  config.model.encoder_points = 4
  config.model.decoder_layers = 6
  config.model.decoder_ffn = 2048
  config.model.generator_layers = 6
  config.model.generator_ffn = 1024
  config.model.mlp_hidden = 2048  # of the network over the maps of the queries
  config.model.spare_fpn = 256  # of tensors that the release has and does not use
  config.model.head = (128, 32)  # widths before the last convolution
  config.model.dropout = 0.1
  config.model.sampling = 'gather'  # 'dense' on TPUs and for small maps
  config.loss.mixer_weight = 0.1
  config.optimizer.lr = config.optimizer.lr_phase2 = 2e-5
  config.optimizer.weight_decay = 0.01
  config.train.epochs = 30.0
  config.train.phase2_epoch = 0 if task == 'avss' else 5  # from then on the backbone trains
  config.train.trainable = (r'^backbone/(?!spare)', r'^avsegformer/(?!spare)')
  return config
