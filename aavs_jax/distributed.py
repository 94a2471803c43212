"""Several processes, one run: each drives its own devices and reads its own share of the input."""

import os
import sys

import jax
from orbax.checkpoint import multihost

from input_pipeline.errors import UserError

_PATIENCE = 1800  # seconds between the first and the last process, one of which may compile


def start(where: str) -> None:
  """Joins the processes of a run; to be called before anything touches a device.

  Args:
    where: 'auto' on Cloud TPU, Slurm, GKE and Open MPI, where JAX finds the others itself; else
      'HOST:PORT,PROCESSES,INDEX' with the address of process 0, how many there are, which this is.

  Only the first process keeps its standard output, all keep their standard error.

  Raises:
    UserError: the others cannot be found or `where` is none of both.
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
    raise UserError(
      f'--distributed {where} found no other processes ({" ".join(str(error).split())[:200]}): '
      'give HOST:PORT,PROCESSES,INDEX with the address of process 0 where JAX cannot know them'
    ) from error
  if not is_first():
    sys.stdout = open(os.devnull, 'w')


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
