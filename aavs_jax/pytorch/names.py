"""Names and layouts of the release's tensors, and of torchvggish's, for parameters and back."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.training.state import matches

# Tensors that have no part in the model: buffers which follow from the sizes, the weights of a
# loss, a norm that the backbone's four outputs do not pass, VGGish's quantisation.
UNUSED = (
  r'\.relative_position_index$',
  r'(^|\.)criterion\.',
  r'pixel_level_module\.encoder\.(swin\.)?layernorm\.',
  r'^pproc\.',
)

SWIN = 'model.model.pixel_level_module.encoder'
PIXEL = 'model.model.pixel_level_module.decoder'
TRANSFORMER = 'model.model.transformer_module'
_LAYERS = f'{TRANSFORMER}.decoder.layers'

# Flax path -> released name, without the last part (kernel, bias, scale); first match wins.
_MODULES = (
  (r'backbone/patch_embed', rf'{SWIN}.embeddings.patch_embeddings.projection'),
  (r'backbone/patch_norm', rf'{SWIN}.embeddings.norm'),
  *((rf'backbone/stage{i}_norm', rf'{SWIN}.hidden_states_norms.stage{i + 1}') for i in range(4)),
  (r'backbone/stage(\d)_merge/(\w+)', rf'{SWIN}.encoder.layers.\1.downsample.\2'),
  (r'backbone/stage(\d)_block(\d+)/(.+)', rf'{SWIN}.encoder.layers.\1.blocks.\2.<\3>'),
  (r'pixel_decoder/input(\d)_projection', rf'{PIXEL}.input_projections.\1.0'),
  (r'pixel_decoder/input(\d)_norm', rf'{PIXEL}.input_projections.\1.1'),
  (r'pixel_decoder/layer(\d+)/attention/(.+)', rf'{PIXEL}.encoder.layers.\1.self_attn.<\2>'),
  (r'pixel_decoder/layer(\d+)/norm1', rf'{PIXEL}.encoder.layers.\1.self_attn_layer_norm'),
  (r'pixel_decoder/layer(\d+)/norm2', rf'{PIXEL}.encoder.layers.\1.final_layer_norm'),
  (r'pixel_decoder/layer(\d+)/(fc\d)', rf'{PIXEL}.encoder.layers.\1.\2'),
  (r'pixel_decoder/mask_features', rf'{PIXEL}.mask_projection'),
  (r'pixel_decoder/lateral_norm', rf'{PIXEL}.adapter_1.1'),
  (r'pixel_decoder/lateral', rf'{PIXEL}.adapter_1.0'),
  (r'pixel_decoder/smooth_norm', rf'{PIXEL}.layer_1.1'),
  (r'pixel_decoder/smooth', rf'{PIXEL}.layer_1.0'),
  (r'decoder/layer(\d+)/self/(.+)', rf'{_LAYERS}.\1.self_attn.<\2>'),
  (r'decoder/layer(\d+)/cross', rf'{_LAYERS}.\1.cross_attn'),
  (r'decoder/layer(\d+)/cross/projection', rf'{_LAYERS}.\1.cross_attn.out_proj'),
  (r'decoder/layer(\d+)/self_norm', rf'{_LAYERS}.\1.self_attn_layer_norm'),
  (r'decoder/layer(\d+)/cross_norm', rf'{_LAYERS}.\1.cross_attn_layer_norm'),
  (r'decoder/layer(\d+)/ffn_norm', rf'{_LAYERS}.\1.final_layer_norm'),
  (r'decoder/layer(\d+)/(fc\d)', rf'{_LAYERS}.\1.\2'),
  (r'decoder/norm', rf'{TRANSFORMER}.decoder.layernorm'),
  (r'decoder/mask_embedding(\d)', rf'{TRANSFORMER}.decoder.mask_predictor.mask_embedder.\1.0'),
  (r'decoder/class_predictor/linear', r'model.class_predictor'),
  (r'audio_projection/down/linear', r'audio_proj.0'),
  (r'audio_projection/up/linear', r'audio_proj.2'),
)  # fmt: skip
_INNER = {
  # Swin block
  'attention': 'attention.self',
  'attention/query': 'attention.self.query',
  'attention/key': 'attention.self.key',
  'attention/value': 'attention.self.value',
  'attention/projection': 'attention.output.dense',
  'attention/adapter/down': 'attention.output.swin_adapt_1.0',
  'attention/adapter/up': 'attention.output.swin_adapt_1.2',
  'adapter/down': 'output.swin_adapt_3.0',
  'adapter/up': 'output.swin_adapt_3.2',
  'norm1': 'layernorm_before',
  'norm2': 'layernorm_after',
  'fc1': 'intermediate.dense',
  'fc2': 'output.dense',
}
_ATTENTION = {
  'output/projection': {'pixel': 'output_proj', 'query': 'out_proj'},
  'output/adapter/down': 'avs_adapt.0',
  'output/adapter/up': 'avs_adapt.2',
  'offsets': 'sampling_offsets',
  'weights': 'attention_weights',
  'query': 'q_proj',
  'key': 'k_proj',
  'value': {'pixel': 'value_proj', 'query': 'v_proj'},
}
_PARAMETERS = {
  'pixel_decoder/level_embedding': f'{PIXEL}.level_embed',
  'decoder/level_embedding': f'{TRANSFORMER}.level_embed.weight',
  'decoder/silent_key': f'{TRANSFORMER}.silence_embed.weight',
  'decoder/uncertain_key': f'{TRANSFORMER}.uncertain_embed.weight',
  'decoder/sounding_key': f'{TRANSFORMER}.audio_embed.weight',
  'queries/features': f'{TRANSFORMER}.queries_features.weight',
  'queries/positions': f'{TRANSFORMER}.queries_embedder.weight',
}
VGGISH_MODULES = {
  **{f'conv{i}': f'features.{j}' for i, j in enumerate((0, 3, 6, 8, 11, 13))},
  'dense0': 'embeddings.0',
  'dense1': 'embeddings.2',
  'embedding': 'embeddings.4',
}
LEAVES = {
  'kernel': '.weight',
  'scale': '.weight',
  'bias': '.bias',
  'relative_position_bias_table': '.relative_position_bias_table',
  'in_kernel': '.in_proj_weight',
  'in_bias': '.in_proj_bias',
  'mean': '.running_mean',
  'var': '.running_var',
  'count': '.num_batches_tracked',
}


# Where PyTorch lists a module among its siblings: after the parent's own parameters, numbers by
# value, the others in this order.
_MODULE_ORDER = (
  'model', 'class_predictor', 'criterion', 'audio_proj', 'pixel_level_module', 'transformer_module',
  'embeddings', 'patch_embeddings', 'projection', 'reduction', 'norm',
  'input_projections', 'queries_embedder', 'queries_features', 'encoder', 'hidden_states_norms',
  'stage1', 'stage2', 'stage3', 'stage4', 'mask_projection', 'adapter_1', 'layer_1',
  'decoder', 'level_embed', 'audio_embed', 'silence_embed', 'uncertain_embed',
  'layers', 'layernorm', 'mask_predictor', 'mask_embedder', 'blocks', 'downsample',
  'layernorm_before', 'attention', 'self', 'query', 'key', 'value', 'layernorm_after',
  'intermediate', 'output', 'dense', 'swin_adapt_1', 'swin_adapt_3',
  'self_attn', 'self_attn_layer_norm', 'cross_attn', 'cross_attn_layer_norm', 'fc1', 'fc2',
  'final_layer_norm', 'sampling_offsets', 'attention_weights', 'value_proj', 'output_proj',
  'k_proj', 'v_proj', 'q_proj', 'out_proj', 'avs_adapt',
)  # fmt: skip
_PARAMETER_ORDER = (
  'relative_position_bias_table', 'relative_position_index', 'level_embed', 'in_proj_weight',
  'in_proj_bias', 'weight', 'bias', 'empty_weight',
)  # fmt: skip

Flat = dict[str, np.ndarray]


def released_name(path: str) -> str:
  """Name in a released checkpoint of a parameter ('aavs/backbone/patch_embed/kernel').

  Those of VGGish ('vggish/conv0/kernel') have their names in torchvggish's file.
  """
  network, path = path.split('/', 1)
  if path in _PARAMETERS:
    return _PARAMETERS[path]
  module, leaf = path.rsplit('/', 1)
  if network == 'vggish':
    return VGGISH_MODULES[module] + LEAVES[leaf]
  for pattern, name in _MODULES:
    match = re.fullmatch(pattern, module)
    if not match:
      continue
    name = match.expand(name)
    inner = re.search(r'<(.+)>', name)
    if inner:
      if module.startswith('backbone'):
        part = _INNER[inner[1]]
      else:
        part = _ATTENTION[inner[1]]
        if isinstance(part, dict):
          part = part['pixel' if module.startswith('pixel_decoder') else 'query']
      name = name.replace(inner[0], part)
    return name + LEAVES[leaf]
  raise KeyError(f'no released name for the parameter {path}')


def released_order(name: str) -> tuple:
  """Sorting key that puts released names in the order of the released state dict."""
  *modules, parameter = name.split('.')
  ranks = (int(word) if word.isdigit() else _MODULE_ORDER.index(word) for word in modules)
  return (*((1, rank) for rank in ranks), (0, _PARAMETER_ORDER.index(parameter)))


def from_released_layout(path: str, value: np.ndarray) -> np.ndarray:
  """A released array in our layout.

  PyTorch keeps linear weights as [out, in] and convolutions as [out, in, height, width].
  """
  if path.endswith('kernel') and value.ndim > 1:
    return np.moveaxis(value, (1, 0), (-2, -1))
  return value


def to_released_layout(path: str, value: np.ndarray) -> np.ndarray:
  """The inverse of from_released_layout."""
  if path.endswith('kernel'):
    return np.moveaxis(value, (-2, -1), (1, 0))
  return value.astype(np.int64) if path.endswith('/count') else value


def released_to_params(
  source: Mapping[str, np.ndarray],
  template: Mapping[str, Any],
  *,
  name_of: Callable[[str], str] = released_name,
  unused: Sequence[str] = UNUSED,
  lacking: Sequence[str] = (),
  prefix: str = '',
  what: str = 'the checkpoint',
) -> Flat:
  """Flat parameters like those of the template (path -> array or shape), from released tensors.

  Args:
    source: tensors by released name.
    template: what the model has.
    name_of: path -> released name.
    unused: patterns of tensors that have no part in the model.
    lacking: patterns of paths that need not be filled, and are left out then.
    prefix: of the names in source, not there in the file.
    what: names the source in errors.

  Raises:
    UserError: a parameter is missing or has another shape, or a tensor is neither used nor known
      to be of no use.
  """
  filled, missing, misfits, used = {}, [], [], set()
  for path, leaf in template.items():
    name = name_of(path)
    if name not in source:
      if not matches(path, lacking):
        missing.append(name.removeprefix(prefix))
      continue
    used.add(name)
    value = from_released_layout(path, source[name])
    if value.shape == leaf.shape:
      # A copy in any case, so that the file can be let go of.
      filled[path] = np.array(value, leaf.dtype, order='C')
    else:
      wanted = to_released_layout(path, np.broadcast_to(0, leaf.shape)).shape
      misfits.append(f'{name.removeprefix(prefix)} {source[name].shape}, not {wanted}')
  unknown = [
    f'{name.removeprefix(prefix)} {value.shape}'
    for name, value in source.items()
    if name not in used and not matches(name, unused)
  ]
  problems = [
    f'{len(names)} {fault}: {", ".join(names[:3])}{" ..." if len(names) > 3 else ""}'
    for fault, names in (('missing', missing), ('of another shape', misfits), ('unknown', unknown))
    if names
  ]
  if problems:
    raise UserError(
      f'{what} does not fit the model that its sizes tell of ({"; ".join(problems)}): fetch it '
      'again, or convert a checkpoint of this method'
    )
  return filled
