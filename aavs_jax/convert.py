"""Parameter names and layouts: Flax here, the released PyTorch checkpoints there."""

import re
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from aavs_jax.types import Params
from input_pipeline.errors import UserError

_SWIN = 'model.model.pixel_level_module.encoder'
_PIXEL = 'model.model.pixel_level_module.decoder'
_TRANSFORMER = 'model.model.transformer_module'
_LAYERS = f'{_TRANSFORMER}.decoder.layers'

# Flax path -> released name, without the last part (kernel, bias, scale); first match wins.
_MODULES = (
  (r'backbone/patch_embed', rf'{_SWIN}.embeddings.patch_embeddings.projection'),
  (r'backbone/patch_norm', rf'{_SWIN}.embeddings.norm'),
  *((rf'backbone/stage{i}_norm', rf'{_SWIN}.hidden_states_norms.stage{i + 1}') for i in range(4)),
  (r'backbone/stage(\d)_merge/(\w+)', rf'{_SWIN}.encoder.layers.\1.downsample.\2'),
  (r'backbone/stage(\d)_block(\d+)/(.+)', rf'{_SWIN}.encoder.layers.\1.blocks.\2.<\3>'),
  (r'pixel_decoder/input(\d)_projection', rf'{_PIXEL}.input_projections.\1.0'),
  (r'pixel_decoder/input(\d)_norm', rf'{_PIXEL}.input_projections.\1.1'),
  (r'pixel_decoder/layer(\d)/attention/(.+)', rf'{_PIXEL}.encoder.layers.\1.self_attn.<\2>'),
  (r'pixel_decoder/layer(\d)/norm1', rf'{_PIXEL}.encoder.layers.\1.self_attn_layer_norm'),
  (r'pixel_decoder/layer(\d)/norm2', rf'{_PIXEL}.encoder.layers.\1.final_layer_norm'),
  (r'pixel_decoder/layer(\d)/(fc\d)', rf'{_PIXEL}.encoder.layers.\1.\2'),
  (r'pixel_decoder/mask_features', rf'{_PIXEL}.mask_projection'),
  (r'pixel_decoder/lateral_norm', rf'{_PIXEL}.adapter_1.1'),
  (r'pixel_decoder/lateral', rf'{_PIXEL}.adapter_1.0'),
  (r'pixel_decoder/smooth_norm', rf'{_PIXEL}.layer_1.1'),
  (r'pixel_decoder/smooth', rf'{_PIXEL}.layer_1.0'),
  (r'decoder/layer(\d+)/self/(.+)', rf'{_LAYERS}.\1.self_attn.<\2>'),
  (r'decoder/layer(\d+)/cross', rf'{_LAYERS}.\1.cross_attn'),
  (r'decoder/layer(\d+)/cross/projection', rf'{_LAYERS}.\1.cross_attn.out_proj'),
  (r'decoder/layer(\d+)/self_norm', rf'{_LAYERS}.\1.self_attn_layer_norm'),
  (r'decoder/layer(\d+)/cross_norm', rf'{_LAYERS}.\1.cross_attn_layer_norm'),
  (r'decoder/layer(\d+)/ffn_norm', rf'{_LAYERS}.\1.final_layer_norm'),
  (r'decoder/layer(\d+)/(fc\d)', rf'{_LAYERS}.\1.\2'),
  (r'decoder/norm', rf'{_TRANSFORMER}.decoder.layernorm'),
  (r'decoder/mask_embedding(\d)', rf'{_TRANSFORMER}.decoder.mask_predictor.mask_embedder.\1.0'),
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
  'pixel_decoder/level_embedding': f'{_PIXEL}.level_embed',
  'decoder/level_embedding': f'{_TRANSFORMER}.level_embed.weight',
  'decoder/silent_key': f'{_TRANSFORMER}.silence_embed.weight',
  'decoder/uncertain_key': f'{_TRANSFORMER}.uncertain_embed.weight',
  'decoder/sounding_key': f'{_TRANSFORMER}.audio_embed.weight',
  'queries/features': f'{_TRANSFORMER}.queries_features.weight',
  'queries/positions': f'{_TRANSFORMER}.queries_embedder.weight',
}
_LEAVES = {
  'kernel': '.weight',
  'scale': '.weight',
  'bias': '.bias',
  'relative_position_bias_table': '.relative_position_bias_table',
  'in_kernel': '.in_proj_weight',
  'in_bias': '.in_proj_bias',
}


def released_name(path: str) -> str:
  """Name in a released checkpoint of the parameter at a path ('backbone/patch_embed/kernel')."""
  if path in _PARAMETERS:
    return _PARAMETERS[path]
  module, leaf = path.rsplit('/', 1)
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
    return name + _LEAVES[leaf]
  raise KeyError(f'no released name for the parameter {path}')


def from_released_layout(path: str, value: np.ndarray) -> np.ndarray:
  """A released array in our layout.

  PyTorch keeps linear weights as [out, in] and convolutions as [out, in, height, width].
  """
  if path.endswith('kernel'):
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
  return value


def released_to_params(source: Mapping[str, np.ndarray], template: Params) -> Params:
  """A parameter tree like the template (arrays or shapes), filled from a released state dict.

  Every parameter must be there in its shape, and every source tensor be used, save the relative
  position index, which is recomputed. Raises UserError with the names otherwise.
  """
  flat = traverse_util.flatten_dict(template, sep='/')
  filled, missing, misfits = {}, [], []
  for path, leaf in flat.items():
    name = released_name(path)
    if name not in source:
      missing.append(name)
      continue
    value = np.ascontiguousarray(from_released_layout(path, np.asarray(source[name])))
    if value.shape != leaf.shape:
      misfits.append(f'{name} is {value.shape}, the model has {leaf.shape}')
    filled[path] = value.astype(leaf.dtype)
  used = {released_name(path) for path in flat}
  unused = [k for k in source if k not in used and not k.endswith('relative_position_index')]
  problems = [
    f'{what}: {", ".join(names[:5])}{" ..." if len(names) > 5 else ""} ({len(names)})'
    for what, names in (('missing', missing), ('of another shape', misfits), ('unknown', unused))
    if names
  ]
  if problems:
    raise UserError(
      f'the checkpoint does not fit the model ({"; ".join(problems)}): '
      'convert it with the config of its own stage and size'
    )
  return traverse_util.unflatten_dict(filled, sep='/')
