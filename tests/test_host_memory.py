"""Memory that is freed stays with a process that computes on the host's processors."""

import ctypes
import os
import subprocess
import sys

import pytest

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
  run = subprocess.run(
    [sys.executable, '-c', MADE],
    env=os.environ | {'JAX_PLATFORMS': platforms},
    capture_output=True,
    text=True,
    check=True,
  )
  made = int(run.stdout.split()[-1])
  assert made < 10 if kept else made > 100
