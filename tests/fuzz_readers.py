"""Damages files byte by byte and reads them: `python -m tests.fuzz_readers ROOT ROUNDS`.

A process of its own, so that its memory can be limited. ROOT is a data set of one clip. Prints, as
JSON, how many damaged files of each kind were read and how many refused; ends with a traceback at
the first one that is neither, that takes twenty seconds or a gigabyte of memory.
"""

import json
import pathlib
import resource
import signal
import sys
import zlib

import numpy as np

from aavs_jax.input_pipeline import audio
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.images import load_frame, load_label_ids, read_mask
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.input_pipeline.reader import load_log_mel

_SECONDS, _MEMORY = 20, 1 << 30


def _damage(rng: np.random.Generator, good: bytes) -> bytes:
  """Up to eight bytes changed, most of them near the start; at times bytes lost or doubled."""
  bad = bytearray(good)
  reach = rng.choice([60, 400, len(good)])
  for place in rng.integers(0, min(reach, len(good)), rng.integers(1, 9)):
    bad[place] = rng.integers(0, 256) if rng.random() < 0.6 else rng.choice([0, 1, 127, 128, 255])
  kind = rng.random()
  if kind < 0.15:
    del bad[rng.integers(0, len(bad)) :]
  elif kind < 0.25:
    first = rng.integers(0, len(bad))
    bad[first:first] = bad[first : first + rng.integers(1, 200)]
  if good.startswith(b'\x89PNG') and rng.random() < 0.7:
    _renew_checksums(bad)  # which would give the damage away before it does any
  return bytes(bad)


def _renew_checksums(png: bytearray) -> None:
  start = 8
  while True:
    end = start + 8 + int.from_bytes(png[start : start + 4])
    if end + 4 > len(png):
      return
    png[end : end + 4] = zlib.crc32(png[start + 4 : end]).to_bytes(4)
    start = end + 4


def _check_frame(clip):
  frame = load_frame(clip, 1, 32)
  assert frame.dtype == np.uint8 and frame.shape == (32, 32, 3)


def _check_ids(clip):
  ids = load_label_ids(clip, 0)
  assert ids.dtype == np.uint8 and ids.ndim == 2 and ids.size
  assert ((ids <= 70) | (ids == 255)).all()


def _check_mask(path):
  ids, doubtful = read_mask(path)
  assert ids.dtype == np.uint8 and ids.ndim == 2 and set(np.unique(ids)) <= {0, 1}
  assert 0 <= doubtful <= ids.size / 2


def _check_sound(clip):
  log_mel = load_log_mel(clip)
  assert log_mel.dtype == np.float32 and log_mel.shape == (clip.num_frames, 96, 64)
  assert np.isfinite(log_mel).all()


def _check_index(root):
  for clip in read_index(root):
    assert clip.subset in ('v1s', 'v1m', 'v2') and clip.split in ('train', 'val', 'test')
    assert clip.num_frames == (10 if clip.subset == 'v2' else 5)
    home = pathlib.PurePath(root, clip.subset)
    assert pathlib.PurePath(clip.frame_path(0)).parents[2] == home and '..' not in clip.uid


def _fuzz(rng, path, read, rounds):
  good = pathlib.Path(path).read_bytes()
  counts = {'read': 0, 'refused': 0}
  for _ in range(rounds):
    pathlib.Path(path).write_bytes(_damage(rng, good))
    signal.alarm(_SECONDS)
    try:
      read()
      counts['read'] += 1
    except UserError as error:
      assert str(path) in str(error) and '\n' not in str(error), error
      counts['refused'] += 1
    signal.alarm(0)
  pathlib.Path(path).write_bytes(good)
  return counts


def main(root: str, rounds: int) -> None:
  clip = read_index(root)[0]
  audio.resample(np.zeros(100, np.float32), 8000)  # imports the resampler before memory is limited
  size = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, size + _MEMORY))
  rng = np.random.default_rng(0)
  mask = clip.label_ids_path(2)
  result = {
    'jpg': _fuzz(rng, clip.frame_path(1), lambda: _check_frame(clip), rounds),
    'png': _fuzz(rng, clip.label_ids_path(0), lambda: _check_ids(clip), rounds),
    'mask': _fuzz(rng, mask, lambda: _check_mask(mask), rounds),
    'wav': _fuzz(rng, clip.audio_path, lambda: _check_sound(clip), rounds),
    'csv': _fuzz(rng, clip.table, lambda: _check_index(root), rounds),
  }
  print(json.dumps(result))


if __name__ == '__main__':
  main(sys.argv[1], int(sys.argv[2]))
