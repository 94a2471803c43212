"""The converted network against the transformers library's, and VGGish against PyTorch's layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from aavs_jax import config as config_lib
from aavs_jax.methods import maps
from aavs_jax.models.aavs import AAVS
from aavs_jax.models.vggish import VGGish
from aavs_jax.pytorch.convert import convert
from aavs_jax.training import checkpoint
from aavs_jax.training.state import flatten, matches, unflatten
from aavs_jax.types import Variables
from tests import tiny
from tests.released import random_vggish

torch = pytest.importorskip('torch')

# Sizes of transformers' configs, of the backbone and of the rest. The small one pads in two stages
# and has a map that is smaller than the window; the large one is the published Swin-B on ADE20k.
SMALL = 64, dict(embed_dim=8, depths=[2, 1, 1, 2], num_heads=[1, 2, 2, 4], window_size=3), dict(
  hidden_dim=32, feature_size=32, mask_feature_size=32, num_attention_heads=2, num_queries=7,
  encoder_layers=2, encoder_feedforward_dim=48, decoder_layers=4, dim_feedforward=40, num_labels=5,
)  # fmt: skip
PUBLISHED = 384, dict(
  embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=12
), dict(
  hidden_dim=256, feature_size=256, mask_feature_size=256, num_attention_heads=8, num_queries=100,
  encoder_layers=6, encoder_feedforward_dim=1024, decoder_layers=10, dim_feedforward=2048,
  num_labels=150,
)  # fmt: skip


def peer(image, backbone, sizes):
  """Mask2Former with a Swin backbone; every parameter random, none zero or alike as when new.

  Queries are large and the decoder's layers small, so that queries stay different: of alike ones
  the masks would soon be empty, and an empty mask does not mask.
  """
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  stages = ['stage1', 'stage2', 'stage3', 'stage4']
  swin = transformers.SwinConfig(image_size=image, out_features=stages, **backbone)
  config = transformers.Mask2FormerConfig(backbone_config=swin, **sizes)
  model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
  for name, parameter in model.named_parameters():
    gain = 0.6 if 'transformer_module.decoder.layers' in name else 1.2
    scale = gain / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1
    for ending, other in (
      ('relative_position_bias_table', 0.5),
      ('sampling_offsets.bias', 1.5),
      ('queries_embedder.weight', 2.0),
      ('queries_features.weight', 2.0),
    ):
      scale = other if name.endswith(ending) else scale
    offset = 1.0 if name.endswith('weight') and 'norm' in name else 0.0
    with torch.no_grad():
      parameter.normal_(offset, scale)
  return model


def converted(model, folder):
  """What a user gets of a saved model: config and flat parameters."""
  sound = tiny.get_config('stage1')
  sound.vggish.dense_widths = (16, 16)
  save_file(random_vggish(sound, 0), folder / 'vggish.safetensors')
  model.save_pretrained(folder / 'saved')
  convert(folder / 'saved', folder / 'run', folder / 'vggish.safetensors')
  params, _ = checkpoint.load_flat(folder / 'run')
  return config_lib.from_json(folder / 'run' / 'config.json'), params


def both(size, folder):
  """Class logits [q c+1] and mask logits [q h w] of one image, theirs and ours."""
  model = peer(*size)
  config, params = converted(model, folder)
  pixels = np.random.default_rng(0).standard_normal((1, 3, size[0], size[0]), np.float32)
  with torch.no_grad():
    theirs = model(pixel_values=torch.from_numpy(pixels))

  ours = AAVS(num_classes=config.num_classes, use_prior=False, **config.model.to_dict())
  arguments = jnp.asarray(pixels.transpose(0, 2, 3, 1)), jnp.zeros((1, config.vggish.embedding))
  template = jax.eval_shape(ours.init, jax.random.key(0), *arguments)['params']
  template = flatten(Variables({'aavs': template}, {}))
  lacking = [path for path in template if path not in params]
  lacks = checkpoint.converted(folder / 'run')['lacking']
  assert lacking == [path for path in template if matches(path, lacks)]
  # Without adapters and deaf: Swin's adapters add nothing, nor does the sound to the queries.
  params |= {path: np.zeros(template[path].shape, np.float32) for path in lacking}
  tree = unflatten({path: params[path] for path in template}).params['aavs']
  outputs = jax.jit(ours.apply)({'params': tree}, *arguments)
  return (
    (theirs.class_queries_logits[0].numpy(), np.asarray(outputs.class_logits[-1, 0])),
    (theirs.masks_queries_logits[0].numpy(), np.asarray(outputs.mask_logits[-1, 0])),
  )


def relative(theirs, ours):
  assert theirs.shape == ours.shape
  return np.abs(theirs - ours).max() / np.abs(theirs).max()


def test_a_small_mask2former(tmp_path):
  classes, masks = both(SMALL, tmp_path)
  assert classes[0].shape == (7, 6) and masks[0].shape == (7, 16, 16)
  assert relative(*classes) < 1e-4 and relative(*masks) < 1e-4


@pytest.mark.slow
def test_mask2former_of_the_published_size(tmp_path):
  classes, masks = both(PUBLISHED, tmp_path)
  assert classes[0].shape == (100, 151) and masks[0].shape == (100, 96, 96)
  assert relative(*classes) < 1e-4 and relative(*masks) < 1e-4


PVT_V2 = 'pvt_v2', dict(
  hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], num_attention_heads=[1, 2, 3, 4],
  sr_ratios=[8, 4, 2, 1], mlp_ratios=[2, 2, 2, 2],
)  # fmt: skip
PVT_V2_B5 = 'pvt_v2', dict(
  hidden_sizes=[64, 128, 320, 512], depths=[3, 6, 40, 3], num_attention_heads=[1, 2, 5, 8],
  sr_ratios=[8, 4, 2, 1], mlp_ratios=[4, 4, 4, 4],
)  # fmt: skip
RESNET = (
  'resnet',
  dict(
    embedding_size=6, hidden_sizes=[8, 12, 16, 20], depths=[1, 2, 1, 1], layer_type='bottleneck'
  ),
)
RESNET50 = 'resnet', dict(
  embedding_size=64, hidden_sizes=[256, 512, 1024, 2048], depths=[3, 4, 6, 3],
  layer_type='bottleneck',
)  # fmt: skip


@pytest.mark.parametrize(
  ('size', 'kind'),
  [
    (64, PVT_V2),
    (64, RESNET),
    pytest.param(224, PVT_V2_B5, marks=pytest.mark.slow),
    pytest.param(224, RESNET50, marks=pytest.mark.slow),
  ],
)
def test_backbones(size, kind, tmp_path):
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  kind, sizes = kind
  if kind == 'pvt_v2':
    config = transformers.PvtV2Config(layer_norm_eps=1e-6, **sizes)
    model = transformers.PvtV2Model(config).eval()
    for name, module in model.named_modules():
      if name.endswith(('patch_embedding.layer_norm', 'attention.layer_norm')):
        module.eps = 1e-5  # as in their makers' model, which the library forgets
  else:
    model = transformers.ResNetModel(transformers.ResNetConfig(**sizes)).eval()
  for name, value in model.state_dict().items():
    if value.dtype != torch.float32:
      continue
    if value.ndim > 1:
      value.normal_(0, value[0].numel() ** -0.5)
    elif name.endswith(('weight', 'running_var')):
      value.uniform_(0.7, 1.3)
    else:
      value.normal_(0, 0.1)
  sound = tiny.get_config('stage1')
  sound.vggish.dense_widths = (16, 16)
  save_file(random_vggish(sound, 0), tmp_path / 'vggish.safetensors')
  model.save_pretrained(tmp_path / 'saved')
  note = convert(tmp_path / 'saved', tmp_path / 'run', tmp_path / 'vggish.safetensors')
  assert note['kind'] == kind and not note['unused']
  config = config_lib.from_json(tmp_path / 'run' / 'config.json')
  numbers = unflatten(checkpoint.load_flat(tmp_path / 'run')[0])
  variables = {
    'params': numbers.params['backbone'],
    'statistics': numbers.statistics.get('backbone', {}),
  }
  pixels = np.random.default_rng(0).standard_normal((1, 3, size, size), np.float32)
  with torch.no_grad():
    theirs = model(torch.from_numpy(pixels), output_hidden_states=True).hidden_states[-4:]
  network = maps.backbone_of(config)
  ours = jax.jit(lambda x: network.apply(variables, x, False))(pixels.transpose(0, 2, 3, 1))
  for theirs_, ours_ in zip(theirs, ours, strict=True):
    assert relative(theirs_.numpy(), np.asarray(ours_).transpose(0, 3, 1, 2)) < 1e-4


def test_vggish(tmp_path):
  """The network as torchvggish writes it, from the same file that is converted."""
  config = tiny.get_config('stage1')
  config.vggish.dense_widths = (16, 12)
  tensors = random_vggish(config, 0)
  save_file(tensors, tmp_path / 'vggish.safetensors')
  convert(tmp_path / 'vggish.safetensors', tmp_path / 'run')
  params, _ = checkpoint.load_flat(tmp_path / 'run')
  sizes = config_lib.from_json(tmp_path / 'run' / 'config.json').vggish.to_dict()
  log_mel = np.random.default_rng(0).standard_normal((3, 96, 64), np.float32)
  ours = VGGish(**sizes).apply({'params': unflatten(params).params['vggish']}, log_mel)

  def layer(function, name, x):
    weight, bias = (torch.from_numpy(tensors[f'{name}.{part}']) for part in ('weight', 'bias'))
    return function(x, weight, bias)

  def convolve(x, weight, bias):
    return torch.relu(torch.conv2d(x, weight, bias, padding=1))

  x = torch.from_numpy(log_mel)[:, None]
  for i in (0, 3, 6, 8, 11, 13):
    x = layer(convolve, f'features.{i}', x)
    if i in (0, 3, 8, 13):
      x = torch.max_pool2d(x, 2)
  x = x.transpose(1, 3).transpose(1, 2).reshape(3, -1)  # time, band, channel
  linear = torch.nn.functional.linear
  for i in (0, 2):
    x = torch.relu(layer(linear, f'embeddings.{i}', x))
  theirs = layer(linear, 'embeddings.4', x).numpy()
  assert (theirs < 0).any()
  assert relative(theirs, np.asarray(ours)) < 1e-5
