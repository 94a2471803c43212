"""Names of the tensors of TPAVI's and AVSegFormer's releases, and the sizes that they tell of."""

import re
from collections.abc import Callable, Mapping

import ml_collections
import numpy as np

from aavs_jax.configs import avsegformer_avss, avsegformer_s4, tpavi_avss, tpavi_s4
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.pytorch.names import LEAVES, VGGISH_MODULES

CONFIGS = {'tpavi': (tpavi_s4, tpavi_avss), 'avsegformer': (avsegformer_s4, avsegformer_avss)}
# Where each has its networks; '' is a backbone's own file, of ImageNet.
_PREFIXES = {
  'tpavi': {'pvt_v2': 'encoder_backbone.', 'resnet': 'resnet.', 'vggish': ''},
  'avsegformer': {'pvt_v2': 'backbone.', 'resnet': 'backbone.', 'vggish': 'vggish.'},
  '': {'pvt_v2': '', 'resnet': '', 'vggish': ''},
}
UNUSED_OF_IMAGENET = (r'^head\.', r'^fc\.')  # its classes
_TELLS = {  # a tensor by which each is known
  'tpavi': 'tpavi_b1.theta.weight',
  'avsegformer': 'head.query_generator.query.weight',
  'pvt_v2': 'patch_embed1.proj.weight',
  'resnet': 'layer1.0.conv1.weight',
}
_TELLS_OF_TRANSFORMERS = (
  'encoder.layers.0.patch_embedding.proj.weight',
  'embedder.embedder.convolution.weight',
)
# Names of the transformers library -> those of the makers, one after the other; stages and layers
# count from 0 there, {0} from 1.
_OF_TRANSFORMERS = (
  (r'^encoder\.layers\.(\d)\.patch_embedding\.proj', 'patch_embed{0}.proj'),
  (r'^encoder\.layers\.(\d)\.patch_embedding\.layer_norm', 'patch_embed{0}.norm'),
  (r'^encoder\.layers\.(\d)\.layer_norm', 'norm{0}'),
  (r'^encoder\.layers\.(\d)\.blocks', 'block{0}'),
  (r'\.layer_norm_1', '.norm1'),
  (r'\.layer_norm_2', '.norm2'),
  *((rf'\.attention\.{there}\.', f'.attn.{here}.') for there, here in (
    ('query', 'q'), ('proj', 'proj'), ('spatial_reduction', 'sr'), ('layer_norm', 'norm'),
  )),
  (r'\.mlp\.dense1', '.mlp.fc1'),
  (r'\.mlp\.dense2', '.mlp.fc2'),
  (r'^embedder\.embedder\.convolution', 'conv1'),
  (r'^embedder\.embedder\.normalization', 'bn1'),
  (r'^encoder\.stages\.(\d)\.layers', 'layer{0}'),
  (r'\.shortcut\.convolution', '.downsample.0'),
  (r'\.shortcut\.normalization', '.downsample.1'),
  (r'\.layer\.([012])\.convolution', '.conv{0}'),
  (r'\.layer\.([012])\.normalization', '.bn{0}'),
  (r'^classifier\.', 'head.'),
)  # fmt: skip
_POINTS = 4  # of a head on each of three levels; no checkpoint of AVSegFormer has others
_LEVELS = 3

