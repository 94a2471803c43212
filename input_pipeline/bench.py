"""`aavs bench input`: what reading costs, in CPU time of one thread, and what the loaders deliver.

CPU time, since what else the machine does then hardly counts.
"""

import dataclasses
import itertools
import math
import multiprocessing
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from PIL import Image

from . import audio, host, images, items, pipeline, prepare, prepared
from .clips import EVAL_ITEM_FRAMES, Clip
from .compose.dataset import compose
from .errors import UserError
from .index import read_index
from .reader import load_log_mel, read_clip

WANTED = 1000  # frames/s of an accelerator that is to be fed
FLAT_MB = 32  # how much an epoch may add to resident memory and still be called flat

_SIZE = (1280, 720)  # of the frames of v2
_NOISE = 4.0  # standard deviation of the sensor noise added to made frames, of 255
_QUALITY = 90  # of their JPEG files
_PER_CORE = 'frames_per_second_per_core'


@dataclasses.dataclass(frozen=True)
class Loading:
  """How batches are made of items; values of config.data."""

  item_frames: int
  batch_items: int
  threads: int
  workers: int


def bench_input(
  task: items.Task, loading: Loading, *, data: str, clips: int, seconds: float
) -> dict:
  """Times reading from raw files, from shards, and the log-mel.

  Args:
    task: what a batch holds.
    loading: of the timing through grain.
    data: a data set, raw or prepared; '' makes clips with frames of 1280x720 and prepares them.
    clips: how many of them to read.
    seconds: how long each of raw files and shards is timed, twice: alone and through grain.

  Returns:
    'machine', 'data' (what was read), 'wanted' (frames/s), 'log_mel_times_real_time', and 'raw' and
    'shards', each with 'milliseconds' of CPU time a frame by part, 'frames_per_second_per_core',
    'cores' that feed `wanted` and, through grain and by the clock, 'delivered' frames/s; 'raw' or
    'shards' is missing where `data` has no such files.

  Raises:
    UserError: faults of the data, no clips or no time.
  """
  _require(clips, '--clips')
  if not 0 < seconds < math.inf:
    raise UserError(f'--seconds is {seconds}: use a length above 0')
  result = {'machine': _machine(), 'wanted': WANTED}
  with tempfile.TemporaryDirectory() as folder:
    if data:
      found, result['data'] = _sample(read_index(data, 'train'), clips), data
    else:
      found, result['data'] = _make_clips(pathlib.Path(folder, 'raw'), clips, task)
    if isinstance(found[0], prepared.PreparedClip):
      sources = {'shards': found}
    else:
      sources = {'raw': found}
      waveform = audio.resample(*audio.read_wav(found[0].audio_path))
      spent = min(_cpu(audio.log_mel_examples, waveform)[0] for _ in range(5))
      result['log_mel_times_real_time'] = len(waveform) / audio.SAMPLE_RATE / spent
    if not data:
      out = os.path.join(folder, 'shards')
      sizes = {'image_size': task.image_size, 'eval_size': task.eval_size}
      prepare.prepare(found[0].root, out, **sizes, workers=1)
      sources['shards'] = read_index(out, 'train')
    for name, members in sources.items():
      parts = _time_parts(members, task, seconds)
      total = sum(parts.values())
      result[name] = {
        'milliseconds': {part: 1000 * value for part, value in parts.items()},
        _PER_CORE: 1 / total,
        'cores': WANTED * total,
        'delivered': _time_loading(members, task, loading, seconds),
      }
  return result


def format_input(result: dict, loading: Loading) -> str:
  """The table of `bench_input`."""
  lines = [f'{result["data"]}; {result["machine"]}']
  for name in ('raw', 'shards'):
    if name not in result:
      continue
    of = result[name]
    total = sum(of['milliseconds'].values())
    lines += ['', f'{name:26}   CPU ms a frame   share']
    for part, value in of['milliseconds'].items():
      lines.append(f'  {part:26} {value:12.2f} {value / total:9.0%}')
    lines += [
      f'  {"together":26} {total:12.2f}   {of[_PER_CORE]:.0f} frames/s a core; '
      f'{of["cores"]:.1f} cores feed {result["wanted"]} frames/s',
      f'  through grain: {of["delivered"]:.0f} frames/s by the clock (batch_items '
      f'{loading.batch_items}, {loading.threads} threads, {loading.workers} workers)',
    ]
  if 'log_mel_times_real_time' in result:
    lines += ['', f'log-mel: {result["log_mel_times_real_time"]:.0f} times real time']
  return '\n'.join(lines)


