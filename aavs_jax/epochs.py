"""How long a training is: epochs over items, in steps."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import ml_collections

from aavs_jax.input_pipeline import pipeline
from aavs_jax.input_pipeline.clips import Clip
from aavs_jax.input_pipeline.errors import UserError


class Length(NamedTuple):
  """Of a training, in steps."""

  steps_per_epoch: float
  total: int
  eval_every: int
  boundary: int  # steps of phase 1, 0 if it is the only one

  def validates(self, step: int) -> bool:
    """Whether a validation follows a step, counted from 1."""
    return step % self.eval_every == 0 or step in (self.total, self.boundary)

  def validations(self, step: int) -> int:
    """How many are left after a step, its own included."""
    return -(-(self.total - step) // self.eval_every) + (step % self.eval_every == 0)


def length_of(config: ml_collections.ConfigDict, clips: Sequence[Clip]) -> Length:
  """Length of the training on clips; UserError if phases or batch do not fit."""
  train = config.train
  steps_per_epoch, frames = pipeline.epoch_size(
    clips, config.data.item_frames, config.data.batch_items
  )
  total = max(1, round(train.epochs * steps_per_epoch))
  boundary = round(train.phase2_epoch * steps_per_epoch)
  if train.phase2_epoch and not 0 < boundary <= total:
    raise UserError(
      f'config.train.phase2_epoch is {train.phase2_epoch}, step {boundary} of {total}: let '
      'phase 2 begin after the first step, at the very end if never, or use 0 for a single phase'
    )
  if frames % (jax.device_count() * train.accumulate):
    raise UserError(
      f'config.data.batch_items is {config.data.batch_items}, {frames} frames a step, which '
      f'{jax.device_count()} devices cannot share evenly in {train.accumulate} parts: use a '
      'multiple of devices times config.train.accumulate'
    )
  eval_every = max(1, round(train.eval_every_epochs * steps_per_epoch))
  return Length(steps_per_epoch, total, eval_every, boundary)
