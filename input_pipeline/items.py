"""Items, the units that are shuffled and read: frames of a clip with their sound and labels."""

import dataclasses
import itertools
import os
from collections.abc import Sequence

import numpy as np

from . import labels, listening, masks, prior
from .clips import IGNORE, Clip
from .errors import UserError
from .index import require_classes
from .reader import Reader, read_clip


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
  all_frames: bool = False  # see load_training_item
  soft: bool = False  # these are probabilities, see masks.py
  no_prior: bool = False  # in evaluation: prior.UNKNOWN is all of it
  dilated: bool = False  # the binary metrics' truth, see Method.dilated_truth
  # Of training, shares of the items: whose prior stage 1 has predicted, who have none, and who hear
  # what none of their pixels makes. And the faults of the prior of all others.
  predicted: float = 0.0
  none: float = 0.0
  negative_sound: float = 0.0
  faults: prior.Faults = prior.NO_FAULTS

  @property
  def draws(self) -> bool:
    """Whether what a training item holds is left to chance."""
    of_prior = self.predicted or self.none or self.faults != prior.NO_FAULTS
    return bool(self.negative_sound or (self.use_prior and of_prior))


@dataclasses.dataclass(frozen=True)
class Item:
  """Consecutive frames of one clip."""

  clip: int  # index into the list of clips
  first: int
  frames: int


@dataclasses.dataclass(frozen=True)
class Lot:
  """What chance has decided of a training item."""

  key: tuple[int, ...] = ()  # seed of what is drawn for each of its frames
  prior: str = 'truth'  # or 'predicted', by stage 1, or 'none'
  negative: listening.Sound | None = None  # heard instead of its own sound; then nothing sounds


_CERTAIN = Lot()


def make_items(clips: Sequence[Clip], item_frames: int) -> list[Item]:
  """All clips cut into items of item_frames frames, or one item a clip if item_frames is 0.

  The last item of a clip is shorter if item_frames does not divide it.
  """
  items = []
  for index, clip in enumerate(clips):
    length = item_frames or clip.num_frames
    for first in range(0, clip.num_frames, length):
      items.append(Item(index, first, min(length, clip.num_frames - first)))
  return items


def _times(item: Item) -> list[int]:
  return list(range(item.first, item.first + item.frames))


def _empty_frames(item: Item, task: Task) -> np.ndarray:
  # Filled frame by frame: to stack them afterwards would touch twice the memory, which costs more
  # than to decode a frame of a shard.
  return np.empty((item.frames, task.image_size, task.image_size, 3), np.uint8)


def _log_mel(clip: Clip, sound: listening.Sound, item: Item) -> np.ndarray:
  return listening.load_sound(clip, sound)[item.first : item.first + item.frames]


def targets_of(reader: Reader, t: int, task: Task) -> np.ndarray:
  """Class ids at the model's size; in the binary task 1 stands for all that sound."""
  ids = reader.label_ids(t, task.image_size)
  return ids if task.semantic else np.where(ids == IGNORE, ids, np.minimum(ids, 1))


def classes_of(reader: Reader, t: int, ids: np.ndarray, task: Task) -> np.ndarray:
  """What occurs in the label of frame t, in order; UserError for a class that the model lacks."""
  present = labels.values(ids)
  present = present[present != IGNORE]
  if present.size and present[-1] >= task.num_classes:
    raise UserError(
      f'{reader.label_name(t)} holds class id {present[-1]}, config.num_classes is '
      f'{task.num_classes}: set it to at least {present[-1] + 1}, or mend the label'
    )
  return present


def _is_silent(clip: Clip, reader: Reader, known: dict[int, np.ndarray], task: Task) -> bool:
  """Whether nothing sounds in any frame of a clip; `known` has the targets read already by time."""
  unread = (t for t in clip.labelled_frames if t not in known)
  maps = itertools.chain(known.values(), (targets_of(reader, t, task) for t in unread))
  return not any((targets == 1).any() for targets in maps)


def _priors(
  clip: Clip, item: Item, task: Task, lot: Lot, ids: dict[int, np.ndarray], times: Sequence[int]
) -> np.ndarray:
  """The prior of each frame of a training item; `ids` has their labels at eval_size by time."""
  if lot.prior == 'none':
    return np.full((item.frames, task.eval_size, task.eval_size), prior.UNKNOWN, np.uint8)
  if lot.prior == 'predicted' and lot.negative is None:  # stage 1 has heard the clip's own sound
    folder = os.path.join(task.masks, masks.CROSS_FITTED)
    read = {t: masks.read_mask(folder, clip, t, task.eval_size, task.soft) for t in ids}
    return np.stack([read[t] for t in times])
  # What a clip shows and does not let hear is what stage 1 may take for the source of a sound.
  sounding = ids if lot.negative is None else {t: np.zeros_like(ids[t]) for t in ids}
  if task.faults == prior.NO_FAULTS:
    true = {t: prior.truth(sounding[t]) for t in ids}
    return np.stack([true[t] for t in times])
  seen = list(ids.values())
  return np.stack([
    prior.disturb(
      sounding[t], seen, np.random.default_rng((*lot.key, 1, item.first + i)), task.faults
    )
    for i, t in enumerate(times)
  ])  # fmt: skip


