"""What the parity tests share: the recordings of goldens/, and each evaluation once a session."""

import functools
import os
from pathlib import Path

import pytest

from aavs_jax.pytorch import maps_recordings, recordings, selftest


@functools.cache
def recording(stage: int) -> recordings.Recording:
  return recordings.recording_of(recordings.read(selftest.GOLDENS / f'stage{stage}.npz'))


@functools.cache
def begin(stage: int) -> recordings.Flat:
  """The parameters everything was recorded at."""
  return recordings.start(recording(stage))


@functools.cache
def at_start(stage: int, sampling: str) -> selftest.Evaluation:
  """The evaluation that 'out', 'loss', 'grad' and 'post' of the recording describe."""
  return selftest.at_start(recording(stage), begin(stage), sampling)


@functools.cache
def forward_errors(stage: int, sampling: str) -> selftest.Errors:
  result = at_start(stage, sampling)
  errors = selftest.prediction_errors(recording(stage), result.predictions)
  return errors | selftest.loss_errors(recording(stage), result)


@functools.cache
def taken(stage: int, phase: int) -> selftest.Steps:
  """The recorded steps of a phase, taken again."""
  return selftest.take_steps(recording(stage), begin(stage), phase)


@functools.cache
def maps_recording(name: str) -> maps_recordings.Recording:
  """One of TPAVI or AVSegFormer: whole, from where AAVS_RECORDINGS says, or the extract."""
  for folder in (os.environ.get('AAVS_RECORDINGS'), selftest.GOLDENS / 'methods'):
    if folder and (Path(folder) / f'{name}.npz').exists():
      return maps_recordings.recording_of(recordings.read(Path(folder) / f'{name}.npz'))
  pytest.skip(f'{name}.npz is in no folder that AAVS_RECORDINGS names')


@functools.cache
def maps_errors(name: str) -> dict[str, float]:
  """The largest error of each quantity."""
  errors = maps_recordings.all_errors(maps_recording(name))
  return {quantity: max(found.values()) for quantity, found in errors.items()}


MAPS_TOLERANCES = {
  'intermediates': 1e-4,
  'logits': 1e-4,
  'map': 1e-4,
  'loss': 1e-4,
  'loss terms': 1e-4,
  'gradients': 1e-3,
  'running statistics': 1e-4,
  'losses of the steps': 1e-4,
  'changes, with a gradient': 0.05,
  'changes, elements that are off': 0.005,
  'metrics of the release': 1e-6,
}


def require_maps(name: str, quantities: set[str], frozen: bool = False) -> None:
  """AssertionError unless these quantities, and no others, are within their tolerances.

  Those of the steps with the backbone frozen at first, or all the others.
  """
  errors = {q: e for q, e in maps_errors(name).items() if q.startswith('frozen: ') == frozen}
  assert errors.keys() == quantities
  wrong = {
    quantity: error
    for quantity, error in errors.items()
    if not error <= MAPS_TOLERANCES[quantity.removeprefix('frozen: ')]
  }
  assert not wrong
