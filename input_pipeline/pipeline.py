"""Grain pipelines: clips on disk to batches of frames.

Frames do not mix inside the model, so a batch is a set of n frames. An item is the unit that is
shuffled and read: a whole clip, or five consecutive frames (then every item has the same length
and v2's ten frames are two items). Several whole clips to a batch are packed, see packing.py.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from . import avsbench, labels, loaders, masks, packing, prepared, reading, sounds
from .avsbench import Clip
from .errors import UserError

EVAL_ITEM_FRAMES = 5


@dataclasses.dataclass(frozen=True)
class Task:
  """What a batch must hold; the plain values of a config that the readers need."""

  semantic: bool
  num_classes: int  # background included
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


def _times(item: Item) -> list[int]:
  return list(range(item.first, item.first + item.frames))


def _empty_frames(item: Item, task: Task) -> np.ndarray:
  # Filled frame by frame: to stack them afterwards would touch twice the memory, which costs more
  # than to decode a frame of a shard.
  return np.empty((item.frames, task.image_size, task.image_size, 3), np.uint8)


def _log_mel(clip: Clip, sound: sounds.Sound, item: Item) -> np.ndarray:
  return sounds.load_sound(clip, sound)[item.first : item.first + item.frames]


def _prior(reader: reading.Reader, t: int, task: Task) -> np.ndarray:
  """The ground truth as the prior, uint8 [eval_size, eval_size] of 0 and 255."""
  ids = reader.label_ids(t, task.eval_size)
  return ((ids > 0) & (ids != labels.IGNORE)).astype(np.uint8) * 255


def _targets(reader: reading.Reader, t: int, task: Task) -> np.ndarray:
  """Class ids at the model's size; in the binary task 1 stands for all that sound."""
  ids = reader.label_ids(t, task.image_size)
  return ids if task.semantic else np.where(ids == labels.IGNORE, ids, np.minimum(ids, 1))


def _classes(reader: reading.Reader, t: int, ids: np.ndarray, task: Task) -> np.ndarray:
  """What occurs in the label of frame t, in order; UserError for a class that the model lacks."""
  present = labels.values(ids)
  present = present[present != labels.IGNORE]
  if present.size and present[-1] >= task.num_classes:
    raise UserError(
      f'{reader.label_name(t)} holds class id {present[-1]}, config.num_classes is '
      f'{task.num_classes}: set it to at least {present[-1] + 1}, or mend the label'
    )
  return present


def _is_silent(
  clip: Clip, reader: reading.Reader, known: dict[int, np.ndarray], task: Task
) -> bool:
  """Whether nothing sounds in any frame of a clip; `known` has the targets read already by time."""
  unread = (t for t in clip.labelled_frames if t not in known)
  maps = itertools.chain(known.values(), (_targets(reader, t, task) for t in unread))
  return not any((targets == 1).any() for targets in maps)


