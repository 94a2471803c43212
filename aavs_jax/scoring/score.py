"""Scores of a model over clips, by every protocol."""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import ml_collections
import numpy as np

from aavs_jax import config as config_lib
from aavs_jax.console import Progress
from aavs_jax.devices import distributed
from aavs_jax.devices.distributed import share
from aavs_jax.input_pipeline import files, items, listening, masks
from aavs_jax.input_pipeline.clips import Clip
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.scoring import metrics, protocols
from aavs_jax.scoring.predictor import Predictor, ahead, local_variables, predict_clips
from aavs_jax.types import Variables


def score(
  config: ml_collections.ConfigDict,
  predictor: Predictor,
  variables: Variables,
  clips: Sequence[Clip],
  *,
  audio: str = 'true',
  no_prior: bool = False,
  on_clip: Callable[[Clip, np.ndarray], None] | None = None,
  title: str = 'scoring',
) -> dict:
  """Scores of a model over clips by every protocol, as `protocols.summarise` returns them.

  Of methods whose release has metrics of its own also these, as 'released'.

  One pass over the data; clips are scored in threads while the devices go on. Of several processes
  each takes its share of the clips; all of them must call this, and all return the scores of all.

  Args:
    config: the model's; its oracle_prior decides on the prior of stage 2.
    predictor: compiled predict step of the same config.
    variables: of the model, on any devices.
    clips: what to score.
    audio: what the clips hear, see listening.choose_sounds.
    no_prior: whether stage 2 has to do without one, see prior.UNKNOWN.
    on_clip: called with each clip of this process, in order, and its predicted ids
      uint8 [T, e, e].
    title: of the line that shows the progress.
  """
  task = dataclasses.replace(
    config_lib.task_of(config), no_prior=no_prior, dilated=predictor.method.dilated_truth
  )
  files.refuse_bucket(task.masks)
  if task.use_prior and not (task.masks or config.oracle_prior or no_prior):
    raise UserError(
      'config.data.masks is empty: write the masks of stage 1 with `aavs masks`, or ask for the '
      'ground truth with --oracle'
    )
  if task.use_prior and task.masks and not no_prior:
    masks.require_kind(task.masks, task.soft)
  variables = local_variables(variables)
  mine, heard = share(clips), share(listening.choose_sounds(clips, audio))
  batches = predictor.batches(
    config,
    mine,
    lambda item: items.load_eval_item(mine[item.clip], heard[item.clip], item, task),
  )
  records = np.zeros(len(mine), metrics.record_type(config.task, config.num_classes))

  def look(predictions, target, ids):
    if config.task == 'binary':
      masks.require_finite(predictions)
      record = metrics.binary_record(predictions, target, ids)
      return record, np.argmax(predictions, 1).astype(np.uint8)
    return metrics.semantic_record(predictions, target, config.num_classes), predictions

  threads = config.data.threads
  with Progress(title, len(mine), 'clips') as progress, ThreadPoolExecutor(threads) as pool:
    looks = (
      (index, pool.submit(look, predictions, extra['target'], extra['ids']))
      for index, predictions, extra in predict_clips(
        predictor, variables, progress.waiting_for(batches)
      )
    )
    for index, future in ahead(looks, threads):
      records[index], ids = future.result()
      if on_clip:
        on_clip(mine[index], ids)
      progress.advance(1)
  records = _gather(records, len(clips))
  result = protocols.summarise(clips, records, audio=audio)
  if batch := predictor.method.released_batch:
    result['released'] = protocols.as_released(clips, records, batch)
  return result


def _gather(mine: np.ndarray, total: int) -> np.ndarray:
  """The records of all items in order, from those of each process's share of them."""
  padded = np.zeros(-(-total // jax.process_count()), mine.dtype)
  padded[: len(mine)] = mine
  # As bytes, since a device would round float64 to float32.
  everyones = distributed.all_gather(padded.view(np.uint8))
  # [process, place in its share] -> as `share` dealt them out, place by place
  return np.ascontiguousarray(everyones).view(mine.dtype).T.ravel()[:total]
