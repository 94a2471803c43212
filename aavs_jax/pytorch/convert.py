"""Checkpoints in and out: Flax's names and layouts here, PyTorch's there."""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from aavs_jax import config as config_lib
from aavs_jax import methods
from aavs_jax.configs import avss_stage1, avss_stage2
from aavs_jax.console import say
from aavs_jax.input_pipeline import files
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.models.swin import relative_position_index
from aavs_jax.models.vggish import VGGish
from aavs_jax.pytorch import maps_names, torch_files
from aavs_jax.pytorch.names import (
  PIXEL,
  SWIN,
  TRANSFORMER,
  UNUSED,
  VGGISH_MODULES,
  Flat,
  released_name,
  released_order,
  released_to_params,
  to_released_layout,
)
from aavs_jax.training import checkpoint
from aavs_jax.training.start import BACKBONES
from aavs_jax.training.state import count, flat_shapes, flatten, in_groups, is_parameter, matches
from aavs_jax.training.work_folder import load_trained, write_converted
from aavs_jax.types import Variables

KINDS = {
  'aavs': 'an AAVS checkpoint of the release',
  'mask2former': "Mask2Former of the transformers library, a start for AAVS's training",
  'tpavi': 'a checkpoint of TPAVI (AVSBench)',
  'avsegformer': 'a checkpoint of AVSegFormer',
  'pvt_v2': 'PVT-v2 of ImageNet, a start for TPAVI and AVSegFormer',
  'resnet': 'ResNet of torchvision, a start for TPAVI and AVSegFormer',
  'vggish': 'VGGish of torchvggish',
}
_NEW_BEHIND_BACKBONE = (r'^(statistics/)?(tpavi|avsegformer)/',)
# Patterns of our parameters that a kind is known to lack.
_LACKING = {
  'aavs': (),
  'mask2former': (
    r'aavs/.*adapter/',
    r'aavs/audio_projection/',
    r'aavs/decoder/(silent|uncertain|sounding)_key',
  ),
  'tpavi': (),
  'avsegformer': (),
  'pvt_v2': _NEW_BEHIND_BACKBONE,
  # Files of torchvision from before it counted batches are still about.
  'resnet': (*_NEW_BEHIND_BACKBONE, r'^statistics/backbone/.*/count$'),
  'vggish': (r'^aavs/',),
}
UNUSED_TENSORS = 'unused.json'  # beside converted.json: by name, type and numbers
_OF_MAPS = ('tpavi', 'avsegformer', *BACKBONES)
# Points of a head on each of the three levels of the pixel decoder; no checkpoint has others.
_POINTS, _LEVELS = 4, 3


def convert(source: str | Path, out: str | Path, vggish: str | Path = '') -> dict[str, Any]:
  """Makes a work folder, as `aavs train` leaves it, of weights that PyTorch trained.

  Kind and sizes are read from the names and shapes. Every tensor is used or known to be of no use,
  every parameter is filled or one that the kind is known to lack.

  Args:
    source: an AVSS checkpoint of the release, stage 1 or 2; one of TPAVI's or AVSegFormer's; a
      Mask2Former of the transformers library, file or folder; PVT-v2 or ResNet, as their makers
      (torchvision) or the transformers library have them; or VGGish as torchvggish has it. See
      torch_files.read_tensors.
    out: a new or empty folder; it appears only when all of it is written.
    vggish: the audio network, which of these AVSegFormer alone holds: torchvggish's file, or a
      folder that this function made of it.

  Returns:
    What OUT/converted.json holds; see checkpoint.converted.

  Raises:
    UserError: `out` holds something; a file is damaged, of no known kind or not the one asked for;
      tensors do not make up the model.
  """
  for path in (source, vggish or ''):
    files.refuse_bucket(path)
  files.new_folder(out)
  source, out = Path(source), Path(out)
  tensors = maps_names.of_makers(torch_files.read_tensors(source))
  kind = _kind(source, tensors)
  if kind == 'vggish':
    if vggish:
      raise UserError(f'{source} is VGGish itself: leave --vggish out')
    config = avss_stage1.get_config()
    config.vggish, params = _vggish(source, tensors)
  elif kind == 'avsegformer':
    if vggish:
      raise UserError(f'{source} holds an audio network of its own: leave --vggish out')
    own = {name.removeprefix('vggish.'): v for name, v in tensors.items() if 'vggish.' in name}
    audio_config, audio = _vggish(source, own)
    config, params = _maps_model(source, kind, tensors, audio_config)
    params |= audio
  else:
    if not vggish:
      raise UserError(
        f"{source} does not hold the audio network: name torchvggish's file with --vggish, or a "
        'folder converted from it'
      )
    audio_config, audio = _read_vggish(Path(vggish))
    read = _maps_model if kind in _OF_MAPS else _model
    config, params = read(source, kind, tensors, audio_config)
    params |= audio
  note = {
    'kind': kind,
    'source': source.name,
    'vggish': Path(vggish).name,
    'lacking': list(_LACKING[kind]),
    'names': list(tensors),
    'unused': [name for name in tensors if matches(name, _unused_of(kind))],
  }
  # Of what `export` writes, but for positions, of which there are many and which follow from sizes.
  unused = {
    name: (str(tensors[name].dtype), tensors[name].tolist())
    for name in note['unused']
    if kind in ('aavs', *maps_names.CONFIGS) and not name.endswith('_index')
  }
  del tensors
  _say_what_it_is(source, kind, config, params, note['unused'])
  write_converted(out, config, params, note, beside={UNUSED_TENSORS: unused} if unused else None)
  return note


