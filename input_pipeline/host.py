"""The host's memory, where JAX computes on the host's processors."""

import ctypes
import importlib.util
import os

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed() -> None:
  """Lets the process keep, in one arena, what it frees, if JAX can have the host's processors only.

  Otherwise glibc hands a step's arrays back to the kernel, which fills the pages with zeros when
  the next step asks for them, and each of XLA's threads has an arena that keeps what it has freed
  from the others. Before JAX starts its threads; with another C library nothing changes.
  """
  platforms = os.environ.get('JAX_PLATFORMS')
  if platforms:
    alone = platforms == 'cpu'
  else:
    alone = not any(importlib.util.find_spec(name) for name in ('libtpu', 'jax_plugins'))
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if alone and mallopt:
    mallopt(_ARENA_MAX, 1)
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)


def give_back_freed() -> None:
  """Hands what is free to the kernel: after a compilation of the published size a gigabyte."""
  malloc_trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if malloc_trim:
    malloc_trim(0)
