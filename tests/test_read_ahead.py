"""Loader processes: the same stream, the same errors, and an end with the process they serve."""

import dataclasses
import gc
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from grain.multiprocessing import SharedMemoryArray

from aavs_jax.input_pipeline import pipeline, read_ahead
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.input_pipeline.items import Task

ROOT = Path(__file__).parents[1]
TASK = Task(True, 71, 32, 32, 4, True, '')


def _open(clips, workers, **changes):
  options = dict(item_frames=0, batch_items=2, seed=3, start=1, threads=1) | changes
  return pipeline.training_batches(clips, TASK, workers=workers, **options)


@pytest.mark.parametrize('workers', [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_stream_is_the_same_for_any_number_of_workers(data_root, workers):
  clips = read_index(data_root, 'train')
  expected = list(itertools.islice(_open(clips, 0), 9))
  stream = _open(clips, workers)
  found = list(itertools.islice(stream, 9))
  stream.close()
  for batch, same in zip(found, expected, strict=True):
    assert batch.keys() == same.keys()
    assert all(np.array_equal(batch[name], same[name]) for name in same)


def test_a_stream_ends_no_process_but_its_own(data_root):
  clips = read_index(data_root, 'train')
  first, second = (_open(clips, 1) for _ in range(2))
  next(first), next(second)
  first.close()
  found = list(itertools.islice(second, 4))
  second.close()
  for batch, same in zip(found, itertools.islice(_open(clips, 0), 1, 5), strict=True):
    assert np.array_equal(batch['frames'], same['frames'])


def test_a_fault_of_the_data_is_the_same_error_as_without_workers(data_root, tmp_path):
  clip = read_index(data_root, 'train', ['v1m'])[0]
  shutil.copytree(clip.folder, tmp_path / clip.subset / clip.uid)
  clip = dataclasses.replace(clip, root=str(tmp_path))
  Path(clip.frame_path(2)).write_bytes(b'no image')
  texts = []
  for workers in (0, 1):
    with pytest.raises(UserError) as error:
      next(_open([clip], workers, batch_items=1))
    texts.append(str(error.value))
  assert texts[0] == texts[1] and clip.frame_path(2) in texts[0]


def test_all_shared_memory_is_freed_when_the_wait_for_it_ends():
  SharedMemoryArray.enable_async_del()
  arrays = [SharedMemoryArray((4,), np.uint8) for _ in range(200)]  # more than grain's queue holds
  files = [Path('/dev/shm', array.shm.name.lstrip('/')) for array in arrays]
  for array in arrays:
    array.unlink_on_del()
  del array
  arrays.clear()
  read_ahead._wait_for_shared_memory()
  assert not any(file.exists() for file in files)


class _Slow:
  def __init__(self, log):
    self.cycle, self.log = self, log

  def __del__(self):
    time.sleep(0.3)
    self.log.append('freed')


def test_collecting_waits_for_what_another_thread_collects():
  log = []
  _Slow(log)
  other = threading.Thread(target=gc.collect)
  other.start()
  time.sleep(0.15)
  read_ahead._collect()
  assert log == ['freed']
  other.join()


def test_a_loader_that_is_killed_may_live_the_next_time(data_root):
  stream = _open(read_index(data_root, 'train'), 1)
  next(stream)
  for worker in multiprocessing.active_children():
    worker.kill()
  with pytest.raises(OSError, match=r'data\.workers=1: one of the loader processes died'):
    for _ in range(20):  # more than was read ahead
      next(stream)


_READER = """
import itertools, multiprocessing, os, signal, sys, time
from aavs_jax.input_pipeline.index import read_index
from tests.test_read_ahead import _open

if __name__ == '__main__':
  noted = []
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: noted.append(number))
  stream = _open(read_index(sys.argv[1], 'train'), 2)
  next(stream)
  print(*[child.pid for child in multiprocessing.active_children()], flush=True)
  while len(noted) < 2:
    next(stream)
    time.sleep(0.01)
  for _ in range(20):  # more than was read ahead
    next(stream)
  print('goes on', flush=True)
  if sys.argv[2] == 'wait':
    time.sleep(60)
  stream.close()
"""


@pytest.mark.parametrize('end', ['close', 'wait'])
def test_workers_outlive_signals_to_the_group_but_not_the_process_they_serve(data_root, end):
  process = subprocess.Popen(
    [sys.executable, '-c', _READER, data_root, end],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    start_new_session=True,
  )
  workers = [int(number) for number in process.stdout.readline().split()]
  assert len(workers) == 2
  for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C; a scheduler
    os.killpg(process.pid, number)
  assert process.stdout.readline() == 'goes on\n'
  if end == 'wait':
    process.kill()
    process.wait()
  else:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors == ''
  finish = time.monotonic() + 60
  while any(Path('/proc', str(worker)).exists() for worker in workers):
    assert time.monotonic() < finish, 'workers live on'
    time.sleep(0.05)