def _kind(source: Path, tensors: Mapping[str, np.ndarray]) -> str:
  if known := maps_names.kind_of(tensors):
    return known

  def any_of(*beginnings):
    return any(name.startswith(beginnings) for name in tensors)

  if any_of(f'{SWIN}.'):
    return 'aavs'
  if any_of(f'{SWIN}.'.removeprefix('model.')):
    return 'mask2former'
  if any_of('features.') and any_of('embeddings.'):
    return 'vggish'
  names = ', '.join(sorted(tensors)[:3])
  raise UserError(
    f'{source} holds {len(tensors)} tensors ({names} ...), which are no checkpoint of AAVS, '
    'TPAVI or AVSegFormer, no Mask2Former with a Swin backbone in the names of the transformers '
    'library, no PVT-v2, ResNet or VGGish: give one of these'
  )


def _size(
  source: Path, tensors: Mapping[str, np.ndarray], name: str, axis: int = 0, prefix: str = ''
) -> int:
  shape = tensors[name].shape if name in tensors else None
  if shape is None or len(shape) <= axis or not shape[axis]:
    found = 'is missing' if shape is None else f'has the shape {shape}'
    raise UserError(f'{source}: {name.removeprefix(prefix)} {found}: fetch the checkpoint again')
  return shape[axis]


def _read_vggish(source: Path) -> tuple[ml_collections.ConfigDict, Flat]:
  """config.vggish and flat parameters of torchvggish's file or a folder converted from it."""
  note = checkpoint.converted(source)
  tensors = {} if note else torch_files.read_tensors(source)
  kind = note['kind'] if note else _kind(source, tensors)
  if kind != 'vggish':
    raise UserError(
      f'{source} is {KINDS.get(kind, kind)}, not the audio network: name '
      "torchvggish's file with --vggish"
    )
  if note:
    config = config_lib.from_json(source / 'config.json')
    return config.vggish, checkpoint.load_flat(source)[0]
  return _vggish(source, tensors)


def _vggish(
  source: Path, tensors: Mapping[str, np.ndarray]
) -> tuple[ml_collections.ConfigDict, Flat]:
  """config.vggish of torchvggish's tensors, and the parameters."""
  widths = {
    module: _size(source, tensors, f'{name}.weight') for module, name in VGGISH_MODULES.items()
  }
  config = avss_stage1.get_config().vggish
  config.embedding = widths.pop('embedding')
  config.dense_widths = (widths.pop('dense0'), widths.pop('dense1'))
  config.conv_widths = tuple(widths.values())
  init = VGGish(**config.to_dict()).init
  template = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 96, 64)))['params']
  return config, released_to_params(
    tensors, flatten(Variables({'vggish': template}, {})), what=str(source)
  )


def _unused_of(kind: str) -> Sequence[str]:
  if kind in maps_names.CONFIGS:
    return ()  # all of it is in the model, what does nothing there too
  return maps_names.UNUSED_OF_IMAGENET if kind in _OF_MAPS else UNUSED


def _maps_model(
  source: Path,
  kind: str,
  tensors: Mapping[str, np.ndarray],
  vggish: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, Flat]:
  """Config of a model of TPAVI, AVSegFormer or a backbone for them, and numbers but VGGish's."""
  config = maps_names.config_of(kind, tensors, functools.partial(_size, source, tensors))
  config.vggish = vggish
  config.vggish.final_relu = True
  try:
    config_lib.check(config)
  except UserError as error:
    raise UserError(f'{source} has sizes that no model has: {error}') from error
  method = kind if kind in maps_names.CONFIGS else ''
  name_of = maps_names.names_of(method, config.model.backbone.kind)
  shapes = flat_shapes(methods.of(config))
  lacking = _LACKING[kind]
  wanted = {
    path: leaf
    for path, leaf in shapes.items()
    if not path.startswith('vggish/') and not matches(path, _NEW_BEHIND_BACKBONE if lacking else ())
  }
  # Of an AVSegFormer's tensors the audio network's have been looked at.
  rest = {name: value for name, value in tensors.items() if not name.startswith('vggish.')}
  params = released_to_params(
    rest, wanted, name_of=name_of, unused=_unused_of(kind), lacking=lacking, what=str(source)
  )
  return config, params


