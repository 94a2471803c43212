"""What is freed stays with a process that computes on the host's processors, until it is handed
back.
"""

import ctypes
import os
import subprocess
import sys

import pytest


def _megabytes(code: str, platforms: str) -> int:
  """What a process of its own prints last."""
  run = subprocess.run(
    [sys.executable, '-c', code],
    env=os.environ | {'JAX_PLATFORMS': platforms},
    capture_output=True,
    text=True,
    check=True,
  )
  return int(run.stdout.split()[-1])


# MB of pages that the kernel makes for 128 MB, the second time that they are asked for.
MADE = """
import ctypes, resource
from aavs_jax import cli
cli.main(['check-data', 'nowhere'])
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, of which one fault makes 512
for _ in range(2):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  b'1' * 2**27
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults * resource.getpagesize() // 2**20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'mallopt'), reason='of glibc')
@pytest.mark.parametrize(('platforms', 'kept'), [('cpu', True), ('cuda', False)])
def test_a_command_on_cpus_keeps_what_it_frees(platforms, kept):
  made = _megabytes(MADE, platforms)
  assert made < 10 if kept else made > 100


# The same with a shard opened before, for which a process that does not keep all keeps 64 MB.
MADE_WITH_SHARDS = MADE.replace('for _', 'host.keep_records()\nfor _').replace(
  'from aavs_jax import cli', 'from aavs_jax import cli\nfrom aavs_jax.input_pipeline import host'
)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'mallopt'), reason='of glibc')
def test_reading_shards_does_not_end_that():
  assert _megabytes(MADE_WITH_SHARDS, 'cpu') < 10


# MB of memory before and after the freed half of 400 MB is handed back.
HANDED_BACK = """
import ctypes, resource
from aavs_jax.input_pipeline import host
def resident():
  pages = int(open('/proc/self/statm').read().split()[1])
  return pages * resource.getpagesize() // 2**20
host.keep_freed()
blocks = [b'1' * 100_000 for _ in range(4000)]
del blocks[1000:3000]
before = resident()
host.give_back_freed()
print(before - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'malloc_trim'), reason='of glibc')
def test_what_is_free_is_handed_back():
  assert 150 < _megabytes(HANDED_BACK, 'cpu') < 250
