"""Running a trained model over a split: scores, maps, and the masks that stage 2 starts from."""

import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np

from aavs_jax import checkpoint, metrics, steps
from aavs_jax import config as config_lib
from aavs_jax.logging import Progress
from aavs_jax.mesh import batch_sharding, global_batch, make_mesh, replicated
from aavs_jax.methods import Method, aavs
from aavs_jax.state import flatten, merge
from aavs_jax.types import Params
from input_pipeline import avsbench, masks, pipeline
from input_pipeline.avsbench import Clip
from input_pipeline.errors import UserError

AUDIO = ('true', 'other', 'silence')
_NOTE = 'source.json'  # in a folder of masks: which model wrote them
_BATCH_KEYS = ('frames', 'log_mel', 'prior')  # what the model sees; the rest stays on the host


class Predictor:
  """A compiled model: batches of frames in, numpy predictions out.

  Parameters must be on all devices (load_trained, a train state); frames are spread over them.
  """

  def __init__(self, method: Method):
    self._step = jax.jit(functools.partial(steps.predict_step, method=method))
    self._sharding = batch_sharding(make_mesh())

  def __call__(self, params: Params, batch: dict[str, np.ndarray]) -> np.ndarray:
    seen = {name: batch[name] for name in _BATCH_KEYS if name in batch}
    return np.asarray(self._step(params, global_batch(seen, self._sharding)))


def predict_clips(
  predictor: Predictor, params: Params, batches: Iterator[dict[str, np.ndarray]]
) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray]]]:
  """(clip index, predictions [T ...], the batch's other arrays [T ...]) for each whole clip.

  Batches hold the items of a clip one after the other, so a clip is complete when the next begins.
  """
  current, parts = None, []

  def finish():
    extra = {name: np.concatenate([p[1][name] for p in parts]) for name in parts[0][1]}
    return current, np.concatenate([p[0] for p in parts]), extra

  for batch in batches:
    predictions = predictor(params, batch)
    host = {name: value for name, value in batch.items() if name not in _BATCH_KEYS}
    real = np.flatnonzero(batch['weight'] > 0)
    for clip in dict.fromkeys(batch['clip'][real].tolist()):
      chosen = real[batch['clip'][real] == clip]
      if clip != current and parts:
        yield finish()
        parts = []
      current = clip
      parts.append((predictions[chosen], {n: v[chosen] for n, v in host.items()}))
  if parts:
    yield finish()


def score(
  config: ml_collections.ConfigDict,
  predictor: Predictor,
  params: Params,
  clips: Sequence[Clip],
  *,
  audio: str = 'true',
  oracle_prior: bool = False,
  on_clip: Callable[[Clip, np.ndarray], None] | None = None,
  progress: Progress | None = None,
) -> dict:
  """Metrics of a model over clips (method: section 5), as metrics.summarise_* return them.

  Args:
    config: the model's.
    predictor: compiled predict step of the same config.
    params: parameter tree.
    clips: what to score.
    audio: 'true', 'other' (each clip hears another one of its subset) or 'silence'.
    oracle_prior: ground truth as stage 2's prior instead of config.data.masks.
    on_clip: called with each clip and its predicted ids uint8 [T, e, e].
    progress: advanced by clips.
  """
  task = config_lib.task_of(config, oracle_prior)
  if task.use_prior and not task.masks and not oracle_prior:
    raise UserError(
      'config.data.masks is empty: write the masks of stage 1 with `aavs masks`, or ask for the '
      'ground truth with --oracle'
    )
  sounds = {
    'true': list(clips),
    'other': pipeline.other_sounds(clips) if audio == 'other' else None,
    'silence': [None] * len(clips),
  }[audio]
  batches = pipeline.eval_batches(
    clips,
    lambda item: pipeline.load_eval_item(clips[item.clip], sounds[item.clip], item, task),
    batch_items=eval_batch_items(config),
    threads=config.data.threads,
  )
  per_clip = {}
  for index, predictions, extra in predict_clips(predictor, params, batches):
    clip = clips[index]
    if config.task == 'binary':
      per_clip[clip.subset, clip.uid] = metrics.binary_clip_metrics(
        predictions, extra['target'].astype(bool)
      )
      ids = np.argmax(predictions, 1).astype(np.uint8)
    else:
      ids = predictions
      per_clip[clip.subset, clip.uid] = metrics.semantic_frame_sums(
        ids, extra['target'], config.num_classes
      )
    if on_clip:
      on_clip(clip, ids)
    if progress:
      progress.advance(1)
  summarise = metrics.summarise_binary if config.task == 'binary' else metrics.summarise_semantic
  return summarise(per_clip)


