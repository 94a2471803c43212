"""`aavs prepare`: writes a data set as shards that training reads without decoding its files.

What a prepared folder holds is said in prepared.py, which reads it.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from . import files, host, prepared
from .clips import SPLITS, Clip
from .errors import UserError
from .index import read_index
from .prepared import MANIFEST, Settings
from .reader import load_log_mel, read_clip

_CLAIM = 'preparing.json'  # what a folder is for, until the manifest says so
_NOTE = {'file': str, 'bytes': int, 'sha256': str, 'clips': [str], 'bad_clips': prepared.BAD_CLIPS}
CLIPS_PER_SHARD = 64  # 50 to 120 MB at the published sizes


def clip_arrays(clip: Clip, image_size: int, eval_size: int) -> dict[str, np.ndarray]:
  """All that training and evaluation read of a clip, at the sizes of a config.

  Returns:
    frames uint8 [T, s, s, 3], RGB; log_mel float32 [T, 96, 64]; labelled int64 [L], the frames that
    have a label; and of these label_ids uint8 [L, s, s] and label_ids_eval uint8 [L, e, e], class
    ids or 255, and metric_target bool [L, e, e], the ground truth of the binary metrics. T is
    clip.num_frames, s is image_size, e is eval_size.

  Raises:
    UserError: a file of the clip is missing or damaged.
  """
  reader = read_clip(clip, image_size, eval_size)
  labelled = clip.labelled_frames
  return {
    'frames': np.stack([reader.frame(t) for t in range(clip.num_frames)]),
    'log_mel': load_log_mel(clip),
    'labelled': np.asarray(labelled),
    'label_ids': np.stack([reader.label_ids(t, image_size) for t in labelled]),
    'label_ids_eval': np.stack([reader.label_ids(t, eval_size) for t in labelled]),
    'metric_target': np.stack([reader.metric_target(t) for t in labelled]),
  }


def prepare(
  root: str | os.PathLike,
  out: str | os.PathLike,
  *,
  image_size: int = 384,
  eval_size: int = 224,
  jpeg: int = 0,
  workers: int | None = None,
  clips_per_shard: int = CLIPS_PER_SHARD,
  on_bad_clip: str = 'error',
  max_bad_clips: int = 0,
  progress: Callable[[int, int], None] | None = None,
) -> dict:
  """Writes the shards of a data set, in parallel; called again after any interruption, goes on.

  A shard appears under its name when it is complete, and prepared.json when all of them are there.
  The folder is byte for byte that of an uninterrupted run. Shards that are there are checked
  against their SHA-256 and written anew if damaged, or if a bad clip was left out of them. Whether
  other files of the data set have changed is not looked at: they want a new folder.

  Args:
    root: the data set, in either layout.
    out: new folder, or one that this has begun; also gs:// or s3://, where etils.epath can write.
    image_size: side of frames and labels, as config.data.image_size.
    eval_size: side of metric targets and priors, as config.data.eval_size.
    jpeg: quality, 1 to 100, at which frames are stored; 0 stores them without loss.
    workers: processes; None for one a core.
    clips_per_shard: how many a shard holds, at most.
    on_bad_clip: 'error', or 'skip' to leave out clips with a file that cannot be used.
    max_bad_clips: with 'skip': more of them are an error.
    progress: called with the clips that are done and their total.

  Returns:
    What prepared.json holds: format, settings, counts, tables, bad_clips, shards and clips.

  Raises:
    UserError: an argument is out of range; `root` is no data set; `out` holds something else or was
      begun with another value of an argument, or other clips; a clip is bad.
  """
  for name, value, low, high in (
    ('image_size', image_size, 1, prepared.MAX_SIZE),
    ('eval_size', eval_size, 1, prepared.MAX_SIZE), ('jpeg', jpeg, 0, 100),
    ('workers', workers, 1, 1024), ('clips_per_shard', clips_per_shard, 1, 100_000),
    ('max_bad_clips', max_bad_clips, 0, 10**9),
  ):  # fmt: skip
    if value is not None and not low <= value <= high:
      raise UserError(f'{name} is {value}: use {low} to {high}')
  if on_bad_clip not in ('error', 'skip'):
    raise UserError(f"on_bad_clip is {on_bad_clip!r}: use 'error' or 'skip'")
  clips = read_index(root)
  prepared.require_files(clips)
  out = epath.Path(out)
  settings = Settings(image_size, eval_size, f'jpeg {jpeg}' if jpeg else prepared.LOSSLESS)
  claim = {
    'format': prepared.FORMAT,
    'settings': dataclasses.asdict(settings),
    'clips_per_shard': clips_per_shard,
    'index': hashlib.sha256(json.dumps([clip.name for clip in clips]).encode()).hexdigest(),
  }
  with files.alone_in(out):
    _claim_folder(out, claim, root)
    plan = _plan(clips, clips_per_shard)
    write = functools.partial(_write_shard, out=out, settings=settings, skip=on_bad_clip == 'skip')
    shards, bad_clips, done = {}, [], 0
    with contextlib.closing(_run(write, plan, workers)) as results:
      for shard in results:
        shards[shard['file']] = shard
        bad_clips += shard['bad_clips']
        if len(bad_clips) > max_bad_clips:
          raise UserError(
            f'{len(bad_clips)} clips or more cannot be used, but max_bad_clips is {max_bad_clips}: '
            f'mend them (`aavs check-data` lists all faults) or raise it; one is '
            f'{bad_clips[0]["text"]}'
          )
        done += len(plan[shard['file']])
        if progress:
          progress(done, len(clips))

    tables = sorted({clip.table for clip in clips})
    for table in tables:
      with files.writing(out / os.path.basename(table)) as file:
        shutil.copyfile(table, file)
    manifest = claim | {'tables': [os.path.basename(table) for table in tables]}
    manifest |= _contents(clips, [shards[name] for name in plan])
    files.write_json(out / MANIFEST, manifest)
    (out / _CLAIM).unlink(missing_ok=True)
    return manifest


def _claim_folder(out: epath.Path, claim: dict, root: str | os.PathLike) -> None:
  """Notes in the folder what it is for, or compares."""
  note = next((out / name for name in (MANIFEST, _CLAIM) if (out / name).exists()), None)
  if note is None:
    there = out.iterdir() if out.is_dir() else ()  # a bucket has no empty folders
    if any(path.suffix != files.UNFINISHED for path in there):
      raise UserError(
        f'{out} holds something, but no {MANIFEST}: name a new or empty folder for the shards'
      )
    files.write_json(out / _CLAIM, claim)
  else:
    shape = {'settings': prepared.SETTINGS, ...: object}
    begun = files.read_json(note, shape, 'remove the folder or name another one')
    old = {**begun, **begun['settings']}
    for key, value in {**claim, **claim['settings']}.items():
      if key == 'settings' or old.get(key) == value:
        continue
      was = 'other clips' if key == 'index' else f'{key} {old.get(key)!r}'
      now = f'those of {root}' if key == 'index' else repr(value)
      raise UserError(
        f'{out} was begun with {was}, not {now}: name another folder, or remove this one'
      )


def _plan(clips: Sequence[Clip], clips_per_shard: int) -> dict[str, list[Clip]]:
  """The clips of each shard, by its name."""
  plan = {}
  for split in SPLITS:
    chosen = [clip for clip in clips if clip.split == split]
    count = -(-len(chosen) // clips_per_shard)
    for i in range(count):
      name = f'{split}-{i:05}-of-{count:05}.array_record'
      plan[name] = chosen[i * clips_per_shard : (i + 1) * clips_per_shard]
  return plan


def _run(write: Callable, plan: dict[str, list[Clip]], workers: int | None) -> Iterator[dict]:
  """What `write` returns for each shard, as they are done."""
  workers = min(workers or host.cores(), len(plan))
  if workers == 1:
    yield from (write(*part) for part in plan.items())
    return
  executor = concurrent.futures.ProcessPoolExecutor(
    workers, multiprocessing.get_context('spawn'), _begin_worker
  )
  try:
    futures = [executor.submit(write, *part) for part in plan.items()]
    for future in concurrent.futures.as_completed(futures):
      yield future.result()
  except concurrent.futures.process.BrokenProcessPool as error:
    raise UserError(
      'a process that wrote shards was killed, for lack of memory perhaps: run the same command '
      'again, with fewer --workers'
    ) from error
  finally:
    executor.shutdown(cancel_futures=True)


def _begin_worker() -> None:
  cv2.setNumThreads(1)
  signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C: this process has no more to say

  def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # the parent was killed; what is half-written goes when it is started again

  threading.Thread(target=end_with_parent, daemon=True).start()


def _write_shard(
  name: str, clips: Sequence[Clip], *, out: epath.Path, settings: Settings, skip: bool
) -> dict:
  """Writes one shard, unless it is there already, and returns what its JSON file says."""
  note = (out / name).with_suffix('.json')
  there = _read_finished(out / name, note, [clip.name for clip in clips])
  if there and not there['bad_clips']:  # which may have been mended since
    return there
  good, bad = [], []
  with files.writing(out / name) as file:
    try:
      writer = ArrayRecordWriter(str(file), 'group_size:1,zstd:3')
      for clip in clips:
        try:
          arrays = clip_arrays(clip, settings.image_size, settings.eval_size)
        except UserError as error:
          if not skip:
            raise
          bad.append({'clip': clip.name, 'text': str(error)})
          continue
        for record in prepared.encode_clip(arrays, settings.frames):
          writer.write(record)
        good.append(clip.name)
      writer.close()
    except RuntimeError as error:
      raise prepared.system_error(error, str(out / name)) from error
    shard = {'file': name, 'bytes': file.stat().st_size, 'sha256': files.digest(file)}
  shard |= {'clips': good, 'bad_clips': bad}
  files.write_json(note, shard)
  return shard


def _read_finished(path: epath.Path, note: epath.Path, names: Sequence[str]) -> dict | None:
  """What the JSON file of a shard says, if both are there and agree; `names` are of its clips."""
  try:
    shard = files.read_json(note, _NOTE, 'write it anew')
  except UserError:
    return None
  bad = {row['clip'] for row in shard['bad_clips']}
  if shard['file'] != path.name or shard['clips'] != [name for name in names if name not in bad]:
    return None
  if not path.exists() or path.stat().length != shard['bytes']:
    return None
  # A bucket's objects are whole, and to read them all again would take hours.
  return shard if '://' in str(path) or files.digest(path) == shard['sha256'] else None


def _contents(clips: Sequence[Clip], shards: Sequence[dict]) -> dict:
  """The part of the manifest that tells what is where."""
  by_name = {clip.name: clip for clip in clips}
  place = {}
  for shard in shards:
    position = 0
    for name in shard['clips']:
      place[name] = shard['file'], position
      position += 1 + by_name[name].num_frames
  there = [clip for clip in clips if clip.name in place]
  number = collections.Counter((clip.split, clip.subset) for clip in there)
  frames = collections.Counter()
  for clip in there:
    frames[clip.split, clip.subset] += clip.num_frames
  return {
    'counts': [
      {'split': split, 'subset': subset, 'clips': number[split, subset], 'frames': total}
      for (split, subset), total in frames.items()
    ],
    'bad_clips': [row for shard in shards for row in shard['bad_clips']],
    'shards': [{key: shard[key] for key in ('file', 'bytes', 'sha256')} for shard in shards],
    'clips': [
      {
        'subset': clip.subset,
        'uid': clip.uid,
        'split': clip.split,
        'num_frames': clip.num_frames,
        'label_kind': clip.data_set.label_kind,
        'category': clip.category,
        'shard': place[clip.name][0],
        'position': place[clip.name][1],
      }
      for clip in there
    ],
  }
