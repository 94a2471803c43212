"""Grain pipelines: clips on disk to batches of frames.

Frames do not mix inside the model, so a batch is a set of n frames, those of one or more items
(items.py): whole clips, or some consecutive frames of each (of v2's ten frames five, and five
more). Several whole clips to a batch are packed, see packing.py.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from . import listening, packing
from .clips import EVAL_ITEM_FRAMES, Clip
from .errors import UserError
from .index import require_classes
from .items import Item, Lot, Task, load_training_item, make_items
from .read_ahead import read_ahead, unless_stopping


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


def _load_item(
  item: Item, clips: Sequence[Clip], task: Task, lot: Lot | None = None
) -> dict[str, np.ndarray]:
  return load_training_item(clips[item.clip], item, task, lot)


def _load_slot(
  slot: packing.Slot, clips: Sequence[Clip], task: Task, lot: Lot | None = None
) -> dict[str, np.ndarray]:
  item = Item(slot.clip, slot.part * packing.SLOT_FRAMES, packing.SLOT_FRAMES)
  batch = _load_item(item, clips, task, lot)
  if slot.empty:
    batch['weight'] = np.zeros_like(batch['weight'])
  return batch | {'group': np.full(packing.SLOT_FRAMES, slot.begin, np.int32)}


def _with_lot(
  place: int,
  item: Item | packing.Slot,
  clips: Sequence[Clip],
  task: Task,
  seed: int,
  objects: Sequence[listening.Objects | None],
) -> tuple[Item | packing.Slot, Lot]:
  """An item and what chance decides of it, which follows from seed and place in the stream."""
  key = (seed, place - getattr(item, 'part', 0))  # a clip in two slots has one lot
  rng = np.random.default_rng(key)
  share = rng.random()
  prior = 'none' if share < task.none else 'predicted'
  prior = prior if share < task.none + task.predicted else 'truth'
  negative = None
  if rng.random() < task.negative_sound:
    negative = listening.negative_sound(clips, item.clip, objects, rng)
  return item, Lot(key, prior, negative)


def _load_drawn(drawn: tuple[Item | packing.Slot, Lot], load) -> dict[str, np.ndarray]:
  item, lot = drawn
  return load(item, lot=lot)


def _is_packed(item_frames: int, batch_items: int) -> bool:
  """Whether batches are whole clips in slots of five frames (see packing.py), or else of items."""
  return item_frames == 0 and batch_items > 1


def _training_items(clips: Sequence[Clip], item_frames: int, batch_items: int) -> list[Item]:
  """Items of one length each or, if item_frames is 0, whole clips, cut into slots if packed."""
  packed = _is_packed(item_frames, batch_items)
  length = packing.SLOT_FRAMES if packed else item_frames
  for clip in clips:
    if length and clip.num_frames % length:
      unfit = f'{clip.key}, which has {clip.num_frames}'
      if packed:
        raise UserError(
          f'config.data.batch_items is {batch_items}, which packs whole clips into slots of '
          f'{length} frames, and these do not divide {unfit}: use 1, or set data.item_frames to 1'
        )
      raise UserError(
        f'config.data.item_frames is {length}, which does not divide {unfit} frames: use a number '
        'that divides every clip, such as 1, or 0 (whole clips)'
      )
    if packed and clip.num_frames > length * batch_items:
      raise UserError(
        f'config.data.batch_items is {batch_items}, slots of {length} frames, which do not hold '
        f'{clip.key} of {clip.num_frames}: use {clip.num_frames // length} or more, '
        'or set data.item_frames to 1'
      )
  return make_items(clips, length)


def _slots(clips: Sequence[Clip]) -> list[int]:
  return [clip.num_frames // packing.SLOT_FRAMES for clip in clips]


def epoch_size(clips: Sequence[Clip], item_frames: int, batch_items: int) -> tuple[float, int]:
  """How many batches are an epoch, a fraction as well, and the number of frames of which each has
  a multiple.
  """
  items = _training_items(clips, item_frames, batch_items)
  if _is_packed(item_frames, batch_items):
    batches = packing.batches_an_epoch(_slots(clips), batch_items)
    return batches, batch_items * packing.SLOT_FRAMES
  return len(items) / batch_items, batch_items * math.gcd(*(item.frames for item in items))


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
    seed: of the order, and of what task.draws leaves to chance.
    start: number of the first batch.
    threads: that read, in each worker.
    workers: loader processes, 0 = threads of this one; `close` the stream where there are any.
    process: which share of each batch this process reads.
    processes: of how many.
  """
  if task.semantic:
    require_classes(clips)
  packed = _is_packed(item_frames, batch_items)
  items = _training_items(clips, item_frames, batch_items)
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
  if task.draws:
    objects = listening.known_objects(clips) if task.negative_sound else ()
    options = dict(clips=clips, task=task, seed=seed, objects=objects)
    # Before the items are dealt out to processes: the place is that in the stream of all.
    order = order.map_with_index(functools.partial(_with_lot, **options))
    load = functools.partial(_load_drawn, load=load)
  place = functools.partial(_place, items=local, process=process, processes=processes)
  dataset = (
    order[process::processes]
    .map(unless_stopping)
    .map(load)
    .batch(local, drop_remainder=True, batch_fn=_stack)
    .map(place)
  )
  return read_ahead(dataset[start:], threads=threads, workers=workers)


def eval_batches(
  clips: Sequence[Clip], load, *, batch_items: int, threads: int
) -> Iterator[dict[str, np.ndarray]]:
  """Every frame of every clip once, in order, in batches of one size; padding has weight 0.

  Args:
    clips: what to read.
    load: function of an Item to its arrays, such as load_eval_item with its clip bound.
    batch_items: items of five frames a batch, or less at the end of a clip, which are filled up.
    threads: readers.
  """
  items = make_items(clips, EVAL_ITEM_FRAMES)
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
  stream = iter(grain.MapDataset.source(items).map(load).map(_fill).to_iter_dataset(options))
  while parts := list(itertools.islice(stream, batch_items)):
    padding = {**parts[-1], 'weight': np.zeros_like(parts[-1]['weight'])}
    yield _stack([*parts, *[padding] * (batch_items - len(parts))])


def _fill(item: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The item with its last frame again, without weight, until it is as long as all others."""
  lacking = EVAL_ITEM_FRAMES - len(item['weight'])
  if not lacking:
    return item
  filled = {n: np.concatenate([v, np.repeat(v[-1:], lacking, 0)]) for n, v in item.items()}
  filled['weight'][-lacking:] = 0
  return filled