def load_training_item(clip: Clip, item: Item, task: Task) -> dict[str, np.ndarray]:
  """One item of training: arrays with a leading axis of its frames (keys: aavs_jax.types.Batch).

  v1s has one labelled frame a training clip: it stands five times, with the five sounds, as in the
  release. The prior is the ground truth.

  Raises:
    UserError: a file is missing or damaged, or a frame has a class of num_classes or more, or more
      than max_targets label values.
  """
  reader = reading.read_clip(clip, task.image_size, task.eval_size)
  times = [0] * item.frames if clip.labelled_frames == (0,) else _times(item)
  frames = _empty_frames(item, task)
  maps, priors = {}, {}
  classes = np.full((item.frames, task.max_targets), -1, np.int32)
  for i, t in enumerate(times):
    if t in maps:
      frames[i], classes[i] = frames[i - 1], classes[i - 1]
      continue
    frames[i] = reader.frame(t)
    maps[t] = _targets(reader, t, task)
    if task.use_prior:
      priors[t] = _prior(reader, t, task)
    present = _classes(reader, t, maps[t], task)
    if len(present) > task.max_targets:
      raise UserError(
        f'{reader.label_name(t)} has {len(present)} label values, data.max_targets is '
        f'{task.max_targets}: raise data.max_targets'
      )
    classes[i, : len(present)] = present
  # The release skips a multi-source clip in which nothing sounds at all (stage 1), be the item all
  # of it or one frame.
  silent = not task.semantic and clip.subset == 'v1m' and _is_silent(clip, reader, maps, task)
  batch = {
    'frames': frames,
    'log_mel': _log_mel(clip, clip, item),
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

  Raises:
    UserError: a file or mask is missing or damaged, or a label has a class of num_classes or more.
  """
  reader = reading.read_clip(clip, task.image_size, task.eval_size)
  times, frames = _times(item), _empty_frames(item, task)
  targets, priors = [], []
  nothing = np.zeros((task.eval_size, task.eval_size), np.uint8)
  for i, t in enumerate(times):
    frames[i] = reader.frame(t)
    labelled = t in clip.labelled_frames
    if not labelled:
      targets.append(nothing)
    elif task.semantic:
      avsbench.require_classes([clip])
      targets.append(reader.label_ids(t, task.eval_size))
      _classes(reader, t, targets[-1], task)
    else:
      targets.append(reader.metric_target(t).astype(np.uint8))
    if task.use_prior and task.masks:
      priors.append(masks.read_mask(task.masks, clip, t, task.eval_size))
    elif task.use_prior and labelled:
      priors.append(_prior(reader, t, task))
    elif task.use_prior:
      priors.append(nothing)
  batch = {
    'frames': frames,
    'log_mel': _log_mel(clip, sound, item),
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
  reader = reading.read_clip(clip, task.image_size, task.eval_size)
  times, frames = _times(item), _empty_frames(item, task)
  for i, t in enumerate(times):
    frames[i] = reader.frame(t)
  return {
    'frames': frames,
    'log_mel': _log_mel(clip, clip, item),
    'weight': np.ones(item.frames, np.float32),
    'clip': np.full(item.frames, item.clip, np.int32),
    'frame': np.asarray(times, np.int32),
  }


def find_bad_clips(clips: Sequence[Clip], task: Task, threads: int) -> list[dict[str, str]]:
  """Training clips with a file that cannot be used, in order; reads every file that training reads.

  Of prepared clips, whose files were read when they were prepared, only labels that may hold
  classes which the model lacks.

  Returns:
    {'clip': 'SUBSET/UID', 'text': a sentence that names the file and what is wrong with it} each.
  """
  with concurrent.futures.ThreadPoolExecutor(threads) as executor:
    faults = zip(clips, executor.map(functools.partial(_fault, task=task), clips))
    return [{'clip': f'{c.subset}/{c.uid}', 'text': fault} for c, fault in faults if fault]


def _fault(clip: Clip, task: Task) -> str | None:
  is_prepared = isinstance(clip, prepared.PreparedClip)
  if is_prepared and (not task.semantic or task.num_classes == labels.NUM_CLASSES):
    return None
  try:
    reader = reading.read_clip(clip, task.image_size, task.eval_size)
    for t in clip.labelled_frames:
      _classes(reader, t, _targets(reader, t, task), task)
      if not is_prepared:
        reader.frame(t)
    if not is_prepared:
      reading.load_log_mel(clip)
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
  """Adds where each frame stands in the batch of all processes, among which items are dealt out.

  And with which others it is normalised in the loss: those of its item, unless the batch knows.
  """
  frames = len(batch['clip']) // items
  items = np.arange(items, dtype=np.int32) * processes + process
  position = (items[:, None] * frames + np.arange(frames, dtype=np.int32)).reshape(-1)
  return {'group': np.repeat(items, frames), **batch, 'position': position}


def _load_item(item: Item, clips: Sequence[Clip], task: Task) -> dict[str, np.ndarray]:
  return load_training_item(clips[item.clip], item, task)


def _load_slot(slot: packing.Slot, clips: Sequence[Clip], task: Task) -> dict[str, np.ndarray]:
  item = Item(slot.clip, slot.part * packing.SLOT_FRAMES, packing.SLOT_FRAMES)
  batch = _load_item(item, clips, task)
  if slot.empty:
    batch['weight'] = np.zeros_like(batch['weight'])
  return batch | {'group': np.full(packing.SLOT_FRAMES, slot.begin, np.int32)}


def _is_packed(item_frames: int, batch_items: int) -> bool:
  """Whether batches are whole clips in slots of five frames (see packing.py), or else of items."""
  return item_frames == 0 and batch_items > 1


def _slots(clips: Sequence[Clip]) -> list[int]:
  return [clip.num_frames // packing.SLOT_FRAMES for clip in clips]


def epoch_size(clips: Sequence[Clip], item_frames: int, batch_items: int) -> tuple[float, int]:
  """How many batches are an epoch, a fraction as well, and how many frames the shortest one has."""
  if _is_packed(item_frames, batch_items):
    batches = packing.batches_an_epoch(_slots(clips), batch_items)
    return batches, batch_items * packing.SLOT_FRAMES
  items = make_items(clips, item_frames)
  return len(items) / batch_items, batch_items * min(item.frames for item in items)


def training_batches(
  clips: Sequence[Clip],
  task: Task,
  *,
  item_frames: int,
  batch_items: int,
  seed: int,
  start: int,
  threads: int,
  workers: int = 0,
  process: int = 0,
  processes: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """Endless shuffled batches from batch number `start` on.

  The stream is a function of clips, seed and the global batch size: a run restarted at batch
  `start` sees what it would have seen, and so do any number of threads, loader processes and
  processes together.

  Args:
    clips: what to train on.
    task: what a batch must hold.
    item_frames: frames of an item; 0: whole clips, which several to a batch are packed, see
      packing.py.
    batch_items: items of a batch, or slots of five frames where whole clips are packed; of all
      processes together.
    seed: of the order.
    start: number of the first batch.
    threads: that read, in each worker.
    workers: loader processes, 0 = threads of this one; `close` the stream where there are any.
    process: which share of each batch this process reads.
    processes: of how many.
  """
  if task.semantic:
    avsbench.require_classes(clips)
  packed = _is_packed(item_frames, batch_items)
  items = make_items(clips, packing.SLOT_FRAMES if packed else item_frames)
  if batch_items > len(items):
    raise UserError(
      f'data.batch_items={batch_items} is more than the {len(items)} training items: lower it'
    )
  if batch_items % processes:
    raise UserError(
      f'data.batch_items={batch_items} cannot be shared by {processes} processes: '
      'make it a multiple of them'
    )
  if packed:
    order = grain.MapDataset.source(packing.PackedSlots(_slots(clips), batch_items, seed))
  else:
    order = grain.MapDataset.source(items).seed(seed).shuffle().repeat(None)
  local = batch_items // processes
  load = functools.partial(_load_slot if packed else _load_item, clips=clips, task=task)
  place = functools.partial(_place, items=local, process=process, processes=processes)
  dataset = (
    order[process::processes]
    .map(loaders.unless_stopping)
    .map(load)
    .batch(local, drop_remainder=True, batch_fn=_stack)
    .map(place)
  )
  return loaders.read_ahead(dataset[start:], threads=threads, workers=workers)


def eval_batches(
  clips: Sequence[Clip], load, *, batch_items: int, threads: int
) -> Iterator[dict[str, np.ndarray]]:
  """Every frame of every clip once, in order, in batches of one size; padding has weight 0.

  Args:
    clips: what to read.
    load: function of an Item to its arrays, such as load_eval_item with its clip bound.
    batch_items: items of five frames a batch.
    threads: readers.
  """
  items = make_items(clips, EVAL_ITEM_FRAMES)
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
  stream = iter(grain.MapDataset.source(items).map(load).to_iter_dataset(options))
  while parts := list(itertools.islice(stream, batch_items)):
    padding = {**parts[-1], 'weight': np.zeros_like(parts[-1]['weight'])}
    yield _stack([*parts, *[padding] * (batch_items - len(parts))])