def load_training_item(
  clip: Clip, item: Item, task: Task, lot: Lot | None = None
) -> dict[str, np.ndarray]:
  """One item of training: arrays with a leading axis of its frames (keys: aavs_jax.types.Batch).

  v1s has one labelled frame a training clip: it stands five times, with the five sounds, as in the
  release. With task.all_frames, which other methods want, frames stand for themselves, without
  weight where there is no label; nor is a silent clip skipped then. The prior is the ground truth,
  unless chance has it otherwise.

  Args:
    clip: of the item.
    item: its frames.
    task: what to load.
    lot: what chance has decided, where task.draws; None is the truth alone.

  Raises:
    UserError: a file is missing or damaged, or a frame has a class of num_classes or more, or more
      than max_targets label values.
  """
  reader = read_clip(clip, task.image_size, task.eval_size)
  times = _times(item)
  if clip.labelled_frames == (0,) and not task.all_frames:
    times = [0] * item.frames
  frames = _empty_frames(item, task)
  maps, ids = {}, {}
  classes = np.full((item.frames, task.max_targets), -1, np.int32)
  for i, t in enumerate(times):
    if t in maps:
      frames[i], classes[i] = frames[i - 1], classes[i - 1]
      continue
    frames[i] = reader.frame(t)
    if t not in clip.labelled_frames:
      maps[t] = np.zeros((task.image_size, task.image_size), np.uint8)
      ids[t] = np.zeros((task.eval_size, task.eval_size), np.uint8)
      continue
    maps[t] = targets_of(reader, t, task)
    if task.use_prior:
      ids[t] = reader.label_ids(t, task.eval_size)
    present = classes_of(reader, t, maps[t], task)
    if len(present) > task.max_targets:
      raise UserError(
        f'{reader.label_name(t)} has {len(present)} label values, data.max_targets is '
        f'{task.max_targets}: raise data.max_targets'
      )
    classes[i, : len(present)] = present
  targets = np.stack([maps[t] for t in times])
  lot = lot or _CERTAIN
  if lot.negative is None:
    # In which nothing sounds at all, be the item all of it or one frame.
    skipped = not task.semantic and not task.all_frames and clip.skipped_if_silent
    silent = skipped and _is_silent(clip, reader, maps, task)
  else:
    # It counts, as there is something to learn from it: that the picture alone is not enough.
    silent, targets = False, np.zeros_like(targets)
    classes = np.full_like(classes, -1)
    classes[:, 0] = 0  # the background
  weight = np.isin(times, clip.labelled_frames).astype(np.float32)
  batch = {
    'frames': frames,
    'log_mel': _log_mel(clip, clip if lot.negative is None else lot.negative, item),
    'labels': targets,
    'target_classes': classes,
    'weight': np.zeros_like(weight) if silent else weight,
    'clip': np.full(item.frames, item.clip, np.int32),
  }
  if task.use_prior:
    batch['prior'] = _priors(clip, item, task, lot, ids, times)
  return batch


def load_eval_item(
  clip: Clip, sound: listening.Sound, item: Item, task: Task
) -> dict[str, np.ndarray]:
  """One item of evaluation: as in training, but with the metric's ground truth `target`.

  In the semantic task that is `ids`, the classes at eval_size.

  The prior is prior.UNKNOWN if task.no_prior, or else stage 1's masks from task.masks, or the
  ground truth if that is ''. Frames without a label (v1s/train) have weight 0, and zeros for what
  would come from the label.

  Raises:
    UserError: a file or mask is missing or damaged, or a label has a class of num_classes or more.
  """
  reader = read_clip(clip, task.image_size, task.eval_size)
  times, frames = _times(item), _empty_frames(item, task)
  ids, targets, priors = [], [], []
  nothing = np.zeros((task.eval_size, task.eval_size), np.uint8)
  for i, t in enumerate(times):
    frames[i] = reader.frame(t)
    labelled = t in clip.labelled_frames
    ids.append(reader.label_ids(t, task.eval_size) if labelled else nothing)
    if labelled and task.semantic:
      require_classes([clip])
      classes_of(reader, t, ids[-1], task)
    if task.semantic:
      targets.append(ids[-1])
    elif labelled and task.dilated:
      targets.append(reader.metric_target(t))
    else:
      targets.append(prior.truth(ids[-1]) > 0)
    if task.use_prior and task.no_prior:
      priors.append(np.full_like(nothing, prior.UNKNOWN))
    elif task.use_prior and task.masks:
      priors.append(masks.read_mask(task.masks, clip, t, task.eval_size, task.soft))
    elif task.use_prior:
      priors.append(prior.truth(ids[-1]))
  batch = {
    'frames': frames,
    'log_mel': _log_mel(clip, sound, item),
    'ids': np.stack(ids),
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
  reader = read_clip(clip, task.image_size, task.eval_size)
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
