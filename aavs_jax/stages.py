"""Stepping Stones: what each stage starts from, what trains in each of its two phases."""

import functools
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from aavs_jax import checkpoint
from aavs_jax import config as config_lib
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.state import matches

SWIN_ADAPTERS = (r'aavs/backbone/.*adapter/',)
# What a start may lack or have in another shape, because stages differ in it; initialised anew.
STAGE_SPECIFIC = (
  r'aavs/decoder/class_predictor/',
  r'aavs/decoder/(silent|uncertain|sounding)_key',
  r'aavs/queries/',
)

Flat = dict[str, jax.Array]


def load_start(config: ml_collections.ConfigDict) -> Flat:
  """Flat parameters of the checkpoint that config.train.init names.

  Raises:
    UserError: it cannot be read, it is the audio network alone, or it was trained with values that
      no shape shows and that give its parameters another meaning.
  """
  work_folder = _work_folder_of_start(config)
  note = checkpoint.converted(work_folder)
  if note and note['kind'] == 'vggish':
    raise UserError(
      f'{config.train.init} holds VGGish alone: hand it to `aavs convert` with --vggish and start '
      'from what that writes'
    )
  start, _ = checkpoint.load_params(config.train.init)
  other = config_lib.from_json(work_folder / 'config.json')
  for key in ('model.adapter_variant', 'model.heads', 'model.swin.heads', 'vggish.final_relu'):
    ours, theirs = (functools.reduce(getattr, key.split('.'), c) for c in (config, other))
    # Without adapters a start fits every variant of them.
    if ours != theirs and not (key == 'model.adapter_variant' and theirs == 'none'):
      raise UserError(
        f'config.{key} is {ours!r}, but {config.train.init} was trained with {theirs!r}: '
        'start from a checkpoint of the same config.model'
      )
  return start


def _work_folder_of_start(config: ml_collections.ConfigDict) -> epath.Path:
  """The work folder that config.train.init is, or that the checkpoints it names belong to."""
  start = epath.Path(config.train.init)
  folders = (start, start.parent, start.parent.parent)
  return next((folder for folder in folders if (folder / 'config.json').exists()), start)


def start_lacks(config: ml_collections.ConfigDict) -> Sequence[str]:
  """Patterns of the parameters that the start of config.train.init is known to lack.

  None but for what `aavs convert` made of a network without sound (method: initialisation).
  """
  note = checkpoint.converted(_work_folder_of_start(config)) if config.train.init else None
  return note['lacking'] if note else ()


def first_params(
  fresh: Mapping, start: Mapping | None, lacks: Sequence[str] = ()
) -> tuple[Flat, list[str]]:
  """Parameters of step 0: fresh ones, overwritten by those of a start, in the same places.

  Args:
    fresh: flat parameters as initialised from the seed.
    start: flat parameters of a checkpoint, or None.
    lacks: patterns of the parameters it may lack, beside those that are specific to a stage.

  Returns:
    Flat parameters, and the paths the start did not fill (stage specific or of `lacks`).

  Raises:
    UserError: the start lacks, has too much of, or disagrees in shape about any other parameter.
  """
  if start is None:
    return dict(fresh), []
  filled, lacking, problems = {}, [], []
  for path, value in fresh.items():
    found = start.get(path)
    if found is not None and found.shape == value.shape:
      filled[path] = _put_like(found, value)
    elif matches(path, STAGE_SPECIFIC) or (found is None and matches(path, lacks)):
      lacking.append(path)
    else:
      shape = 'missing' if found is None else f'of shape {found.shape}'
      problems.append(f'{path} is {shape}, the model has {value.shape}')
  extra = [path for path in start if path not in fresh and not matches(path, STAGE_SPECIFIC)]
  problems += [f'{path} is unknown to the model' for path in extra]
  if problems:
    raise UserError(
      f'train.init does not fit the model: {"; ".join(problems[:3])}'
      f'{f" and {len(problems) - 3} more" if len(problems) > 3 else ""}; '
      'start from a checkpoint of the same config.model'
    )
  return {**fresh, **filled}, lacking


def _put_like(value: np.ndarray, like: jax.Array) -> jax.Array:
  """The value where `like` is; every process has the whole of it and keeps its part."""
  value = np.asarray(value, like.dtype)
  return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])


def in_groups(paths: Sequence[str]) -> str:
  """What to say of hundreds of paths: modules without their layers, numbers as '*', each once."""
  modules = (re.sub(r'(/(down|up|linear))*/(kernel|bias)$', '', path) for path in paths)
  return ', '.join(dict.fromkeys(re.sub(r'\d+', '*', module) for module in modules))


def phase_at(config: ml_collections.ConfigDict, step: int, steps_per_epoch: float) -> int:
  """1 or 2: the phase in which step number `step` (from 0) is taken."""
  boundary = config.train.phase2_epoch * steps_per_epoch
  return 2 if config.train.phase2_epoch and step >= round(boundary) else 1


def trainable_paths(config: ml_collections.ConfigDict, params: Mapping, phase: int) -> list[str]:
  """Paths that train in a phase: all of train.trainable, Swin's adapters not in a first of two.

  Raises:
    UserError: a pattern matches no parameter of the model, or nothing trains in this phase.
  """
  patterns = config.train.trainable
  idle = [pattern for pattern in patterns if not any(matches(path, [pattern]) for path in params)]
  if idle:
    raise UserError(
      f'no parameter matches {idle[0]!r} of config.train.trainable: use regular expressions over '
      'paths such as aavs/queries/features'
    )
  first_of_two = phase == 1 and config.train.phase2_epoch
  waiting = SWIN_ADAPTERS if first_of_two else ()
  paths = [path for path in params if matches(path, patterns) and not matches(path, waiting)]
  if not paths:
    raise UserError(
      f'config.train.trainable is {tuple(patterns)}, all of which waits for phase 2: use '
      'config.train.phase2_epoch=0 for a single phase'
    )
  return paths


def params_of_phase(
  config: ml_collections.ConfigDict, phase: int, first: Flat, best: Flat | None
) -> Flat:
  """Parameters with which a phase begins.

  Phase 1 of two: the first ones, Swin's adapters zero. Phase 2: the best of phase 1 on validation,
  Swin's adapters as they were first initialised. With one phase: the first ones as they are.
  """
  if not config.train.phase2_epoch:
    return first
  if phase == 1:
    return {
      path: jnp.zeros_like(value) if matches(path, SWIN_ADAPTERS) else value
      for path, value in first.items()
    }
  return {
    path: first[path] if matches(path, SWIN_ADAPTERS) else value for path, value in best.items()
  }


def needed_later(config: ml_collections.ConfigDict, first: Flat) -> Flat:
  """The part of the first parameters that a later phase begins with."""
  if not config.train.phase2_epoch:
    return {}
  return {path: value for path, value in first.items() if matches(path, SWIN_ADAPTERS)}


def count(params: Mapping[str, jax.Array]) -> int:
  """Number of parameters of a flat tree."""
  return sum(int(np.prod(value.shape)) for value in params.values())
