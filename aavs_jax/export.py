"""Artefacts that predict without this package: one or both stages as files, and model.json.

model.json says all that a caller needs: sizes, how frames and sound become inputs, how stage 1's
masks reach stage 2, names and colours of the classes. `aavs_jax.serving` loads the StableHLO form.
"""

import hashlib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax import export as jax_export
from jaxtyping import Array, Float, UInt8

from aavs_jax import config as config_lib
from aavs_jax import methods
from aavs_jax.input_pipeline import audio, files
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.media.overlay import SOUNDING_COLOUR, legend_colour
from aavs_jax.training import checkpoint
from aavs_jax.training.state import flatten, unflatten
from aavs_jax.training.work_folder import Trained, class_names, load_stages

_NEEDS = {'onnx': ('jax2onnx',), 'stablehlo': ('flatbuffers', 'safetensors')}
MODEL = 'model.json'
_PLATFORMS = ('cpu', 'cuda', 'tpu')
_FRAMES = (
  'RGB, resized to image_size x image_size whatever the aspect ratio, by the bilinear filter with '
  'antialias of Pillow; bytes as they are, normalisation is inside the model'
)
_LOG_MEL = (
  'ln(mel + log_offset), where mel is magnitudes (not powers) of spectra times triangles. Mono '
  'sound in [-1, 1] at sample_rate; spectrum i is of samples i * hop to i * hop + window times '
  'the periodic Hann window, zeros behind them up to fft; nothing is padded at the ends of the '
  'sound. Triangle b is linear in m(hertz) = 1127 ln(1 + hertz / 700), 0 at point b, 1 at point b '
  '+ 1, 0 at point b + 2 of mel_bands + 2 points evenly spaced in m over mel_range; bin k is at k '
  '* sample_rate / fft hertz, and bin 0 does not count. example_frames spectra one after the '
  'other are an example: of a window of at most 10 frames, one a second, frame t has that which '
  'begins at sample t * example_frames * hop of the window and is example_samples long; where the '
  'sound has ended before, the last whole one again'
)
_PREPARE = (
  'frames uint8 [n h w 3] of any size, and the 16 kHz samples float32 [m] of their window, at '
  'least log_mel.example_samples of them, to the inputs of the stages, by the rules above in '
  'float32: a byte of a frame is off by 1 where it is half-way between two, log_mel by 1e-3 at most'
)


def export(
  workdir: str | Path, out: str | Path, form: str, stage1: str | Path | None = None
) -> Path:
  """Writes what `aavs predict` computes as a folder for serving; it appears when it is complete.

  Args:
    workdir: work folder of either stage, or of a model trained end to end.
    out: a new or empty folder.
    form: 'stablehlo': {stage}.stablehlo by jax.export, for any number of frames, with its numbers
      in {stage}.safetensors, and prepare.stablehlo; 'onnx': {stage}.onnx, for one frame (or the
      `unit` of a method that sees several together), in float32.
    stage1: work folder of the stage 1 that the stage 2 in `workdir` starts from.

  Returns:
    out.

  Raises:
    UserError: a model or the folder is at fault, or the library of the format is not installed.
  """
  target = files.new_folder(out)
  lacking = [name for name in _NEEDS[form] if importlib.util.find_spec(name) is None]
  if lacking:
    raise UserError(f'{form} needs {lacking[0]}: install it as "Deploying" in README.md says')
  checkpoint.refuse_other_bucket(workdir)
  binary = config_lib.from_json(epath.Path(workdir) / 'config.json').task == 'binary'
  if binary and stage1 is not None:
    raise UserError(f'{workdir} holds a model of stage 1 itself: leave --stage1 out')
  stages = load_stages(*((workdir, None) if binary else (stage1, workdir)))
  config = (stages[1] or stages[0]).config
  if config.prior.soft and stages[0] and not methods.of(stages[0].config).nonnegative_scores:
    raise UserError(
      f'{stage1 or workdir} has scores below 0, of which no soft mask is a share, and {workdir} '
      'wants soft ones (config.prior.soft): name a stage 1 of another method'
    )
  sizes = [stage.config.data.image_size for stage in stages if stage]
  if len({*sizes}) > 1:
    raise UserError(
      f'data.image_size is {sizes[0]} in {stage1} and {sizes[1]} in {workdir}, but frames are '
      'prepared once, for both: name stages of the same'
    )
  names = () if binary else class_names(workdir)
  write = {'onnx': _write_onnx, 'stablehlo': _write_stablehlo}[form]
  with files.writing_folder(target) as working:
    told = {
      name: write(working, name, stage, soft=config.prior.soft)
      | {'unit': methods.of(stage.config).unit}
      for name, stage in zip(('stage1', 'stage2'), stages)
      if stage is not None
    }
    model = {'format': form, **_description(config, told, names)}
    if form == 'stablehlo':
      model['prepare'] = {**_write_prepare(working, config.data.image_size), 'rule': _PREPARE}
    files.write_json(working / MODEL, model)
  return Path(out)