def bench_memory(
  task: items.Task,
  loading: Loading,
  *,
  data: str,
  clips: int,
  say: Callable[[str], None],
) -> dict:
  """Reads an epoch as training does, and watches the memory of this process and its loaders.

  Args:
    task: what a batch holds.
    loading: how they are made.
    data: a data set; '' makes a few clips, and of them as many as wanted by hard links.
    clips: of the epoch; each is read once.
    say: is told after each tenth.

  Returns:
    'megabytes' resident after each tenth, 'growth' from the first to the last, 'clips' and 'data'.

  Raises:
    UserError: the data has fewer clips, or none are asked for.
  """
  _require(clips, '--memory')
  with tempfile.TemporaryDirectory() as folder:
    if data:
      found = read_index(data, 'train')[:clips]
      if len(found) < clips:
        raise UserError(f'{data} has {len(found)} training clips: ask for no more of them')
    else:
      made, data = _make_clips(pathlib.Path(folder, 'raw'), 2, task, mixed=True)
      found = _multiply(made, pathlib.Path(folder, 'many'), clips)
    batches = _open(found, task, loading)
    total = int(pipeline.epoch_size(found, loading.item_frames, loading.batch_items)[0])
    megabytes = []
    try:
      for done in range(1, total + 1):
        next(batches)
        if done * 10 // total > (done - 1) * 10 // total:
          megabytes.append(_resident())
          say(f'  {done}/{total} batches, {megabytes[-1]:.0f} MB resident')
    finally:
      batches.close()
  growth = megabytes[-1] - megabytes[0]
  return {'megabytes': megabytes, 'growth': growth, 'clips': clips, 'data': data}


def format_memory(result: dict) -> str:
  flat = 'flat' if result['growth'] < FLAT_MB else 'NOT flat'
  return (
    f'{result["growth"]:+.0f} MB from the first tenth to the last of {result["clips"]} clips: '
    f'{flat} (less than {FLAT_MB} MB)'
  )


def _require(clips: int, flag: str) -> None:
  if clips < 1:
    raise UserError(f'{flag} is {clips}: use 1 or more')


