"""The host: its cores, and what the process keeps of the memory that it frees.

By default glibc hands large arrays back to the kernel, which fills the pages with zeros when the
next one asks for them. With another C library nothing changes.
"""

import ctypes
import importlib.util
import os

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8

_keeps_all = False


def cores() -> int:
  """How many this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def keep_freed() -> None:
  """Lets the process keep, in one arena, what it frees, if JAX can have the host's processors only.

  For the arrays of a step; and each of XLA's threads would have an arena that keeps what it has
  freed from the others. To be called before JAX starts its threads.
  """
  global _keeps_all
  platforms = os.environ.get('JAX_PLATFORMS')
  if platforms:
    alone = platforms == 'cpu'
  else:
    alone = not any(importlib.util.find_spec(name) for name in ('libtpu', 'jax_plugins'))
  _keeps_all = alone
  if alone:
    _set(_ARENA_MAX, 1)
    _set(_MMAP_MAX, 0)
    _set(_TRIM_THRESHOLD, -1)


def keep_records() -> None:
  """Lets the process keep up to 64 MB of what it frees, if it does not keep all.

  For the records of shards that it reads, each of which is freed before the next: fresh pages were
  1.4 of 2.1 ms.
  """
  if not _keeps_all:
    _set(_MMAP_THRESHOLD, 32 << 20)
    _set(_TRIM_THRESHOLD, 64 << 20)


def _set(option: int, value: int) -> None:
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt:
    mallopt(option, value)


def give_back_freed() -> None:
  """Hands what is free to the kernel: after a compilation of the published size a gigabyte."""
  malloc_trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if malloc_trim:
    malloc_trim(0)
