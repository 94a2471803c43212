"""Reading ahead: grain's threads, in this process or in loader processes."""

import concurrent.futures
import gc
import multiprocessing
import os
import queue
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from multiprocessing import resource_tracker

import grain
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray

from .errors import UserError

_OUTSIDE = (signal.SIGINT, signal.SIGTERM)  # from outside
_STOP = signal.SIGUSR1  # from the process that started a worker
_stopping = threading.Event()  # in a worker


def read_ahead(
  batches: grain.MapDataset, *, threads: int, workers: int
) -> Iterator[dict[str, np.ndarray]]:
  """All batches in order, read before they are asked for.

  Args:
    batches: the dataset; its functions must be picklable if there are workers.
    threads: that read, each a batch at a time; two batches a thread are kept ready.
    workers: processes with so many threads each, started by the first `next`; 0 = this one alone.
  """
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
  stream = batches.to_iter_dataset(options)
  if not workers:
    return iter(stream)
  if not flags.FLAGS.is_parsed():  # grain has flags of its own and reads them here
    flags.FLAGS.mark_as_parsed()
  # Every workers-th batch comes from the same process: the order does not depend on how many.
  return _from_workers(
    iter(
      stream.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
        worker_init_fn=_end_promptly,
      )
    ),
    workers,
  )


def unless_stopping(item):
  """The item, to be asked for before each is read: a worker stops between items, not batches."""
  if _stopping.is_set():
    raise RuntimeError('the stream is closed')
  return item


def _from_workers(batches, workers: int) -> Iterator[dict[str, np.ndarray]]:
  others, started, begun = set(multiprocessing.active_children()), set(), False
  try:
    # Ctrl-C and what ends a job reach all processes of a group, but it is up to this one when to
    # stop. So workers are started by a thread that blocks these signals, which they inherit.
    with concurrent.futures.ThreadPoolExecutor(1, initializer=_block_signals) as starter:
      first = starter.submit(next, batches)
      concurrent.futures.wait([first])
      started = set(multiprocessing.active_children()) - others
      batch = _own(first.result())
      del first  # which holds shared memory
    begun = True
    while True:
      yield batch
      batch = _own(next(batches))
  except RuntimeError as error:
    if 'terminated unexpectedly' not in str(error):
      raise
    text = str(error).partition('. ')[0]
    # What has gone well for a while may go on well when it is started again.
    raise (OSError if begun else UserError)(
      f'data.workers={workers}: one of the loader processes died ({text}): give the machine or '
      'container more memory, shared memory (/dev/shm) too, or set fewer of them or 0'
    ) from error
  finally:
    # All at once: `close` would let one after the other finish its batch.
    for worker in started.intersection(multiprocessing.active_children()):
      os.kill(worker.pid, _STOP)
    batches.close()
    del batches
    _collect()  # what was read ahead hangs in cycles, and in shared memory that long
    _wait_for_shared_memory()


def _own(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A copy, since arrays of workers lie in shared memory, which is scarce and outlives a crash."""
  return {name: np.array(value) for name, value in batch.items()}


def _collect() -> None:
  """`gc.collect` does nothing while another thread is at it: two runs, one of them begun here."""
  enough = gc.get_stats()[2]['collections'] + 2
  while gc.get_stats()[2]['collections'] < enough:
    gc.collect()


def _wait_for_shared_memory() -> None:
  """Grain frees shared memory in a thread, in order: the end of a process would overtake it.

  What does not fit that thread's queue is freed at once, and says nothing about the rest.
  """
  SharedMemoryArray.enable_async_del()
  freed_in = queue.SimpleQueue()
  while True:
    last = SharedMemoryArray((1,), np.uint8)
    last.unlink_on_del()
    weakref.finalize(last.shm, lambda: freed_in.put(threading.current_thread()))
    del last
    try:
      if freed_in.get(timeout=10) is not threading.current_thread():
        return
    except queue.Empty:  # that thread is gone, as the interpreter ends
      return
    time.sleep(0.001)


def _block_signals() -> None:
  resource_tracker.ensure_running()  # which, later on, would let them through again
  signal.pthread_sigmask(signal.SIG_BLOCK, _OUTSIDE)


def _end_promptly(index: int, count: int) -> None:
  """In a worker: has it end with the process that started it, which may have been killed.

  And when its work is over, where Python would first finish the batches that threads have begun.
  """
  signal.signal(_STOP, lambda *_: _stopping.set())
  for whatever in (multiprocessing.parent_process(), threading.main_thread()):
    threading.Thread(target=_exit_after, args=(whatever,), daemon=True).start()


def _exit_after(whatever) -> None:
  whatever.join()
  os._exit(1)  # not 0, which would tell a parent that still waits that all is well