def _sample(clips: Sequence[Clip], count: int) -> list[Clip]:
  """Clips from all over a split, of those of which training reads every frame, if there are any."""
  whole = [clip for clip in clips if len(clip.labelled_frames) == clip.num_frames] or list(clips)
  return whole[:: max(1, len(whole) // count)][:count]


def _make_clips(
  root: pathlib.Path, count: int, task: items.Task, mixed: bool = False
) -> tuple[list[Clip], str]:
  """Training clips of v2, if mixed one of v1s and v1m too, and what to call them."""
  others = 1 if mixed else 0
  number = {'v1s': others, 'v1m': others, 'v2': count}
  compose(root, clips={'train': number}, size=_SIZE)
  clips = read_index(root, 'train')
  rng = np.random.default_rng(0)
  sizes = []
  for clip in clips:
    for t in range(clip.num_frames):
      # Drawings without noise are decoded in half the time.
      path = clip.frame_path(t)
      frame = cv2.imread(path)
      frame = frame + _NOISE * rng.standard_normal(frame.shape, np.float32)
      frame = np.clip(frame, 0, 255).astype(np.uint8)
      cv2.imwrite(path, frame, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
      sizes.append(os.path.getsize(path))
  return clips, (
    f'{len(clips)} made clips, {_SIZE[0]}x{_SIZE[1]}, drawn with sensor noise, JPEG files of '
    f'{np.mean(sizes) / 1000:.0f} kB; read at {task.image_size} and {task.eval_size}'
  )


def _multiply(clips: Sequence[Clip], root: pathlib.Path, count: int) -> list[Clip]:
  """As many clips under names of their own, in the order of `clips` again and again."""
  result = []
  for number, clip in zip(range(count), itertools.cycle(clips)):
    copy = dataclasses.replace(clip, root=str(root), uid=f'{clip.uid}_{number}')
    for path in pathlib.Path(clip.folder).rglob('*.*'):
      target = pathlib.Path(copy.folder, path.relative_to(clip.folder))
      target.parent.mkdir(parents=True, exist_ok=True)
      os.link(path, target)
    result.append(copy)
  return result


def _cpu(function: Callable, *arguments):
  """CPU seconds of this thread that a call takes, and what it returns.

  Not of the process: threads of the linear algebra library wait by spinning after their work.
  """
  started = time.thread_time()
  value = function(*arguments)
  return time.thread_time() - started, value


def _time_parts(clips: Sequence[Clip], task: items.Task, seconds: float) -> dict[str, float]:
  """CPU seconds a frame of load_training_item by part; medians over the items read in the time."""
  cut = items.make_items(clips, EVAL_ITEM_FRAMES)
  rows = []  # the whole, then its parts
  until = time.monotonic() + seconds
  for number, item in enumerate(itertools.cycle(cut)):
    clip = clips[item.clip]
    parts = {'whole': _cpu(items.load_training_item, clip, item, task)[0]}
    parts['log-mel'] = _cpu(load_log_mel, clip)[0]
    times = [t for t in clip.labelled_frames if item.first <= t < item.first + item.frames]
    for t in times:
      for part, value in _time_frame(clip, t, task).items():
        parts[part] = parts.get(part, 0.0) + value
    if number:  # the first finds nothing in any cache
      rows.append([value / item.frames for value in parts.values()])
    if rows and time.monotonic() > until:
      break
  result = dict(zip(parts, np.median(rows, 0).tolist()))
  whole = result.pop('whole')
  return result | {'the rest': whole - sum(result.values())}


def _time_frame(clip: Clip, t: int, task: items.Task) -> dict[str, float]:
  """CPU seconds of the parts of a frame."""
  sizes = (task.image_size, task.eval_size)
  if isinstance(clip, prepared.PreparedClip):
    record_seconds, record = _cpu(prepared.read_frame, clip, t)
    return {'record, labels': record_seconds, 'image': _cpu(record.image)[0]}
  image = Image.fromarray(images.read_image(clip.frame_path(t)))
  resize, _ = _cpu(images.resize_frame, image, task.image_size)
  both, _ = _cpu(images.load_frame, clip, t, task.image_size)
  reader = read_clip(clip, *sizes)
  wanted = sizes if task.use_prior else sizes[:1]
  label = sum(_cpu(reader.label_ids, t, size)[0] for size in wanted)
  return {'image: decode': both - resize, 'image: resize': resize, 'label': label}


def _open(clips: Sequence[Clip], task: items.Task, loading: Loading):
  return pipeline.training_batches(clips, task, seed=0, start=0, **dataclasses.asdict(loading))


def _time_loading(
  clips: Sequence[Clip], task: items.Task, loading: Loading, seconds: float
) -> float:
  """Frames a second that training would get, by the clock."""
  enough = -(-2 * loading.batch_items // len(clips))
  batches = _open(list(clips) * enough, task, loading)
  try:
    for _ in range(2 * loading.threads * max(1, loading.workers)):  # read while all began
      next(batches)
    frames, started = 0, time.monotonic()
    while time.monotonic() < started + seconds:
      frames += len(next(batches)['clip'])
    return frames / (time.monotonic() - started)
  finally:
    batches.close()


def _resident() -> float:
  """MB of memory that this process and its loader processes hold."""
  pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
  pages = sum(int(pathlib.Path(f'/proc/{pid}/statm').read_text().split()[1]) for pid in pids)
  return pages * os.sysconf('SC_PAGE_SIZE') / 1e6


def _machine() -> str:
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    name = next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
  except (OSError, StopIteration):
    name = platform.processor() or platform.machine()
  cores = host.cores()
  return f'{cores} core{"s" * (cores > 1)}, {name}'