def load_trained(workdir: str | Path) -> tuple[ml_collections.ConfigDict, Params, int]:
  """Config, parameters (a copy on every device) and step of a work folder's best checkpoint.

  Raises:
    UserError: the folder holds no model, or a checkpoint that does not fit its config.json.
  """
  config = config_lib.from_json(Path(workdir) / 'config.json')
  flat, step = checkpoint.load_params(workdir)
  abstract = flatten(jax.eval_shape(aavs(config).init, jax.random.key(0)))
  wrong = [p for p, leaf in abstract.items() if p not in flat or flat[p].shape != leaf.shape]
  wrong += [p for p in flat if p not in abstract]
  if wrong:
    raise UserError(
      f'the checkpoint of {workdir} does not fit its config.json ({len(wrong)} parameters, first '
      f'{wrong[0]}): restore the config it was trained with'
    )
  return config, jax.device_put(merge(flat, {}), replicated(make_mesh())), step


def eval_batch_items(config: ml_collections.ConfigDict) -> int:
  """Items of an evaluation batch: as in training, rounded up so that devices share the frames."""
  devices, frames = jax.device_count(), pipeline.EVAL_ITEM_FRAMES
  step = devices // math.gcd(devices, frames)
  return -(-config.data.batch_items // step) * step


def evaluate(
  workdir: str | Path,
  *,
  data: str,
  out: str | Path,
  split: str = 'test',
  audio: str = 'true',
  oracle: bool = False,
  mask_folder: str = '',
  maps: str | Path | None = None,
) -> dict:
  """Scores the best checkpoint of a work folder and writes the result as JSON.

  Args:
    workdir: folder of `aavs train`.
    data: the data set.
    out: JSON file to write.
    split: train, val or test.
    audio: see score.
    oracle: ground truth as the prior of stage 2.
    mask_folder: stage 1's masks, if not those of the config.
    maps: folder for the predicted class ids as PNG, MAPS/SUBSET/UID/T.png.

  Returns:
    What was written.

  Raises:
    UserError: a prior for a model without one, or two of them; a data set as `maps`; faults of
      model, masks or data.
  """
  if oracle and mask_folder:
    raise UserError(f'--oracle and --masks {mask_folder} are two priors: give one of them')
  if maps is not None:
    masks.refuse_data_set(maps)
  config, params, step = load_trained(workdir)
  if (oracle or mask_folder) and not config.use_prior:
    given = '--oracle' if oracle else f'--masks {mask_folder}'
    raise UserError(f'{given} is given, but the model of {workdir} takes no prior: leave it out')
  if mask_folder:
    config.data.masks = str(mask_folder)
  clips = avsbench.read_index(data, split, config.data.subsets)
  on_clip = None
  if maps is not None:

    def on_clip(clip, ids):
      masks.write_clip_masks(str(maps), clip, ids)

  name = 'stage 2' if config.use_prior else 'stage 1' if config.task == 'binary' else 'end to end'
  prior = None if not config.use_prior else 'oracle' if oracle else 'stage1'
  what = f'{name} on {split}, {audio} audio' + (f', {prior} prior' if prior else '')
  with Progress(what, len(clips), 'clips') as progress:
    summary = score(
      config,
      Predictor(aavs(config)),
      params,
      clips,
      audio=audio,
      oracle_prior=oracle,
      on_clip=on_clip,
      progress=progress,
    )
  result = {
    'name': name,
    'task': config.task,
    'split': split,
    'audio': audio,
    'prior': prior,
    'checkpoint_step': step,
    'checkpoint_digest': digest(params),
    'masks_digest': masks_digest(config.data.masks) if prior == 'stage1' else None,
    'clips': len(clips),
    'frames': sum(len(clip.labelled_frames) for clip in clips),
    **summary,
  }
  write_json(out, result)
  return result


def write_masks(
  workdir: str | Path, *, data: str, out: str | Path, splits: Sequence[str] = ('val', 'test')
) -> int:
  """The hand-over: stage 1's masks of every clip of the splits, OUT/{v1s,v1m,v2}/UID/{0..}.png.

  Clips whose masks are there and sound already are left alone, so a killed run goes on where it
  was; masks of another checkpoint are not mixed in: the folder remembers which one wrote it.

  Returns:
    Number of clips written now.

  Raises:
    UserError: the model is not of stage 1; `out` is a data set, holds masks of another model or
      something else in their place; faults of model or data.
  """
  masks.refuse_data_set(out)
  config, params, step = load_trained(workdir)
  if config.task != 'binary':
    raise UserError(f'{workdir} holds a model of the semantic task: masks come from a stage-1 one')
  clips = [
    clip for split in splits for clip in avsbench.read_index(data, split, config.data.subsets)
  ]
  _claim_masks(Path(out), {'checkpoint': str(workdir), 'step': step, 'digest': digest(params)})
  size = config.data.eval_size
  todo = [clip for clip in clips if not masks.is_complete(str(out), clip, size)]
  if not todo:
    return 0
  task = config_lib.task_of(config)
  batches = pipeline.eval_batches(
    todo,
    lambda item: pipeline.load_unlabelled_item(todo[item.clip], item, task),
    batch_items=eval_batch_items(config),
    threads=config.data.threads,
  )
  predictor = Predictor(aavs(config))
  with Progress('masks of stage 1', len(todo), 'clips') as progress:
    for index, scores, _ in predict_clips(predictor, params, batches):
      binary = (np.argmax(scores, 1) * 255).astype(np.uint8)
      masks.write_clip_masks(str(out), todo[index], binary)
      progress.advance(1)
  return len(todo)


def digest(params: Params) -> str:
  """What tells the parameters of two models apart, however similar their folders are."""
  total = hashlib.sha256()
  for value in jax.tree.leaves(params):
    total.update(np.asarray(value).tobytes())
  return total.hexdigest()[:16]


def masks_digest(folder: str | Path) -> str | None:
  """Digest of the model whose masks a folder holds; None if `write_masks` did not write them."""
  note = Path(folder) / _NOTE
  return checkpoint.read_json(note).get('digest') if note.exists() else None


def _claim_masks(folder: Path, source: dict) -> None:
  """Notes in the folder which checkpoint its masks come from; UserError if it is another one's."""
  note = folder / _NOTE
  if note.exists():
    found = checkpoint.read_json(note)
    if found.get('digest') != source['digest']:
      raise UserError(
        f'{folder} holds masks of another model ({found.get("checkpoint")}, step '
        f'{found.get("step")}): remove it or name another folder'
      )
    return
  for subset in avsbench.FRAMES:
    if (folder / subset).exists():
      raise UserError(
        f'{folder} holds {subset} but no {_NOTE}, so it is unknown which model wrote it: remove it '
        'or name another folder'
      )
  write_json(note, source)


def write_json(path: str | Path, value) -> None:
  """Writes JSON under its final name only when it is complete."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, working = tempfile.mkstemp(dir=path.parent, prefix='.writing-')
  try:
    with os.fdopen(handle, 'w') as file:
      json.dump(value, file, indent=1)
    os.chmod(working, 0o644)
    os.replace(working, path)
  except BaseException:
    Path(working).unlink(missing_ok=True)
    raise
