"""A prepared data set: shards that take the place of its JPEG, PNG and WAV files.

FOLDER/prepared.json                       what it holds and how it was made; see read_index
FOLDER/SPLIT-00000-of-00012.array_record   the clips; prepare.py writes them
FOLDER/SPLIT-00000-of-00012.json           bytes, SHA-256 and clips of the shard
FOLDER/metadata.csv                        or the other tables of the data set, as they were

A clip is 1 + num_frames records in a row, each compressed (zstd) and check-summed on its own by
ArrayRecord, so that an item reads what it needs and no more. The first is the sound, float32
[num_frames, 96, 64]. Each of the others is one frame: if it has a label, its class ids at
image_size and at eval_size, uint8, and the binary metric's ground truth, one bit a pixel; then the
image, see encode_frame.
"""

import dataclasses
import errno
import functools
import io
import math
import os
import pathlib
import re
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from . import audio, files
from .clips import Clip, DataSet, check_name, check_split, check_subset
from .errors import UserError, of_disk
from .host import keep_records

MANIFEST = 'prepared.json'
FORMAT = 1  # of the shards; to be raised when the raw path gives other pixels, ids or log-mel
LOSSLESS = 'lossless'
MAX_SIZE = 4096  # of a side, in pixels


_SHARD = r'(train|val|test)-\d{5}-of-\d{5}\.array_record'
_FRAMES = r'lossless|jpeg ([1-9]\d?|100)'
SETTINGS = {'image_size': int, 'eval_size': int, 'frames': str}
BAD_CLIPS = [{'clip': str, 'text': str}]
_SHAPE = {  # of the manifest, see files.require_shape
  'format': int,
  'settings': SETTINGS,
  'clips_per_shard': int,
  'index': str,
  'tables': [str],
  'counts': [{'split': str, 'subset': str, 'clips': int, 'frames': int}],
  'bad_clips': BAD_CLIPS,
  'shards': [{'file': str, 'bytes': int, 'sha256': str}],
  'clips': [
    {
      'subset': str,
      'uid': str,
      'split': str,
      'num_frames': int,
      'label_kind': str,
      'category': str,
      'shard': str,
      'position': int,
    }
  ],
}

