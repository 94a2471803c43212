"""Orbax checkpoints: the newest K and the best one, in one folder, written in the background."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from aavs_jax.devices import distributed
from aavs_jax.input_pipeline import files
from aavs_jax.input_pipeline.errors import PASSING_CODES, UserError, is_refused, may_pass
from aavs_jax.training.state import TrainState

CONVERTED = 'converted.json'  # in a folder of `aavs convert`
_CONVERTED = {
  'kind': str, 'source': str, 'vggish': str, 'lacking': [str], 'names': [str], 'unused': [str],
}  # fmt: skip
# Seconds from a save on until all processes have ended theirs. If the disk of one is full, the
# others wait for so long, deaf to signals, before they end with an error.
_SAVED_WITHIN = 300
_REMOVE = 'remove it to go on from the one before, or train again'


@contextlib.contextmanager
def _readable(path: str | Path, advice: str):
  """Turns what Orbax and TensorStore raise on damaged files into one sentence.

  Not what disks and networks raise when they fail: then the files may be as good as ever.
  """
  try:
    yield
  except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
    of_disk = isinstance(error, OSError) and (may_pass(error) or is_refused(error))
    if isinstance(error, UserError) or of_disk or str(error).startswith('PERMISSION_DENIED'):
      raise
    text = f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
    if isinstance(error, ValueError) and str(error).startswith(PASSING_CODES):
      raise OSError(f'{path} cannot be reached now ({text}): try again') from error
    raise UserError(f'the checkpoint {path} cannot be read ({text}): {advice}') from error


class _Manager(ocp.CheckpointManager):
  def reached_preemption(self, step: int) -> bool:
    """No: the training loop asks JAX, and steps must not be asked about in another order."""
    return False


def refuse_other_bucket(folder: str | Path) -> None:
  """Raises UserError for s3:// and the like: of all buckets Orbax knows Google's alone.

  To be asked before epath looks there, or makes a local path of it.
  """
  if '://' in str(folder) and not str(folder).startswith('gs://'):
    raise UserError(
      f'{folder} cannot hold checkpoints, which can be in gs:// and on disks alone: name a folder '
      'there'
    )


def make_manager(folder: str | Path, keep: int) -> ocp.CheckpointManager:
  """Manager that keeps the newest `keep` checkpoints and the one of best validation mIoU."""
  policy = preservation_policy.AnyPreservationPolicy(
    [
      preservation_policy.LatestN(keep),
      preservation_policy.BestN(get_metric_fn=_miou, n=1, keep_checkpoints_without_metrics=False),
    ]
  )
  options = ocp.CheckpointManagerOptions(
    preservation_policy=policy,
    best_fn=_miou,
    cleanup_tmp_directories=True,
    async_options=ocp.AsyncOptions(timeout_secs=_SAVED_WITHIN),
  )
  # Orbax has all processes meet by a collective, which is not patient.
  distributed.wait_for_all('checkpoints')
  with _readable(folder, 'look at what it holds'):
    return _Manager(absolute(epath.Path(folder)), options=options)


def _miou(metrics: dict[str, float]) -> float:
  return metrics['miou']


def save(
  manager: ocp.CheckpointManager, state: TrainState, phase: int, metrics: dict[str, float] | None
) -> None:
  """Saves a state under its step; returns as soon as the arrays are copied."""
  manager.save(
    int(state.step),
    args=ocp.args.Composite(
      state=ocp.args.StandardSave(_stored(state)), meta=ocp.args.JsonSave({'phase': phase})
    ),
    metrics=metrics,
    force=True,
  )


def add_metrics(manager: ocp.CheckpointManager, step: int, metrics: dict[str, float]) -> None:
  """Gives the checkpoint of a step the metrics that it was saved without; all of them or none."""
  with ocp.Checkpointer(ocp.JsonCheckpointHandler(filename='metrics')) as writer:
    path = manager.directory / str(step) / 'metrics'
    writer.save(path, args=ocp.args.JsonSave(metrics), force=True)
  manager.reload()


def saved_phase(manager: ocp.CheckpointManager, step: int) -> int:
  """Which phase the checkpoint of a step belongs to; it decides what the state looks like."""
  args = ocp.args.Composite(meta=ocp.args.JsonRestore())
  with _readable(manager.directory / str(step), _REMOVE):
    return manager.restore(step, args=args)['meta']['phase']


def restore(manager: ocp.CheckpointManager, step: int, abstract: TrainState) -> TrainState:
  """State of a step, with the shapes and shardings of `abstract`, whatever mesh saved it."""
  args = ocp.args.Composite(state=ocp.args.StandardRestore(_stored(abstract)))
  with _readable(manager.directory / str(step), _REMOVE):
    return TrainState(**manager.restore(step, args=args)['state'])


def _stored(state: TrainState) -> dict[str, Any]:
  """The fields of a state, its statistics where it has any: what older checkpoints hold too."""
  fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  return {name: value for name, value in fields.items() if name != 'statistics' or value}


def latest_step(folder: epath.Path) -> int | None:
  """Step of the newest checkpoint; unlike a manager that saves, this touches nothing there.

  Each process looks by itself: one may see another folder, which is found out only afterwards.
  """
  if not files.is_there(folder):  # is_dir would say so too of one that cannot be looked at now
    return None
  options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=_alone())
  with (
    _readable(folder, 'look at what it holds'),
    ocp.CheckpointManager(absolute(folder), options=options) as manager,
  ):
    return manager.latest_step()


def best(manager: ocp.CheckpointManager) -> tuple[int | None, dict[str, float] | None]:
  """The step of best validation mIoU, the later one of equals, and its metrics.

  None and None before the first validation. As the first process finds them, and all processes must
  call this: the others may have listed a folder of a bucket before that one wrote metrics there.
  """
  step = manager.best_step()
  step, metrics = distributed.gather([step, None if step is None else manager.metrics(step)])[0]
  return step, metrics


def load_flat(source: str | Path) -> tuple[dict[str, np.ndarray], int]:
  """All numbers, {path: float32 array}, of the best checkpoint of a work folder, and its step.

  Args:
    source: a work folder of `aavs train`, its checkpoints folder, or the one checkpoint to read.

  Raises:
    UserError: there is no checkpoint, or it cannot be read.
  """
  folder, step = epath.Path(source), None
  if files.is_there(folder / 'checkpoints'):
    folder = folder / 'checkpoints'
  elif folder.name.isdigit() and files.is_there(folder / 'state'):
    folder, step = folder.parent, int(folder.name)
  if not folder.is_dir():
    raise UserError(f'{source} holds no checkpoint: name a folder that `aavs train` has written')
  options = ocp.CheckpointManagerOptions(
    read_only=True, best_fn=_miou, multiprocessing_options=_alone()
  )
  with (
    _readable(folder, 'look at what it holds, or train again'),
    ocp.CheckpointManager(absolute(folder), options=options) as manager,
  ):
    step = manager.best_step() if step is None else step
    step = manager.latest_step() if step is None else step
    if step is None:
      raise UserError(f'{folder} holds no finished checkpoint: train first, or name another folder')
    # Read as plain numpy, without the optimiser: the reader's mesh need not be the writer's.
    kinds = ('trained', 'frozen', 'statistics')
    with _readable(folder / str(step), _REMOVE):
      loaded = read_arrays(absolute(folder) / str(step) / 'state', kinds)
  flat = {path: value for kind in loaded.values() for path, value in kind.items()}
  # Frozen ones may be stored in bfloat16.
  return {path: value.astype(np.float32, copy=False) for path, value in flat.items()}, step


def converted(folder: str | Path) -> dict[str, Any] | None:
  """What was noted about a folder of numbers that no training made; None for any other folder.

  Keys: 'kind', one of convert.KINDS or 'hearing', see hearing.hear; 'source' and 'vggish', names of
  the files; 'lacking', patterns of the parameters that a start for training lacks; 'names', the
  source's tensors in their order; 'unused', those of them that have no part in the model.
  """
  refuse_other_bucket(folder)
  path = epath.Path(folder) / CONVERTED
  if not files.is_there(path):
    return None
  return files.read_json(path, _CONVERTED, 'restore it or convert again')


def absolute(folder: epath.Path) -> epath.Path:
  """As Orbax wants a folder. Of one in a bucket, etils would make a folder of the disk."""
  return folder if '://' in str(folder) else folder.absolute()


def _alone() -> ocp.options.MultiprocessingOptions:
  """That this process reads without the others, which Orbax would have meet by a collective."""
  index = jax.process_index()
  return ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})


def read_arrays(path: str | Path, names: Sequence[str] = ()) -> dict[str, Any]:
  """Numpy arrays of the state saved at a path, or of some of its fields."""
  handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
  with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as reader:
    found = reader.metadata(path).item_metadata
    if found is None:  # Orbax keeps to itself why
      raise ValueError(f'{len((epath.Path(path) / "_METADATA").read_bytes())} bytes of _METADATA')
    tree = found.tree
    keep = {name: tree[name] for name in names or tree if tree.get(name)}
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), keep)
    args = ocp.args.PyTreeRestore(item=keep, restore_args=restore_args, partial_restore=True)
    return reader.restore(path, args=args)
