"""Running a trained model over a split: scores, maps, and the masks that stage 2 starts from."""

import collections
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import jax
import ml_collections
import numpy as np
from etils import epath

from aavs_jax import checkpoint, distributed, metrics, protocols, steps, tables
from aavs_jax import config as config_lib
from aavs_jax.input_pipeline import avsbench, files, items, masks, pipeline, sounds
from aavs_jax.input_pipeline.clips import Clip
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.logging import Progress
from aavs_jax.mesh import batch_sharding, local_mesh, replicated
from aavs_jax.methods import Method, aavs
from aavs_jax.state import flatten, merge
from aavs_jax.types import Params

_NOTE = 'source.json'  # in a folder of masks: which model wrote them
CLASSES = 'classes.json'  # in a work folder: names of the classes of the data set
_BATCH_KEYS = ('frames', 'log_mel', 'prior')  # what the model sees; the rest stays on the host
_T = TypeVar('_T')

# Batches that the devices have before them while the host takes the result of an earlier one.
_AHEAD = 2


class Predictor:
  """A compiled model: batches of frames in, predictions out, on the device and not waited for.

  Frames are spread over the devices of this process, on all of which the parameters must be
  (`local_params`): processes do not wait for each other.
  """

  def __init__(self, method: Method):
    self._step = jax.jit(functools.partial(steps.predict_step, method=method))
    self._mesh = local_mesh()

  def __call__(self, params: Params, batch: dict[str, np.ndarray]) -> jax.Array:
    seen = {name: batch[name] for name in _BATCH_KEYS if name in batch}
    seen = jax.device_put(seen, batch_sharding(self._mesh))
    with jax.set_mesh(self._mesh):
      predictions = self._step(params, seen)
    predictions.copy_to_host_async()
    return predictions


def _ahead(items: Iterable[_T], count: int) -> Iterator[_T]:
  """The same items in order; the `count` after each one have been made when it is handed out."""
  made = collections.deque()
  for item in items:
    made.append(item)
    if len(made) > count:
      yield made.popleft()
  yield from made


def predict_clips(
  predictor: Predictor, params: Params, batches: Iterator[dict[str, np.ndarray]]
) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray]]]:
  """(clip index, predictions [T ...], the batch's other arrays [T ...]) for each whole clip.

  Batches hold the items of a clip one after the other, so a clip is complete when the next begins.
  The devices are at the next batches meanwhile.
  """
  current, parts = None, []

  def finish():
    extra = {name: np.concatenate([p[1][name] for p in parts]) for name in parts[0][1]}
    return current, np.concatenate([p[0] for p in parts]), extra

  dispatched = ((predictor(params, batch), batch) for batch in batches)
  for predictions, batch in _ahead(dispatched, _AHEAD):
    predictions = np.asarray(predictions)
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


def share(items: Sequence[_T]) -> Sequence[_T]:
  """Those that this process takes care of."""
  return items[jax.process_index() :: jax.process_count()]


def local_params(params: Params) -> Params:
  """A copy of the parameters on every device of this process, wherever they are.

  Where they are spread over processes, all of these must call it.
  """

  def is_spread(leaf):
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable

  def own(leaf):
    return leaf.addressable_data(0) if is_spread(leaf) and leaf.is_fully_replicated else leaf

  leaves, tree = jax.tree.flatten(jax.tree.map(own, params))
  spread = [i for i, leaf in enumerate(leaves) if is_spread(leaf)]
  if spread:
    gathered = distributed.all_gather([leaves[i] for i in spread], tiled=True)
    for i, leaf in zip(spread, gathered):
      leaves[i] = leaf
  return jax.device_put(tree.unflatten(leaves), replicated(local_mesh()))


def score(
  config: ml_collections.ConfigDict,
  predictor: Predictor,
  params: Params,
  clips: Sequence[Clip],
  *,
  audio: str = 'true',
  on_clip: Callable[[Clip, np.ndarray], None] | None = None,
  title: str = 'scoring',
) -> dict:
  """Scores of a model over clips by every protocol, as `protocols.summarise` returns them.

  One pass over the data; clips are scored in threads while the devices go on. Of several processes
  each takes its share of the clips; all of them must call this, and all return the scores of all.

  Args:
    config: the model's; its oracle_prior decides on the prior of stage 2.
    predictor: compiled predict step of the same config.
    params: parameter tree, on any devices.
    clips: what to score.
    audio: what the clips hear, see sounds.choose_sounds.
    on_clip: called with each clip of this process, in order, and its predicted ids
      uint8 [T, e, e].
    title: of the line that shows the progress.
  """
  task = config_lib.task_of(config)
  masks.refuse_bucket(task.masks)
  if task.use_prior and not (task.masks or config.oracle_prior):
    raise UserError(
      'config.data.masks is empty: write the masks of stage 1 with `aavs masks`, or ask for the '
      'ground truth with --oracle'
    )
  params = local_params(params)
  mine, heard = share(clips), share(sounds.choose_sounds(clips, audio))
  batches = pipeline.eval_batches(
    mine,
    lambda item: items.load_eval_item(mine[item.clip], heard[item.clip], item, task),
    batch_items=eval_batch_items(config, jax.local_device_count(), jax.process_count()),
    threads=config.data.threads,
  )
  records = np.zeros(len(mine), metrics.record_type(config.task, config.num_classes))

  def look(predictions, target):
    if config.task == 'binary':
      record = metrics.binary_record(predictions, target.astype(bool))
      return record, np.argmax(predictions, 1).astype(np.uint8)
    return metrics.semantic_record(predictions, target, config.num_classes), predictions

  threads = config.data.threads
  with Progress(title, len(mine), 'clips') as progress, ThreadPoolExecutor(threads) as pool:
    looks = (
      (index, pool.submit(look, predictions, extra['target']))
      for index, predictions, extra in predict_clips(predictor, params, batches)
    )
    for index, future in _ahead(looks, threads):
      records[index], ids = future.result()
      if on_clip:
        on_clip(mine[index], ids)
      progress.advance(1)
  return protocols.summarise(clips, _gather(records, len(clips)), audio=audio)