def _model(
  source: Path,
  kind: str,
  tensors: Mapping[str, np.ndarray],
  vggish: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, Flat]:
  """Config of an AAVS or Mask2Former checkpoint, and the parameters without VGGish's."""
  # AAVS holds Mask2Former, of the same names, as its `model`.
  prefix = 'model.' if kind == 'mask2former' else ''
  tensors = {prefix + name: value for name, value in tensors.items()}
  config = released_config(source, tensors, prefix)
  config.vggish = vggish
  try:
    config_lib.check(config)
  except UserError as error:
    raise UserError(f'{source} has sizes that no model has: {error}') from error
  heard = tensors.get('audio_proj.0.weight', np.zeros((1, vggish.embedding))).shape[-1]
  if heard != vggish.embedding:
    raise UserError(
      f'{source} hears embeddings of {heard} numbers, but VGGish gives {vggish.embedding}: name '
      'the VGGish that it was trained with'
    )
  index = relative_position_index(config.model.swin.window)
  for name, value in tensors.items():
    if name.endswith('relative_position_index') and not np.array_equal(value, index):
      raise UserError(
        f'{source}: {name.removeprefix(prefix)} is not that of windows of '
        f'{config.model.swin.window}: fetch the checkpoint again'
      )
  shapes = flat_shapes(methods.of(config))
  return config, released_to_params(
    tensors,
    {path: shape for path, shape in shapes.items() if path.startswith('aavs/')},
    lacking=_LACKING[kind],
    prefix=prefix,
    what=str(source),
  )


def released_config(
  source: Path, tensors: Mapping[str, np.ndarray], prefix: str = ''
) -> ml_collections.ConfigDict:
  """The config whose model has tensors of these released names and shapes.

  Args:
    source: names them in errors.
    tensors: by released name.
    prefix: of the names, not there in the source.

  Raises:
    UserError: a tensor that tells a size is missing.
  """

  def size(name, axis=0):
    return _size(source, tensors, name, axis, prefix)

  def layers(module):
    found = (re.match(rf'{re.escape(module)}\.(\d+)\.', name) for name in tensors)
    return len({match[1] for match in found if match})

  has_audio = any(name.startswith('audio_proj.') for name in tensors)
  has_prior = f'{TRANSFORMER}.audio_embed.weight' in tensors
  num_classes = size('model.class_predictor.weight') - 1  # one is the null class
  binary = has_audio and not has_prior and num_classes == 2
  config = (avss_stage1 if binary else avss_stage2).get_config()
  config.num_classes = num_classes
  config.use_prior = has_prior
  model = config.model
  # Mask2Former has no adapters; of the release's two variants stage 2, with the prior, has 'after'.
  model.adapter_variant = 'none' if not has_audio else 'after' if has_prior else 'replace'
  model.num_queries = size(f'{TRANSFORMER}.queries_embedder.weight')
  config.data.max_targets = min(config.data.max_targets, model.num_queries)
  if has_audio:
    model.audio_hidden = size('audio_proj.0.weight')

  swin = model.swin
  block = f'{SWIN}.encoder.layers.{{}}.blocks.0'
  table = f'{block}.attention.self.relative_position_bias_table'
  swin.embed_dim = size(f'{SWIN}.embeddings.patch_embeddings.projection.weight')
  swin.depths = tuple(layers(f'{SWIN}.encoder.layers.{i}.blocks') for i in range(4))
  swin.heads = tuple(size(table.format(i), 1) for i in range(4))
  swin.window = (math.isqrt(size(table.format(0))) + 1) // 2  # rows: (2 window - 1) squared
  swin.mlp_ratio = size(f'{block.format(0)}.intermediate.dense.weight') // swin.embed_dim

  encoder, decoder = f'{PIXEL}.encoder.layers', f'{TRANSFORMER}.decoder.layers'
  model.hidden = size(f'{PIXEL}.mask_projection.weight')
  model.encoder_layers = layers(encoder)
  model.encoder_ffn = size(f'{encoder}.0.fc1.weight')
  # The decoder has as many heads.
  model.heads = size(f'{encoder}.0.self_attn.attention_weights.weight') // (_LEVELS * _POINTS)
  model.decoder_layers = layers(decoder)
  model.decoder_ffn = size(f'{decoder}.0.fc1.weight')
  return config


