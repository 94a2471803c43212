"""Grain pipelines: clips on disk to batches of frames.

Frames do not mix inside the model, so a batch is a set of n frames. An item is the unit that is
shuffled and read: a whole clip, or five consecutive frames (then every item has the same length
and v2's ten frames are two items).
"""

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from input_pipeline import avsbench, labels, masks, sounds
from input_pipeline.avsbench import Clip
from input_pipeline.errors import UserError

EVAL_ITEM_FRAMES = 5


@dataclasses.dataclass(frozen=True)
class Task:
  """What a batch must hold; the plain values of a config that the readers need."""

  semantic: bool
  image_size: int
  eval_size: int
  max_targets: int
  use_prior: bool
  masks: str  # folder of stage 1's masks, '' = ground truth as the prior


@dataclasses.dataclass(frozen=True)
class Item:
  """Consecutive frames of one clip."""

  clip: int  # index into the list of clips
  first: int
  frames: int


def make_items(clips: Sequence[Clip], item_frames: int) -> list[Item]:
  """All clips cut into items of item_frames frames, or one item a clip if item_frames is 0."""
  if item_frames not in (0, 1, 5):
    raise UserError(
      f'data.item_frames={item_frames} does not divide clips of 5 and of 10 frames: use 5, 1 or 0 '
      '(whole clips)'
    )
  items = []
  for index, clip in enumerate(clips):
    length = item_frames or clip.num_frames
    items += [Item(index, first, length) for first in range(0, clip.num_frames, length)]
  return items


def _frames_and_sound(clip: Clip, sound: sounds.Sound, item: Item, task: Task, training: bool):
  only_first = training and clip.labelled_frames == (0,)
  times = [0 if only_first else item.first + i for i in range(item.frames)]
  distinct = {t: avsbench.load_frame(clip, t, task.image_size) for t in dict.fromkeys(times)}
  log_mel = sounds.load_sound(clip, sound)[item.first : item.first + item.frames]
  return times, np.stack([distinct[t] for t in times]), log_mel


def _to_prior(ids: np.ndarray, size: int) -> np.ndarray:
  sounding = (ids > 0) & (ids != labels.IGNORE)
  return labels.resize_ids(sounding.astype(np.uint8) * 255, size)


def _to_targets(ids: np.ndarray, task: Task) -> np.ndarray:
  """Class ids at the model's size; in the binary task 1 stands for all that sound."""
  if not task.semantic:
    ids = np.where(ids == labels.IGNORE, labels.IGNORE, ids > 0).astype(np.uint8)
  return labels.resize_ids(ids, task.image_size)


def _is_silent(clip: Clip, known: dict[int, np.ndarray], task: Task) -> bool:
  """Whether nothing sounds in any frame of a clip; `known` has the targets read already by time."""
  unread = (t for t in clip.labelled_frames if t not in known)
  maps = itertools.chain(
    known.values(), (_to_targets(avsbench.load_label_ids(clip, t), task) for t in unread)
  )
  return not any((targets == 1).any() for targets in maps)


def load_training_item(clip: Clip, item: Item, task: Task) -> dict[str, np.ndarray]:
  """One item of training: arrays with a leading axis of its frames (keys: aavs_jax.types.Batch).

  v1s has one labelled frame a training clip: it stands five times, with the five sounds, as in the
  release. The prior is the ground truth.

  Raises:
    UserError: a file is missing or damaged, or a frame has more than max_targets label values.
  """
  times, frames, log_mel = _frames_and_sound(clip, clip, item, task, training=True)
  maps, priors = {}, {}
  for t in dict.fromkeys(times):
    ids = avsbench.load_label_ids(clip, t)
    if task.use_prior:
      priors[t] = _to_prior(ids, task.eval_size)
    maps[t] = _to_targets(ids, task)
  classes = np.full((item.frames, task.max_targets), -1, np.int32)
  for i, t in enumerate(times):
    present = np.unique(maps[t])
    present = present[present != labels.IGNORE]
    if len(present) > task.max_targets:
      raise UserError(
        f'{clip.label_ids_path(t)} has {len(present)} label values, data.max_targets is '
        f'{task.max_targets}: raise data.max_targets'
      )
    classes[i, : len(present)] = present
  # The release skips a multi-source clip in which nothing sounds at all (stage 1), be the item all
  # of it or one frame.
  silent = not task.semantic and clip.subset == 'v1m' and _is_silent(clip, maps, task)
  batch = {
    'frames': frames,
    'log_mel': log_mel,
    'labels': np.stack([maps[t] for t in times]),
    'target_classes': classes,
    'weight': np.full(item.frames, 0.0 if silent else 1.0, np.float32),
    'clip': np.full(item.frames, item.clip, np.int32),
  }
  if task.use_prior:
    batch['prior'] = np.stack([priors[t] for t in times])
  return batch