def function_of(config: ml_collections.ConfigDict, soft: bool) -> Callable[..., dict]:
  """(variables, batch) -> what a stage hands out, by name.

  Stage 1: 'mask' uint8 [n e e], which masks.of_scores makes of 'scores' float32 [n 2 e e]; stage 2:
  'classes' uint8 [n e e].
  """
  method = methods.of(config)

  def run(variables, batch):
    outputs, _ = method.apply(variables, batch)
    predictions = method.predict(outputs)
    if config.task == 'semantic':
      return {'classes': predictions}
    silence, sound = predictions[:, 0], predictions[:, 1]
    mask = jnp.where(sound > silence, 255.0, 0.0)
    if soft:
      silence, sound = jnp.maximum(silence, 1e-12), jnp.maximum(sound, 1e-12)
      level = jnp.round(255 * sound / (silence + sound))
      mask = jnp.where(mask > 0, jnp.maximum(level, 128), jnp.minimum(level, 127))
    return {'mask': mask.astype(jnp.uint8), 'scores': predictions}

  return run


def inputs_of(config: ml_collections.ConfigDict, count: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """What a stage sees of `count` frames (a number or a symbolic dimension), by name."""
  image, side = config.data.image_size, config.data.eval_size
  shapes = {
    'frames': ((count, image, image, 3), jnp.uint8),
    'log_mel': ((count, audio.EXAMPLE_FRAMES, audio.MEL_BANDS), jnp.float32),
    'prior': ((count, side, side), jnp.uint8),
  }
  return {name: jax.ShapeDtypeStruct(*shapes[name]) for name in methods.of(config).inputs}


def prepare(
  frames: UInt8[Array, 'n h w 3'], samples: Float[Array, ' m'], size: int
) -> dict[str, jax.Array]:
  """images.resize_frame and audio.log_mel_examples with fit_examples, in float32 on a device.

  Args:
    frames: of one window.
    samples: of the window, at 16 kHz, enough for one example.
    size: of the resized frames.

  Returns:
    'frames' uint8 [n size size 3] and 'log_mel' float32 [n 96 64].
  """
  resized = frames
  for axis, product in ((2, 'nhwc,ow->nhoc'), (1, 'nhwc,oh->nowc')):
    weights = _antialiased(frames.shape[axis], size)
    resized = jnp.einsum(product, resized.astype(jnp.float32), weights, precision='highest')
    # Pillow, too, rounds between its two passes.
    resized = jnp.clip(jnp.floor(resized + 0.5), 0, 255).astype(jnp.uint8)

  numbers = audio.parameters()
  window, hop, steps = (numbers[key] for key in ('window', 'hop', 'example_frames'))
  last = (samples.shape[0] - numbers['example_samples']) // (steps * hop)
  example = jnp.minimum(jnp.arange(frames.shape[0]), last)
  begin = (example[:, None] * steps + jnp.arange(steps)) * hop
  stretches = samples[begin[..., None] + jnp.arange(window)]
  spectra = jnp.abs(jnp.fft.rfft(stretches * jnp.float32(audio.WINDOW), numbers['fft']))
  mel = jnp.einsum('ntf,fb->ntb', spectra, jnp.float32(audio.MEL_FILTERS), precision='highest')
  return {'frames': resized, 'log_mel': jnp.log(mel + numbers['log_offset'])}


def _antialiased(length: Any, size: int) -> Float[Array, 'size length']:
  """Weights of Pillow's bilinear filter, which is as wide as a step where it shrinks."""
  scale = jnp.asarray(length, jnp.float32) / size
  centre = (jnp.arange(size) + 0.5)[:, None] * scale
  distance = jnp.abs(jnp.arange(length) + 0.5 - centre) / jnp.maximum(scale, 1)
  weights = jnp.maximum(0, 1 - distance)
  return weights / weights.sum(1, keepdims=True)


def _write_onnx(folder: Path, name: str, stage: Trained, soft: bool) -> dict:
  logging.getLogger('jax2onnx').setLevel(logging.ERROR)  # of each library that it knows and lacks
  from jax2onnx import to_onnx

  config, variables = stage
  config = config.copy_and_resolve_references()
  config.dtype = 'float32'  # as the numbers are: onnxruntime has few operators for bfloat16
  function = function_of(config, soft)
  inputs = inputs_of(config, methods.of(config).unit)
  outputs = jax.eval_shape(function, variables, inputs)
  numbers = jax.tree.map(np.asarray, variables)  # on the host they become tensors of the file

  def run(*values):
    return tuple(function(numbers, dict(zip(inputs, values))).values())

  # ONNX knows no platforms: of forms that differ by them, the default one is written.
  with mock.patch('jax.lax.platform_dependent', lambda *values, default, **_: default(*values)):
    model = to_onnx(
      run,
      list(inputs.values()),
      model_name=name,
      input_names=list(inputs),
      output_names=list(outputs),
    )
  path = folder / f'{name}.onnx'
  path.write_bytes(model.SerializeToString())  # all in one file, which jax2onnx's own need not be
  return {**_file(path), **_signature(inputs, outputs)}


def _write_stablehlo(folder: Path, name: str, stage: Trained, soft: bool) -> dict:
  from safetensors.numpy import save

  config, variables = stage
  function = function_of(config, soft)
  weights = {path: np.ascontiguousarray(value) for path, value in flatten(variables).items()}
  (folder / f'{name}.safetensors').write_bytes(save(weights))
  unit = methods.of(config).unit
  (count,) = jax_export.symbolic_shape('n' if unit == 1 else f'{unit}*n')
  entry = _write_exported(
    folder / f'{name}.stablehlo',
    lambda weights, batch: function(unflatten(weights), batch),
    {path: jax.ShapeDtypeStruct(value.shape, value.dtype) for path, value in weights.items()},
    inputs_of(config, count),
  )
  return {**entry, 'weights': _file(folder / f'{name}.safetensors')}


def _write_prepare(folder: Path, size: int) -> dict:
  least = audio.samples_needed(1)
  n, h, w, m = jax_export.symbolic_shape('n, h, w, m', constraints=[f'm >= {least}'])
  inputs = {
    'frames': jax.ShapeDtypeStruct((n, h, w, 3), jnp.uint8),
    'samples': jax.ShapeDtypeStruct((m,), jnp.float32),
  }
  return _write_exported(
    folder / 'prepare.stablehlo', lambda raw: prepare(raw['frames'], raw['samples'], size), inputs
  )


def _write_exported(path: Path, function: Callable[..., dict], *arguments: dict) -> dict:
  """Writes a function by jax.export; its last argument is what model.json has as inputs."""
  exported = jax_export.export(jax.jit(function), platforms=_PLATFORMS)(*arguments)
  path.write_bytes(exported.serialize())
  outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
  return {**_file(path), **_signature(arguments[-1], outputs)}


def _file(path: Path) -> dict:
  return {'file': path.name, 'sha256': hashlib.sha256(path.read_bytes()).hexdigest()}


def _signature(inputs: Mapping, outputs: Mapping) -> dict:
  """Names, types and shapes for model.json; a dimension is a number or says of what it is."""

  def rows(arrays):
    return [
      {
        'name': name,
        'dtype': str(array.dtype),
        'shape': [side if isinstance(side, int) else str(side) for side in array.shape],
      }
      for name, array in arrays.items()
    ]

  return {'inputs': rows(inputs), 'outputs': rows(outputs)}


def _description(config: ml_collections.ConfigDict, stages: dict, names) -> dict:
  kind = '255 times the probability of sound, 128 or more' if config.prior.soft else '255'
  return {
    'versions': {name: importlib.metadata.version(name) for name in ('aavs_jax', 'jax')},
    'stages': stages,
    'image_size': config.data.image_size,
    'eval_size': config.data.eval_size,
    'frames': _FRAMES,
    'log_mel': {**audio.parameters(), 'rule': _LOG_MEL},
    'mask': f'{kind} where it sounds',
    'prior': 'the input `prior` of stage2 is the output `mask` of stage1 for the same frames',
    'classes': list(names),
    'colours': [legend_colour(i) for i in range(len(names))],
    'sounding_colour': SOUNDING_COLOUR,
  }