def _say_what_it_is(source: Path, kind: str, config, params: Flat, unused: Sequence[str]) -> None:
  parameters = {path: value for path, value in params.items() if is_parameter(path)}
  say(f'{source}: {KINDS[kind]}, {count(parameters) / 1e6:.1f} M parameters with VGGish')
  if kind in _OF_MAPS:
    sizes = ', '.join(f'{key} {value}' for key, value in config.model.backbone.items())
    say(f'  backbone: {sizes}')
    if kind in maps_names.CONFIGS and config.task == 'binary':
      say('  S4 and MS3 have the same tensors: evaluate on either, with --subsets')
  elif kind != 'vggish':
    model, swin = config.model, config.model.swin
    say(
      f'  {config.num_classes} classes, {model.num_queries} queries, Swin {swin.embed_dim} wide '
      f'with {swin.depths} blocks in windows of {swin.window}, {model.encoder_layers} encoder and '
      f'{model.decoder_layers} decoder layers {model.hidden} wide, adapters {model.adapter_variant}'
    )
  if unused:
    say(f'  known to have no part in the model ({len(unused)} tensors): {in_groups(unused)}')
  if kind == 'mask2former':
    say('  it has no adapters and does not hear: training from it initialises those anew')


def export(workdir: str | Path, out: str | Path) -> Path:
  """Writes the best checkpoint of a work folder as the release's state dict.

  Without VGGish, which AVSegFormer's alone has.

  Names, shapes and (in a .pth file) the order are those of the release, or of the file that the
  folder was converted from, which comes out bit by bit.

  Args:
    workdir: a folder of `aavs train`, or of `aavs convert` with a released checkpoint.
    out: a new file, .pth or .safetensors.

  Returns:
    out.

  Raises:
    UserError: the folder holds no model of a released method; `out` exists or ends otherwise.
  """
  files.refuse_bucket(out)
  out = Path(out)
  if out.suffix not in torch_files.WRITABLE:
    raise UserError(f'{out} is not written: let it end in {" or ".join(torch_files.WRITABLE)}')
  if out.exists():
    raise UserError(f'{out} exists already: name a new file, or remove it')
  config, variables, _ = load_trained(workdir)
  if config.method in maps_names.CONFIGS:
    name_of = maps_names.names_of(config.method, config.model.backbone.kind)
    kept = '' if config.method == 'avsegformer' else '(?!vggish/)'
  elif config.method != 'aavs':
    raise UserError(f'{workdir} holds a {config.method}, which has no released checkpoints')
  elif config.model.adapter_variant == 'none':
    raise UserError(f"{workdir} holds a model without adapters, which is none of the release's")
  else:
    name_of, kept = released_name, 'aavs/'
  tensors = {
    name_of(path): to_released_layout(path, np.asarray(value))
    for path, value in flatten(variables).items()
    if re.match(kept, path)
  }
  names = list(tensors)
  if config.method == 'aavs':
    index = relative_position_index(config.model.swin.window)
    for name in [name for name in tensors if name.endswith('.relative_position_bias_table')]:
      tensors[name.replace('_bias_table', '_index')] = index
    empty_weight = np.ones(config.num_classes + 1, np.float32)  # of the classes in the loss
    empty_weight[-1] = config.loss.null_weight
    tensors['model.criterion.empty_weight'] = empty_weight
    names = sorted(tensors, key=released_order)
  _warn_of_what_is_lost(Path(workdir), config, tensors)
  note = checkpoint.converted(workdir)
  if note:
    if (path := epath.Path(workdir) / UNUSED_TENSORS).exists():
      kept = files.read_json(path, dict, 'restore it or convert again')
      tensors |= {name: np.asarray(values, dtype) for name, (dtype, values) in kept.items()}
    names = [name for name in note['names'] if name in tensors]
  torch_files.write_tensors(out, {name: tensors[name] for name in names})
  return out


def _warn_of_what_is_lost(workdir: Path, config, tensors: Mapping[str, np.ndarray]) -> None:
  """Says in what else than numbers the model differs from one that is read from the tensors."""
  if config.method == 'aavs':
    told = released_config(workdir, tensors).model
  else:
    size = functools.partial(_size, workdir, tensors)
    told = maps_names.config_of(config.method, tensors, size).model
  lost = [
    line.split(' ')[0]
    for line in config_lib.differences(told, config.model)
    if not re.match(r'sampling|remat|(swin|backbone)\.drop_path|dropout', line)  # not of the result
  ]
  if lost:
    say(
      f'  WARNING: no released checkpoint differs in config.model.{", ".join(lost)}, so the file '
      'does not tell of it; set it again where you use the file'
    )
