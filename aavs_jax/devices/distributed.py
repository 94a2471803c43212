"""Several processes, one run: each drives its own devices and reads its own share of the input."""

import concurrent.futures
import hashlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from aavs_jax.input_pipeline.errors import UserError

_PATIENCE = 1800  # seconds between the first and the last process, one of which may compile
_LAST_WORDS = 10  # seconds for all to say the same error
_meetings = itertools.count()
_joined = False  # whether this process has found the others
_T = TypeVar('_T')


def start(where: str) -> None:
  """Joins the processes of a run; to be called before anything touches a device.

  Args:
    where: 'auto' on Cloud TPU, Slurm, GKE and Open MPI, where JAX finds the others itself; else
      'HOST:PORT,PROCESSES,INDEX' with the address of process 0, how many there are, which this is.

  Only the first process keeps its standard output, all keep their standard error.

  Raises:
    UserError: `where` is none of both.
    ConnectionError: the others cannot be found, now.
  """
  # JAX looks for the others outside Python, where no handler would run: a signal ends this at once.
  interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  # Processes on CPUs talk through gloo; accelerators have their own network.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    if where == 'auto':
      jax.distributed.initialize()
    else:
      address, processes, index = where.split(',')
      jax.distributed.initialize(address, int(processes), int(index))
  except (ValueError, RuntimeError) as error:
    text = f'--distributed {where} found no other processes ({" ".join(str(error).split())[:200]})'
    if isinstance(error, RuntimeError):  # a host that is late, after a preemption for example
      raise ConnectionError(f'{text}: start all of them again') from error
    raise UserError(
      f'{text}: give HOST:PORT,PROCESSES,INDEX with the address of process 0 where JAX cannot know '
      'them'
    ) from error
  global _joined
  _joined = True
  signal.signal(signal.SIGINT, interrupt)
  if not is_first():
    sys.stdout = open(os.devnull, 'w', errors='backslashreplace')  # of any name


def is_first() -> bool:
  """Whether this process is the one that writes what is written once."""
  return jax.process_index() == 0


def share(items: Sequence[_T]) -> Sequence[_T]:
  """Those that this process takes care of."""
  return items[jax.process_index() :: jax.process_count()]


def wait_for_all(what: str) -> None:
  """Returns when all processes have come here, in the same order of calls; `what` is for errors.

  Not by a collective of the devices, which on CPUs gives up after half a minute.
  """
  if jax.process_count() > 1:
    # In a thread, since this one would not hear a signal while it waits outside Python.
    executor = concurrent.futures.ThreadPoolExecutor(1)
    executor.submit(_meet, f'{next(_meetings)}, {what}', _PATIENCE).result()


def _meet(name: str, patience: int) -> None:
  multihost.sync_global_processes(name, timeout=patience, processes=set(range(jax.process_count())))


def all_gather(arrays: Any, tiled: bool = False) -> Any:
  """multihost_utils.process_allgather of a tree, for processes that come to it at any time."""
  wait_for_all('all_gather')
  return multihost_utils.process_allgather(arrays, tiled=tiled)


def gather(value: Any) -> list[Any]:
  """A JSON value of every process, in their order; all must call this, each at any time."""
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = all_gather(np.int32(len(text)))
  padded = np.pad(text, (0, max(sizes) - len(text)))
  rows = all_gather(padded)
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def require_same(facts: dict[str, Any]) -> None:
  """UserError on every process unless all call it with the same JSON values."""
  digests = {
    name: hashlib.sha256(json.dumps(fact).encode()).hexdigest() for name, fact in facts.items()
  }
  first, *others = gather(digests)
  for process, found in enumerate(others, 1):
    for name in sorted(first.keys() | found.keys()):  # one that has no start has no such fact
      if found.get(name) != first.get(name):
        raise UserError(
          f'process {process} finds another {name} than process 0: give all of them the same '
          'command, code and data, and a work folder that all see'
        )


def leave(status: int, patience: int = _LAST_WORDS) -> NoReturn:
  """Ends this process after an error or a signal, which the others may not know of.

  JAX's own end would wait for minutes for the others, who may wait for this one, and then abort
  with another status. Where all have met the same, all have `patience` seconds to say so and to
  end with their own status, before they miss the first process; the others end when they miss one.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  if not _joined:  # on TPUs already to ask how many they are would wait for them
    os._exit(status)
  try:
    _meet('leaving', patience)
  finally:
    if is_first():
      time.sleep(1)  # it serves the others, who abort if they miss it before they have ended
    os._exit(status)
