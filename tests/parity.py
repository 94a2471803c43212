"""What the parity tests share: the recordings of goldens/, and each evaluation once a session."""

import functools

from aavs_jax.pytorch import recordings, selftest


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