def load_eval_item(
  clip: Clip, sound: sounds.Sound, item: Item, task: Task
) -> dict[str, np.ndarray]:
  """One item of evaluation: as in training, but with the metric's ground truth `target`.

  The prior is stage 1's masks from task.masks, or the ground truth if that is ''. Frames without a
  label (v1s/train) have weight 0, and zeros for what would come from the label.
  """
  times, frames, log_mel = _frames_and_sound(clip, sound, item, task, training=False)
  targets, priors = [], []
  nothing = np.zeros((task.eval_size, task.eval_size), np.uint8)
  for t in times:
    labelled = t in clip.labelled_frames
    if not labelled:
      targets.append(nothing)
    elif task.semantic:
      avsbench.require_classes([clip])
      targets.append(labels.resize_ids(avsbench.load_label_ids(clip, t), task.eval_size))
    else:
      colours = avsbench.load_label_rgb(clip, t)
      targets.append(labels.binary_metric_target(colours, task.eval_size).astype(np.uint8))
    if task.use_prior and task.masks:
      priors.append(masks.read_mask(task.masks, clip, t, task.eval_size))
    elif task.use_prior and labelled:
      priors.append(_to_prior(avsbench.load_label_ids(clip, t), task.eval_size))
    elif task.use_prior:
      priors.append(nothing)
  batch = {
    'frames': frames,
    'log_mel': log_mel,
    'target': np.stack(targets),
    'weight': np.isin(times, clip.labelled_frames).astype(np.float32),
    'clip': np.full(item.frames, item.clip, np.int32),
    'frame': np.asarray(times, np.int32),
  }
  if task.use_prior:
    batch['prior'] = np.stack(priors)
  return batch


def load_unlabelled_item(clip: Clip, item: Item, task: Task) -> dict[str, np.ndarray]:
  """Frames and sound alone, for writing masks of clips whose labels are partial (v1s/train)."""
  times, frames, log_mel = _frames_and_sound(clip, clip, item, task, training=False)
  return {
    'frames': frames,
    'log_mel': log_mel,
    'weight': np.ones(item.frames, np.float32),
    'clip': np.full(item.frames, item.clip, np.int32),
    'frame': np.asarray(times, np.int32),
  }


def find_bad_clips(clips: Sequence[Clip], threads: int) -> list[dict[str, str]]:
  """Training clips with a file that cannot be used, in order; reads every file that training reads.

  Returns:
    {'clip': 'SUBSET/UID', 'text': a sentence that names the file and what is wrong with it} each.
  """
  with concurrent.futures.ThreadPoolExecutor(threads) as executor:
    faults = zip(clips, executor.map(_fault, clips))
    return [{'clip': f'{c.subset}/{c.uid}', 'text': fault} for c, fault in faults if fault]


def _fault(clip: Clip) -> str | None:
  try:
    for t in clip.labelled_frames:
      avsbench.read_image(clip.frame_path(t))
      avsbench.load_label_ids(clip, t)
    avsbench.load_log_mel(clip)
  except UserError as error:
    return str(error)
  return None