# Flax path -> released name, without the last part. {0}, {1}: what the pattern has found; {up}, the
# first of them and 1; {twice}, the first doubled; {inner}, the last by _INNER.
_MODULES = {
  'pvt_v2': (
    (r'stage(\d)_embed', 'patch_embed{up}.proj'),
    (r'stage(\d)_embed_norm', 'patch_embed{up}.norm'),
    (r'stage(\d)_norm', 'norm{up}'),
    (r'stage(\d)_block(\d+)/(.+)', 'block{up}.{1}.{inner}'),
  ),
  'resnet': (
    (r'stem', 'conv1'),
    (r'stem_norm', 'bn1'),
    (r'stage([01])_block(\d+)/(.+)', 'layer{up}.{1}.{inner}'),
    (r'stage([23])_block(\d+)/(.+)', 'layer{up}_1.{1}.{inner}'),
    (r'spare([23])_block(\d+)/(.+)', 'layer{up}_2.{1}.{inner}'),
  ),
  'tpavi': (
    (r'channels(\d)/dilation(\d)', 'conv{up}.conv2d_list.{1}'),
    (r'level(\d)/(.+)', 'tpavi_b{up}.{inner}'),
    (r'path(\d)/unit(\d)/(conv\d)', 'path{up}.resConfUnit{1}.{2}'),
    (r'head/conv(\d)', 'output_conv.{twice}'),
  ),
  'avsegformer': (
    (r'audio_projection/linear', 'audio_proj'),
    (r'encoder/layer(\d+)/(.+)', 'head.transformer.encoder.layers.{0}.{inner}'),
    (r'decoder/layer(\d+)/(.+)', 'head.transformer.decoder.layers.{0}.{inner}'),
    (r'generator/layer(\d+)/mlp/fc1', 'head.query_generator.layers.{0}.ffn.0'),
    (r'generator/layer(\d+)/mlp/fc2', 'head.query_generator.layers.{0}.ffn.2'),
    (r'generator/layer(\d+)/(.+)', 'head.query_generator.layers.{0}.{inner}'),
    (r'input(\d)', 'head.in_proj.{0}.0'),
    (r'input(\d)_norm', 'head.in_proj.{0}.1'),
    (r'query_mlp(\d)', 'head.mlp.layers.{0}'),
    (r'mixer/(.+)', 'head.fusion_block.{inner}'),
    (r'lateral', 'head.lateral_conv.0'),
    (r'lateral_norm', 'head.lateral_conv.1'),
    (r'smooth', 'head.out_conv.0'),
    (r'smooth_norm', 'head.out_conv.1'),
    (r'head/conv(\d)', 'head.fc.{twice}'),
    (r'spare_attention/conv(\d)', 'head.attn_fc.{twice}'),
    (r'spare_fpn(\d)', 'head.fpn.up{up}.1'),
  ),
}
_INNER = {
  'pvt_v2': {
    'attention/query': 'attn.q', 'attention/key_value': 'attn.kv', 'attention/reduction': 'attn.sr',
    'attention/reduction_norm': 'attn.norm', 'attention/projection': 'attn.proj',
    'fc1': 'mlp.fc1', 'depthwise': 'mlp.dwconv.dwconv', 'fc2': 'mlp.fc2',
  },
  'resnet': {
    'norm1': 'bn1', 'norm2': 'bn2', 'norm3': 'bn3',
    'shortcut': 'downsample.0', 'shortcut_norm': 'downsample.1',
  },
  'tpavi': {
    'align': 'align_channel', 'norm': 'norm_layer', 'projection': 'W_z.0',
    'projection_norm': 'W_z.1',
  },
  'avsegformer': {
    'attention/offsets': 'self_attn.sampling_offsets',
    'attention/weights': 'self_attn.attention_weights',
    'attention/value': 'self_attn.value_proj',
    'attention/output/projection': 'self_attn.output_proj',
    'self': 'self_attn', 'self/projection': 'self_attn.out_proj',
    'cross': 'cross_attn', 'cross/projection': 'cross_attn.out_proj',
    'mlp/fc1': 'linear1', 'mlp/fc2': 'linear2',
    'query': 'q_proj', 'key_value': 'kv_proj', 'projection': 'proj',
  },
}  # fmt: skip
_PARAMETERS = {
  'avsegformer/encoder/level_embedding': 'head.level_embed',
  'avsegformer/generated_queries': 'head.query_generator.query.weight',
  'avsegformer/learned_queries': 'head.learnable_query.weight',
}


def names_of(method: str, backbone: str) -> Callable[[str], str]:
  """Path of a number of the model ('backbone/stem/kernel') -> its name in a released checkpoint.

  Args:
    method: 'tpavi', 'avsegformer', or '' for the file of a backbone alone, where ResNet's two last
      stages stand once.
    backbone: 'pvt_v2' or 'resnet'.
  """

  def name_of(path: str) -> str:
    path = path.removeprefix('statistics/')
    if path in _PARAMETERS:
      return _PARAMETERS[path]
    network, path = path.split('/', 1)
    module, leaf = path.rsplit('/', 1)
    if network == 'vggish':
      return _PREFIXES[method]['vggish'] + VGGISH_MODULES[module] + LEAVES[leaf]
    prefix, kind = '', network
    if network == 'backbone':
      prefix, kind = _PREFIXES[method][backbone], backbone
    name = prefix + _module_name(kind, module) + LEAVES[leaf]
    return name if method else re.sub(r'^(layer\d)_\d', r'\1', name)

  return name_of


def _module_name(kind: str, module: str) -> str:
  for pattern, template in _MODULES[kind]:
    match = re.fullmatch(pattern, module)
    if match:
      found = match.groups() or ('',)
      number = int(found[0]) if found[0].isdigit() else 0
      inner = _INNER[kind].get(found[-1], found[-1])
      return template.format(*found, up=number + 1, twice=2 * number, inner=inner)
  raise KeyError(f'no released name for the module {module} of {kind}')


def _up(match: re.Match) -> list[int]:
  return [int(number) + 1 for number in match.groups()]