_AGAIN = 'run `aavs prepare` again, which writes damaged shards anew'


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the content of shards depends on, beside the data set.

  Attributes:
    image_size: side of frames and labels, as config.data.image_size.
    eval_size: side of metric targets and priors, as config.data.eval_size.
    frames: 'lossless', or 'jpeg 95' and the like.
  """

  image_size: int
  eval_size: int
  frames: str = LOSSLESS


@dataclasses.dataclass(frozen=True)
class PreparedClip(Clip):
  """One clip of a prepared data set. It has no files of its own.

  Attributes:
    raw: the clip as if it had been read from the tables in this folder.
    shard: name of the file that holds it.
    shard_bytes: length of that file.
    position: of its first record there.
    settings: of the whole folder.
  """

  _: dataclasses.KW_ONLY
  raw: Clip
  shard: str
  shard_bytes: int
  position: int
  settings: Settings

  @property
  def data_set(self) -> DataSet:
    return self.raw.data_set

  @property
  def table(self) -> str:
    return self.raw.table

  @property
  def labelled_frames(self) -> tuple[int, ...]:
    return self.raw.labelled_frames

  @property
  def skipped_if_silent(self) -> bool:
    return self.raw.skipped_if_silent

  @property
  def folder(self) -> str:
    require_files([self])

  @property
  def shard_path(self) -> str:
    return os.path.join(self.root, self.shard)


def frames_of(clip: Clip) -> str:
  """'lossless', also of raw files, or 'jpeg 95' and the like."""
  return clip.settings.frames if isinstance(clip, PreparedClip) else LOSSLESS


def require_files(clips: Sequence[Clip]) -> None:
  """Raises UserError for prepared clips, where the images themselves are needed."""
  for clip in clips:
    if isinstance(clip, PreparedClip):
      raise UserError(
        f'{clip.root} holds prepared shards, which `aavs train`, masks, eval and bench read: give '
        'the data set that they were made of'
      )


def require_sizes(clips: Sequence[Clip], image_size: int, eval_size: int) -> None:
  """Raises UserError, naming the key, if clips were prepared for a config of other sizes."""
  for settings in {clip.settings for clip in clips if isinstance(clip, PreparedClip)}:
    for key, wanted in (('image_size', image_size), ('eval_size', eval_size)):
      if getattr(settings, key) != wanted:
        root = next(clip.root for clip in clips if isinstance(clip, PreparedClip))
        raise UserError(
          f'config.data.{key} is {wanted}, but {root} was prepared with {getattr(settings, key)}: '
          f'run `aavs prepare` with --{key.replace("_", "-")} {wanted}, or train on the raw data'
        )


def is_prepared(root: str) -> bool:
  return files.is_there(os.path.join(root, MANIFEST))


def left_out(root: str, split: str) -> int:
  """How many clips of a split are not in the shards, as they were bad when these were made."""
  if not is_prepared(root):
    return 0
  shape = {'bad_clips': BAD_CLIPS, ...: object}
  bad = files.read_json(pathlib.Path(root, MANIFEST), shape, _AGAIN)['bad_clips']
  return sum(row['clip'].startswith(f'{split}/') for row in bad)


def read_manifest(root: str, kinds: Sequence[type[Clip]]) -> tuple[dict, type[Clip]]:
  """What prepared.json holds, every field of it checked, and which of `kinds` its clips are.

  Raises:
    UserError: it is damaged or of another version.
  """
  path = pathlib.Path(root, MANIFEST)
  manifest = files.read_json(path, {'format': int, ...: object}, _AGAIN)
  if manifest['format'] != FORMAT:
    raise UserError(
      f'{path} is of format {manifest["format"]}, and this version reads {FORMAT}: prepare the '
      'data set anew in another folder'
    )
  files.require_shape(path, manifest, _SHAPE, _AGAIN)

  def need(ok, key, value, expected):
    if not ok:
      raise UserError(f'{path}: {key} is {value!a}, not {expected}: {_AGAIN}')

  tables = manifest['tables']
  kind = next((kind for kind in kinds if tables and {*tables} <= {*kind.data_set.tables}), None)
  known = ', '.join(name for kind in kinds for name in kind.data_set.tables)
  need(kind, 'tables', tables, f'those of one data set ({known})')
  settings = manifest['settings']
  for key in ('image_size', 'eval_size'):
    need(1 <= settings[key] <= MAX_SIZE, f'settings.{key}', settings[key], f'1 to {MAX_SIZE}')
  frames = settings['frames']
  need(re.fullmatch(_FRAMES, frames), 'settings.frames', frames, f'{LOSSLESS} or jpeg 1 to 100')
  end = {}  # of each shard, in records
  for i, shard in enumerate(manifest['shards']):
    key, name = f'shards[{i}]', shard['file']
    need(re.fullmatch(_SHARD, name) and name not in end, f'{key}.file', name, 'a name of its own')
    end[name] = 0
  seen = set()
  for i, clip in enumerate(manifest['clips']):
    key, subset = f'clips[{i}]', clip['subset']
    check_subset(f'{path}: {key}', 'subset', subset, kind.data_set)
    check_name(f'{path}: {key}', 'uid', clip['uid'])
    need((subset, clip['uid']) not in seen, f'{key}.uid', clip['uid'], 'a uid of its own')
    seen.add((subset, clip['uid']))
    check_split(f'{path}: {key}', clip['split'])
    for name, value in (
      ('num_frames', kind.data_set.subsets[subset]),
      ('label_kind', kind.data_set.label_kind),
    ):
      need(clip[name] == value, f'{key}.{name}', clip[name], value)
    if clip['category']:
      check_name(f'{path}: {key}', 'category', clip['category'])
    shard = clip['shard']
    own = shard in end and shard.startswith(f'{clip["split"]}-')
    need(own, f'{key}.shard', shard, f'a shard of {clip["split"]}')
    need(clip['position'] == end[shard], f'{key}.position', clip['position'], end[shard])
    end[shard] += 1 + clip['num_frames']
  return manifest, kind


def read_index(root: str, kinds: Sequence[type[Clip]]) -> list[PreparedClip]:
  """All clips of a prepared data set, in the order of the tables of the one it was made of.

  Raises:
    UserError: prepared.json is damaged, or a shard is missing or of another length than it says.
  """
  manifest, kind = read_manifest(root, kinds)
  lengths = {shard['file']: shard['bytes'] for shard in manifest['shards']}
  for shard in manifest['shards']:
    path = os.path.join(root, shard['file'])
    length = os.path.getsize(path) if files.is_there(path) else 'no'
    if length != shard['bytes']:
      raise UserError(f'{path} has {length} of {shard["bytes"]} bytes: {_AGAIN}')
  settings = Settings(**manifest['settings'])
  fields = [field.name for field in dataclasses.fields(Clip) if field.name != 'root']
  clips = []
  for row in manifest['clips']:
    raw = kind(root, **{name: row[name] for name in fields})
    place = {'shard': row['shard'], 'position': row['position'], 'settings': settings}
    place['shard_bytes'] = lengths[row['shard']]
    clips.append(PreparedClip(**vars(raw), raw=raw, **place))
  return clips


def encode_frame(frame: np.ndarray, frames: str) -> bytes:
  """An image, uint8 [s, s, 3] RGB, as its record has it; `frames` as in Settings.

  Lossless: green, red - green and blue - green, row by row, each less the row above it (modulo
  256) in one of eight bands, which zstd then compresses. Of photographs of 384x384 that makes 192
  kB and takes 1.2 ms to read, where raw pixels make 338 kB and take 0.8 ms, PNG 222 to 254 kB and 3
  to 6 ms, and lossless WebP 148 to 173 kB and 3 to 5 ms (a 2-core AMD EPYC VM, one thread).
  """
  if frames != LOSSLESS:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, 'JPEG', quality=int(frames.removeprefix('jpeg ')))
    return file.getvalue()
  green = frame[..., 1]
  planes = np.stack([green, frame[..., 0] - green, frame[..., 2] - green], axis=1)
  bands = _bands(planes)
  bands[:, 1:] -= bands[:, :-1].copy()
  return planes.tobytes()


def decode_frame(data: memoryview | bytes, size: int, frames: str) -> np.ndarray:
  """The image of `encode_frame`, uint8 [size, size, 3]. Raises ValueError if it is none."""
  if frames != LOSSLESS:
    with Image.open(io.BytesIO(data), formats=('JPEG',)) as image:
      return np.array(image).reshape(size, size, 3)
  planes = np.frombuffer(data, np.uint8).reshape(size, 3, size).copy()
  bands = _bands(planes)
  for row in range(1, bands.shape[1]):  # np.cumsum takes six times as long
    bands[:, row] += bands[:, row - 1]
  planes[:, 1:] += planes[:, :1]
  return cv2.merge([planes[:, 1], planes[:, 0], planes[:, 2]])


def _bands(planes: np.ndarray) -> np.ndarray:
  """[size, 3, size] as up to eight bands of rows, which are decoded side by side."""
  size = len(planes)
  return planes.reshape(math.gcd(size, 8), -1, 3 * size)


def encode_clip(arrays: dict[str, np.ndarray], frames: str) -> list[bytes]:
  """The records of a clip; `arrays` as of prepare.clip_arrays."""
  records = [arrays['log_mel'].tobytes()]
  label = {int(t): place for place, t in enumerate(arrays['labelled'])}
  for t, frame in enumerate(arrays['frames']):
    parts = []
    if t in label:
      names = ('label_ids', 'label_ids_eval')
      parts = [arrays[name][label[t]].tobytes() for name in names]
      parts.append(np.packbits(arrays['metric_target'][label[t]]).tobytes())
    records.append(b''.join(parts) + encode_frame(frame, frames))
  return records


def read_log_mel(clip: PreparedClip) -> np.ndarray:
  """The clip's sound, float32 [num_frames, 96, 64]. Raises UserError for a damaged shard."""
  shape = (clip.num_frames, audio.EXAMPLE_FRAMES, audio.MEL_BANDS)
  return _read(clip, 0, lambda data: np.frombuffer(data, np.float32).reshape(shape))