def leave_out(clips: Sequence[Clip], bad: Sequence[dict[str, str]], limit: int) -> list[Clip]:
  """Training clips without bad ones.

  They are found before the first batch and left out of the list of clips, instead of met and
  replaced on the way: the stream is then that of a data set without them, for any number of
  threads and processes, and all that a restarted run must remember is which they are.

  Raises:
    UserError: there are more than `limit` bad ones, or no others.
  """
  if len(bad) > limit:
    raise UserError(
      f'{len(bad)} of {len(clips)} training clips cannot be used, but data.max_bad_clips is '
      f'{limit}: mend them (`aavs check-data` lists all faults) or raise it; the first is '
      f'{bad[0]["text"]}'
    )
  names = {row['clip'] for row in bad}
  good = [clip for clip in clips if f'{clip.subset}/{clip.uid}' not in names]
  if not good:
    raise UserError(f'no training clip can be used: mend the data; the first is {bad[0]["text"]}')
  return good


def _stack(items: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  return {name: np.concatenate([item[name] for item in items]) for name in items[0]}


def _place(
  batch: dict[str, np.ndarray], items: int, process: int, processes: int
) -> dict[str, np.ndarray]:
  """Adds each frame's place and item in the batch of all processes, which items are dealt out to."""
  frames = len(batch['clip']) // items
  items = np.arange(items, dtype=np.int32) * processes + process
  position = (items[:, None] * frames + np.arange(frames, dtype=np.int32)).reshape(-1)
  return batch | {'position': position, 'group': np.repeat(items, frames)}


def training_batches(
  clips: Sequence[Clip],
  task: Task,
  *,
  item_frames: int,
  batch_items: int,
  seed: int,
  start: int,
  threads: int,
  process: int = 0,
  processes: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """Endless shuffled batches from batch number `start` on.

  The stream is a function of clips, seed and the global batch size: a run restarted at batch
  `start` sees what it would have seen, and so do any number of threads and processes together.
  """
  if task.semantic:
    avsbench.require_classes(clips)
  items = make_items(clips, item_frames)
  if batch_items > len(items):
    raise UserError(
      f'data.batch_items={batch_items} is more than the {len(items)} training items: lower it'
    )
  if batch_items % processes:
    raise UserError(
      f'data.batch_items={batch_items} cannot be shared by {processes} processes: '
      'make it a multiple of them'
    )
  if batch_items > 1 and not item_frames and len({item.frames for item in items}) > 1:
    raise UserError(
      f'data.batch_items={batch_items} with whole clips of different lengths cannot be one batch: '
      'set data.item_frames=5'
    )
  local = batch_items // processes
  dataset = (
    grain.MapDataset.source(items)
    .seed(seed)
    .shuffle()
    .repeat(None)[process::processes]
    .map(lambda item: load_training_item(clips[item.clip], item, task))
    .batch(local, drop_remainder=True, batch_fn=_stack)
    .map(functools.partial(_place, items=local, process=process, processes=processes))
  )
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
  return iter(dataset[start:].to_iter_dataset(options))


def eval_batches(
  clips: Sequence[Clip],
  load,
  *,
  batch_items: int,
  threads: int,
  process: int = 0,
  processes: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """Every frame of every clip once, in order, in batches of one size; padding has weight 0.

  Args:
    clips: what to read.
    load: function of an Item to its arrays, such as load_eval_item with its clip bound.
    batch_items: items of five frames a batch, all processes together.
    threads: readers.
    process: which share of the clips this process reads.
    processes: of how many; every process gets the same number of batches.
  """
  items = make_items(clips, EVAL_ITEM_FRAMES)
  local = batch_items // processes
  rounds = -(-len(items) // batch_items)
  mine = items[process::processes]
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
  stream = iter(grain.MapDataset.source(mine).map(load).to_iter_dataset(options)) if mine else None
  last = None
  remaining = len(mine)
  for _ in range(rounds):
    parts = [next(stream) for _ in range(min(local, remaining))]
    remaining -= len(parts)
    last = parts[-1] if parts else last if last is not None else load(items[0])
    padding = {**last, 'weight': np.zeros_like(last['weight'])}
    yield _stack(parts + [padding] * (local - len(parts)))
