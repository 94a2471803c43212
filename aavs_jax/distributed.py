"""Several processes, one run: each drives its own devices and reads its own share of the input."""

import json
import os
import sys
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from aavs_jax.input_pipeline.errors import UserError

_PATIENCE = 1800  # seconds between the first and the last process, one of which may compile
_LAST_WORDS = 10  # seconds for all to say the same error


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
  if not is_first():
    sys.stdout = open(os.devnull, 'w', errors='backslashreplace')  # of any name


def is_first() -> bool:
  """Whether this process is the one that writes what is written once."""
  return jax.process_index() == 0


def wait_for_all(what: str) -> None:
  """Returns when all processes have come here; `what` must be another one at every call.

  Not by a collective of the devices, which on CPUs gives up after half a minute.
  """
  multihost.sync_global_processes(
    what, timeout=_PATIENCE, processes=set(range(jax.process_count()))
  )


def gather(value: Any) -> list[Any]:
  """A JSON value of every process, in their order; all must call this together."""
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(text)))
  padded = np.pad(text, (0, max(sizes) - len(text)))
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def leave(status: int) -> NoReturn:
  """Ends this process after an error, which the others may not know of.

  JAX's own end would wait for minutes for the others, who may wait for this one, and then abort
  with another status. Where all have met the same error, all have the time to say so.
  """
  sys.stderr.flush()
  try:
    multihost.sync_global_processes(
      'leaving', timeout=_LAST_WORDS, processes=set(range(jax.process_count()))
    )
  finally:
    os._exit(status)
