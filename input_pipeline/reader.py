"""What training and evaluation read of a clip, be it files of a data set or records of a shard."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np

from . import audio, images, labels, prepared
from .clips import Clip
from .errors import UserError


@dataclasses.dataclass(frozen=True)
class Reader:
  """One clip at the sizes of a task. Nothing is read before it is asked for.

  What is asked of one frame after the other is read once.

  All of them raise UserError where a file or shard is missing or damaged, and OSError where the
  disk fails. The labels are those of clip.labelled_frames alone.

  Attributes:
    frame: time -> uint8 [image_size, image_size, 3] RGB.
    label_ids: (time, size) -> class ids uint8 [size, size] as labels.resize_ids makes them, of
      image_size or eval_size. Targets, priors and silence follow: what is done to each pixel alone
      may as well be done after this resize.
    metric_target: time -> bool [eval_size, eval_size], see labels.binary_metric_target.
    label_name: time -> what to call the label in a message.
  """

  frame: Callable[[int], np.ndarray]
  label_ids: Callable[[int, int], np.ndarray]
  metric_target: Callable[[int], np.ndarray]
  label_name: Callable[[int], str]


def read_clip(clip: Clip, image_size: int, eval_size: int) -> Reader:
  """A reader of the clip. Raises UserError if it was prepared for other sizes."""
  if isinstance(clip, prepared.PreparedClip):
    prepared.require_sizes([clip], image_size, eval_size)
    return _of_shard(clip)
  return _of_files(clip, image_size, eval_size)


def _of_files(clip: Clip, image_size: int, eval_size: int) -> Reader:
  whole_ids = functools.lru_cache(1)(functools.partial(images.load_label_ids, clip))
  return Reader(
    frame=lambda t: images.load_frame(clip, t, image_size),
    label_ids=lambda t, size: labels.resize_ids(whole_ids(t), size),
    metric_target=lambda t: labels.binary_metric_target(images.load_label_rgb(clip, t), eval_size),
    label_name=functools.partial(images.label_path, clip),
  )


def _of_shard(clip: prepared.PreparedClip) -> Reader:
  record = functools.lru_cache(1)(functools.partial(prepared.read_frame, clip))
  return Reader(
    frame=lambda t: record(t).image(),
    label_ids=lambda t, size: record(t).label_ids[size],
    metric_target=lambda t: record(t).metric_target,
    label_name=lambda t: f'{clip.shard_path}: frame {t} of {clip.key}',
  )


def label_digests(clips: Sequence[Clip], image_size: int, eval_size: int) -> dict[str, str]:
  """What tells clips from others of the same names: by name a digest of one label of each of 64.

  Those of the least hash of the name, so that they stay the same where some clips come and go. Of
  files and of shards they are the same. A label that cannot be read is left out: it may be mended.

  Raises:
    OSError: the disk fails.
  """
  found = {}
  for clip in sorted(clips, key=lambda clip: hashlib.sha256(clip.name.encode()).digest())[:64]:
    with contextlib.suppress(UserError):
      ids = read_clip(clip, image_size, eval_size).label_ids(clip.labelled_frames[0], eval_size)
      found[clip.name] = hashlib.sha256(ids.tobytes()).hexdigest()[:8]
  return found


def label_digest(clips: Sequence[Clip], image_size: int, eval_size: int) -> str:
  """The same as one digest."""
  found = label_digests(clips, image_size, eval_size)
  return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def load_log_mel(clip: Clip) -> np.ndarray:
  """A clip's sound, float32 [num_frames, 96, 64], one example a frame.

  Raises:
    UserError: see audio.clip_log_mel and prepared.read_log_mel.
  """
  if isinstance(clip, prepared.PreparedClip):
    return prepared.read_log_mel(clip)
  return audio.clip_log_mel(clip.audio_path, clip.num_frames)