@dataclasses.dataclass(frozen=True)
class FrameRecord:
  """A frame, read but for its image, which is decoded where it is asked for; see Reader."""

  label_ids: dict[int, np.ndarray]  # by size; empty where there is no label
  metric_target: np.ndarray | None
  image: Callable[[], np.ndarray]


def read_frame(clip: PreparedClip, t: int) -> FrameRecord:
  """The record of frame t. Raises UserError for a damaged shard, also where the image shows it."""
  size, eval_size = clip.settings.image_size, clip.settings.eval_size

  def parse(data):
    if t not in clip.labelled_frames:
      return {}, None, data
    pixels, eval_pixels = size * size, eval_size * eval_size
    of_eval, of_target = pixels + eval_pixels, pixels + eval_pixels + -(-eval_pixels // 8)
    array = np.frombuffer(data, np.uint8)
    ids = {
      eval_size: array[pixels:of_eval].reshape(eval_size, eval_size),
      size: array[:pixels].reshape(size, size),
    }
    target = np.unpackbits(array[of_eval:of_target], count=eval_pixels).view(bool)
    return ids, target.reshape(eval_size, eval_size), array[of_target:].data

  ids, target, data = _read(clip, 1 + t, parse)
  decode = functools.partial(decode_frame, size=size, frames=clip.settings.frames)
  return FrameRecord(ids, target, lambda: _decode(clip, decode, data))


_ERRORS = {os.strerror(number): number for number in errno.errorcode}  # numbers by text


def system_error(error: RuntimeError, path: str) -> Exception:
  """What the system said to ArrayRecord, as an OSError; the error itself if it said nothing."""
  failed = re.match(r'\w+\(\) failed: ([^;]+)', str(error))  # a function of the system's
  if failed and failed[1] in _ERRORS:
    return OSError(_ERRORS[failed[1]], failed[1], path)
  return error


def _read(clip: PreparedClip, record: int, parse: Callable):
  stamp = _stamp(clip.shard_path)
  if stamp and stamp[-1] != clip.shard_bytes:  # its clips may be at other positions now
    raise UserError(
      f'{clip.shard_path} had {clip.shard_bytes} bytes when this command began and has {stamp[-1]} '
      f'now: if it is damaged, {_AGAIN}; start this command again'
    )
  try:
    (data,) = _open(clip.shard_path, stamp).read([clip.position + record])
  except RuntimeError as error:  # of every kind of damage, and of a disk that fails
    of_system = system_error(error, clip.shard_path)
    if of_disk(of_system):
      raise of_system from error
    raise _damaged(clip, error) from error
  return _decode(clip, parse, data)


def _decode(clip: PreparedClip, decode: Callable, data):
  try:
    return decode(data)
  except (ValueError, OSError, SyntaxError) as error:
    raise _damaged(clip, error) from error


def _damaged(clip: PreparedClip, error: Exception) -> UserError:
  reason = ' '.join(str(error).split())[:200]
  return UserError(f'{clip.shard_path}: {clip.key} cannot be read ({reason}): {_AGAIN}')


def _stamp(path: str) -> tuple[int, int, int] | None:
  """What tells a shard from one that was there before under its name."""
  try:
    found = os.stat(path)
  except OSError:  # which its reader will say
    return None
  return found.st_ino, found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=256)
def _open(path: str, stamp: tuple[int, int, int] | None) -> ArrayRecordReader:
  keep_records()
  # Threads may share it. Clips are read in random order: what comes after one is not wanted.
  return ArrayRecordReader(path, 'readahead_buffer_size:0')