def _gather(mine: np.ndarray, total: int) -> np.ndarray:
  """The records of all items in order, from those of each process's share of them."""
  padded = np.zeros(-(-total // jax.process_count()), mine.dtype)
  padded[: len(mine)] = mine
  # As bytes, since a device would round float64 to float32.
  everyones = distributed.all_gather(padded.view(np.uint8))
  # [process, place in its share] -> as `share` dealt them out, place by place
  return np.ascontiguousarray(everyones).view(mine.dtype).T.ravel()[:total]


def load_trained(workdir: str | Path) -> tuple[ml_collections.ConfigDict, Params, int]:
  """Config, parameters (see local_params) and step of a work folder's best checkpoint.

  Raises:
    UserError: the folder holds no model, but a start for training or a checkpoint that does not
      fit its config.json.
  """
  note = checkpoint.converted(workdir)
  if note and note['lacking']:
    alone = note['kind'] == 'vggish'
    raise UserError(
      f'{workdir} holds no audio-visual model but what `aavs convert` made of {note["source"]}: '
      f'{"give it to that as --vggish" if alone else "train from it, with --config.train.init"}'
    )
  config = config_lib.from_json(epath.Path(workdir) / 'config.json')
  flat, step = checkpoint.load_params(workdir)
  abstract = flatten(jax.eval_shape(aavs(config).init, jax.random.key(0)))
  wrong = [p for p, leaf in abstract.items() if p not in flat or flat[p].shape != leaf.shape]
  wrong += [p for p in flat if p not in abstract]
  if wrong:
    raise UserError(
      f'the checkpoint of {workdir} does not fit its config.json ({len(wrong)} parameters, first '
      f'{wrong[0]}): restore the config it was trained with'
    )
  return config, local_params(merge(flat, {})), step


def class_names(workdir: str | Path) -> Sequence[str]:
  """Names of a model's classes by id; those of AVSBench for a model that was converted."""
  path = epath.Path(workdir) / CLASSES
  advice = 'restore it, or train again'
  return files.read_json(path, [str], advice) if path.exists() else avsbench.CLASSES


def eval_batch_items(config: ml_collections.ConfigDict, devices: int, processes: int) -> int:
  """Items of an evaluation batch of one process: as many frames as training has there.

  Rounded up so that its `devices` share them evenly.
  """
  length = pipeline.EVAL_ITEM_FRAMES
  frames = config.data.batch_items * (config.data.item_frames or length)
  step = devices // math.gcd(devices, length)
  return -(-frames // (processes * length * step)) * step


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
  subsets: Sequence[str] | None = None,
) -> dict:
  """Scores the best checkpoint of a work folder; writes the result as JSON and as Markdown.

  Of several processes, all of which must call this, the first writes the result, and each the maps
  of the clips that it scored.

  Args:
    workdir: folder of `aavs train`.
    data: the data set.
    out: JSON file to write; beside it the tables of it, under the same name with the suffix .md.
    split: train, val or test.
    audio: what the model hears, see sounds.choose_sounds.
    oracle: ground truth as the prior of stage 2, as with config.oracle_prior.
    mask_folder: stage 1's masks, if not those of the config.
    maps: folder for the predicted class ids as PNG, MAPS/SUBSET/UID/T.png.
    subsets: which to score, if not those of the config.

  Returns:
    What was written.

  Raises:
    UserError: a prior for a model without one, or two of them; a data set as `maps`; `out` with the
      suffix .md; an unknown audio or subset; faults of model, masks or data.
  """
  tables_file = epath.Path(out).with_suffix('.md')
  if tables_file == epath.Path(out):
    raise UserError(f'--out {out} is where the tables go, beside the JSON: name it .json')
  if oracle and mask_folder:
    raise UserError(f'--oracle and --masks {mask_folder} are two priors: give one of them')
  if maps is not None:
    masks.refuse_data_set(maps)
  config, params, step = load_trained(workdir)
  if (oracle or mask_folder) and not config.use_prior:
    given = '--oracle' if oracle else f'--masks {mask_folder}'
    raise UserError(f'{given} is given, but the model of {workdir} takes no prior: leave it out')
  config.oracle_prior = oracle or (config.oracle_prior and not mask_folder)
  if mask_folder:
    config.data.masks = str(mask_folder)
  clips = read_index(data, split, subsets or config.data.subsets)
  config_lib.require_fit(clips, config)
  on_clip = None
  if maps is not None:

    def on_clip(clip, ids):
      masks.write_clip_masks(str(maps), clip, ids)

  name = 'stage 2' if config.use_prior else 'stage 1' if config.task == 'binary' else 'end to end'
  prior = None if not config.use_prior else 'oracle' if config.oracle_prior else 'stage1'
  title = f'{name} on {split}, {audio} audio' + (f', {prior} prior' if prior else '')
  predictor = Predictor(aavs(config))
  summary = score(config, predictor, params, clips, audio=audio, on_clip=on_clip, title=title)
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
  if distributed.is_first():
    files.write_json(out, result)
    files.write_text(tables_file, tables.format_evaluation(result, markdown=True))
  return result


def write_masks(
  workdir: str | Path, *, data: str, out: str | Path, splits: Sequence[str] = ('val', 'test')
) -> int:
  """The hand-over: stage 1's masks of every clip of the splits, OUT/SUBSET/UID/{0..}.png.

  Clips whose masks are there and sound already are left alone, so a killed run goes on where it
  was; masks of another checkpoint are not mixed in: the folder remembers which one wrote it. Of
  several processes, all of which must call this, each writes its share of the clips.

  Returns:
    Number of clips written now, by all processes.

  Raises:
    UserError: the model is not of stage 1; `out` is a data set, holds masks of another model or
      something else in their place; faults of model or data.
  """
  masks.refuse_data_set(out)
  config, params, step = load_trained(workdir)
  if config.task != 'binary':
    raise UserError(f'{workdir} holds a model of the semantic task: masks come from a stage-1 one')
  clips = [clip for split in splits for clip in read_index(data, split, config.data.subsets)]
  config_lib.require_fit(clips, config)
  source = {'checkpoint': str(workdir), 'step': step, 'digest': digest(params)}
  _claim_masks(Path(out), source, clips[0].data_set.subsets)
  size = config.data.eval_size
  todo = [clip for clip in share(clips) if not masks.is_complete(str(out), clip, size)]
  task = config_lib.task_of(config)
  batches = pipeline.eval_batches(
    todo,
    lambda item: items.load_unlabelled_item(todo[item.clip], item, task),
    batch_items=eval_batch_items(config, jax.local_device_count(), jax.process_count()),
    threads=config.data.threads,
  )
  predictor = Predictor(aavs(config))

  def write(clip, scores):
    masks.write_clip_masks(str(out), clip, (np.argmax(scores, 1) * 255).astype(np.uint8))

  threads = config.data.threads
  with (
    Progress('masks of stage 1', len(todo), 'clips') as progress,
    ThreadPoolExecutor(threads) as pool,
  ):
    writes = (
      pool.submit(write, todo[index], scores)
      for index, scores, _ in predict_clips(predictor, params, batches)
    )
    for future in _ahead(writes, threads):
      future.result()
      progress.advance(1)
  # Not before all masks are there: what comes next may read those of any process.
  return sum(distributed.gather(len(todo)))


def digest(params: Params) -> str:
  """What tells the parameters of two models apart, however similar their folders are."""
  total = hashlib.sha256()
  for value in jax.tree.leaves(params):
    total.update(np.asarray(value).tobytes())
  return total.hexdigest()[:16]


def masks_digest(folder: str | Path) -> str | None:
  """Digest of the model whose masks a folder holds; None if `write_masks` did not write them."""
  note = Path(folder) / _NOTE
  return _read_note(note)['digest'] if note.exists() else None


def _read_note(path: Path) -> dict:
  shape = {'checkpoint': str, 'step': int, 'digest': str}
  return files.read_json(path, shape, 'restore it, or write the masks anew in another folder')


def _claim_masks(folder: Path, source: dict, subsets: Iterable[str]) -> None:
  """Notes in the folder which checkpoint its masks come from; UserError if it is another one's."""
  note = folder / _NOTE
  if note.exists():
    found = _read_note(note)
    if found['digest'] != source['digest']:
      raise UserError(
        f'{folder} holds masks of another model ({found["checkpoint"]}, step {found["step"]}): '
        'remove it or name another folder'
      )
    return
  for subset in subsets:
    if (folder / subset).exists():
      raise UserError(
        f'{folder} holds {subset} but no {_NOTE}, so it is unknown which model wrote it: remove it '
        'or name another folder'
      )
  # Every process has looked before the first mask is written.
  distributed.wait_for_all('masks')
  if distributed.is_first():
    files.write_json(note, source)


def reusable(path: Path, origin: Mapping) -> dict | None:
  """The evaluation in a file; None if it is missing, damaged or not of this model and masks."""
  scores = {'miou': float, 'fscore': float, ...: object}
  try:
    result = files.read_json(path, {'overall': scores, ...: object}, 'evaluate again')
  except UserError:
    return None
  return result if all(result.get(key) == origin[key] for key in origin) else None