def of_makers(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
  """Tensors of PVT-v2 or ResNet by their makers' names, where they have the transformers library's.

  Others are returned as they are.
  """
  bare = {re.sub(r'^(pvt_v2|resnet)\.', '', name): value for name, value in tensors.items()}
  if not any(name in bare for name in _TELLS_OF_TRANSFORMERS):
    return tensors
  result = {}
  for name, value in bare.items():
    for pattern, template in _OF_TRANSFORMERS:
      name = re.sub(pattern, lambda match: template.format(*_up(match)), name)  # noqa: B023
    result[name] = value
  for name in [name for name in result if '.attention.key.' in name]:  # the makers' one layer
    both = np.concatenate([result.pop(name), result.pop(name.replace('.key.', '.value.'))])
    result[name.replace('attention.key', 'attn.kv')] = both
  return result


def kind_of(tensors: Mapping[str, np.ndarray]) -> str | None:
  """'tpavi', 'avsegformer', 'pvt_v2', 'resnet', or None."""
  return next((kind for kind, name in _TELLS.items() if name in tensors), None)


def config_of(
  kind: str, tensors: Mapping[str, np.ndarray], size: Callable[..., int]
) -> ml_collections.ConfigDict:
  """The config whose model has tensors of these names and shapes, but for its VGGish.

  Whether a model of one map is of S4 or of MS3 no tensor tells: they have the same config here.

  Args:
    kind: see kind_of; of a backbone alone the config is TPAVI's.
    tensors: by released name.
    size: (name, axis=0) -> length; raises UserError.
  """
  method = kind if kind in CONFIGS else ''

  def layers(module):
    found = (re.match(rf'{re.escape(module)}\.(\d+)\.', name) for name in tensors)
    return len({match[1] for match in found if match})

  def has(backbone):
    return _PREFIXES[method][backbone] + _TELLS[backbone] in tensors

  backbone = next((name for name in ('pvt_v2', 'resnet') if has(name)), None)
  if backbone is None:
    raise UserError(f'{kind} has neither PVT-v2 nor ResNet as its backbone: fetch it again')
  binary, semantic = CONFIGS[method or 'tpavi']
  last = {'tpavi': 'output_conv', 'avsegformer': 'head.fc'}.get(method)
  classes = size(f'{last}.4.weight') if method else 1
  variant = {'pvt_v2': 'pvt_v2', 'resnet': 'resnet50'}[backbone]
  config = (binary if classes == 1 else semantic).get_config(variant)
  if classes > 1:
    config.num_classes = classes
    config.data.max_targets = min(config.data.max_targets, classes)
  elif method:
    config.data.subsets = ('v1s', 'v1m')
  model = config.model
  _read_backbone(model.backbone, backbone, _PREFIXES[method][backbone], size, layers)
  if not method:
    return config
  model.head = (size(f'{last}.0.weight'), size(f'{last}.2.weight'))
  if method == 'tpavi':
    model.width = size('conv1.conv2d_list.0.weight')
    return config
  transformer, generator = 'head.transformer', 'head.query_generator'
  model.hidden = size('audio_proj.weight')
  rows = size(f'{transformer}.encoder.layers.0.self_attn.attention_weights.weight')
  model.heads = rows // (_LEVELS * _POINTS)
  model.queries = size(f'{generator}.query.weight')
  model.mlp_hidden = size('head.mlp.layers.0.weight')
  model.spare_fpn = size('head.fpn.up1.1.weight')
  for part, stack, linear in (
    ('encoder', f'{transformer}.encoder.layers', 'linear1'),
    ('decoder', f'{transformer}.decoder.layers', 'linear1'),
    ('generator', f'{generator}.layers', 'ffn.0'),
  ):
    model[f'{part}_layers'] = layers(stack)
    model[f'{part}_ffn'] = size(f'{stack}.0.{linear}.weight')
  return config


def _read_backbone(config, kind: str, prefix: str, size, layers) -> None:
  """Sizes of a backbone, into config.model.backbone."""
  if kind == 'pvt_v2':
    config.dims = tuple(size(f'{prefix}patch_embed{i}.proj.weight') for i in range(1, 5))
    config.depths = tuple(layers(f'{prefix}block{i}') for i in range(1, 5))
    kernels = [size(f'{prefix}block{i}.0.attn.sr.weight', 2) for i in range(1, 4)]
    config.reductions = (*kernels, 1)
    config.mlp_ratio = size(f'{prefix}block1.0.mlp.fc1.weight') // config.dims[0]
    return
  stages = [f'{prefix}layer{i}' for i in range(1, 5)]
  if prefix:
    stages[2:] = [f'{stage}_1' for stage in stages[2:]]
  config.stem = size(f'{prefix}conv1.weight')
  config.planes = tuple(size(f'{stage}.0.conv1.weight') for stage in stages)
  config.blocks = tuple(map(layers, stages))
