"""Stepping Stones: what each stage starts from, what trains in each of its two phases."""

import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from aavs_jax import checkpoint
from aavs_jax import config as config_lib
from aavs_jax.state import flatten, matches
from input_pipeline.errors import UserError

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
    UserError: it cannot be read, or it was trained with values that no shape shows and that give
      its parameters another meaning.
  """
  start, _ = checkpoint.load_params(config.train.init)
  other = config_lib.from_json(Path(config.train.init) / 'config.json')
  for key in ('model.adapter_variant', 'model.heads', 'model.swin.heads', 'vggish.final_relu'):
    ours, theirs = (functools.reduce(getattr, key.split('.'), c) for c in (config, other))
    if ours != theirs:
      raise UserError(
        f'config.{key} is {ours!r}, but {config.train.init} was trained with {theirs!r}: '
        'start from a checkpoint of the same config.model'
      )
  return start


def first_params(fresh: Mapping, start: Mapping | None) -> tuple[Flat, list[str]]:
  """Parameters of step 0: fresh ones, overwritten by those of a start.

  Args:
    fresh: parameter tree as initialised from the seed.
    start: flat parameters of a checkpoint, or None.

  Returns:
    Flat parameters, and the paths the start did not fill (all of them stage specific).

  Raises:
    UserError: the start lacks, has too much of, or disagrees in shape about any other parameter.
  """
  params = flatten(fresh)
  if start is None:
    return params, []
  filled, lacking, problems = {}, [], []
  for path, value in params.items():
    found = start.get(path)
    if found is not None and found.shape == value.shape:
      filled[path] = jnp.asarray(found, value.dtype)
    elif matches(path, STAGE_SPECIFIC):
      lacking.append(path)
    else:
      shape = 'missing' if found is None else f'of shape {found.shape}'
      problems.append(f'{path} is {shape}, the model has {value.shape}')
  extra = [path for path in start if path not in params and not matches(path, STAGE_SPECIFIC)]
  problems += [f'{path} is unknown to the model' for path in extra]
  if problems:
    raise UserError(
      f'train.init does not fit the model: {"; ".join(problems[:3])}'
      f'{f" and {len(problems) - 3} more" if len(problems) > 3 else ""}; '
      'start from a checkpoint of the same config.model'
    )
  return {**params, **filled}, lacking


def phase_at(config: ml_collections.ConfigDict, step: int, steps_per_epoch: float) -> int:
  """1 or 2: the phase in which step number `step` (from 0) is taken."""
  boundary = config.train.phase2_epoch * steps_per_epoch
  return 2 if config.train.phase2_epoch and step >= round(boundary) else 1


def trainable_paths(config: ml_collections.ConfigDict, params: Mapping, phase: int) -> list[str]:
  """Paths that train in a phase: all of train.trainable, Swin's adapters not in a first of two."""
  first_of_two = phase == 1 and config.train.phase2_epoch
  paths = [
    path
    for path in params
    if matches(path, config.train.trainable) and not (first_of_two and matches(path, SWIN_ADAPTERS))
  ]
  if not paths:
    raise UserError(
      f'no parameter matches train.trainable={tuple(config.train.trainable)}: '
      'use regular expressions over paths such as aavs/queries/features'
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


def count(params: Mapping[str, jax.Array]) -> int:
  """Number of parameters of a flat tree."""
  return sum(int(np.prod(value.shape)) for value in params.values())
