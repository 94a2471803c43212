"""Memory that is freed stays with a process that computes on the host's processors."""

import os
import subprocess
import sys

import pytest

# Thousands of page faults for 32 thousand pages, the second time that they are asked for.
FAULTS = """
import resource
from aavs_jax import cli
cli.main(['check-data', 'nowhere'])
for _ in range(2):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  b'1' * 2**27
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 1000)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='of glibc')
@pytest.mark.parametrize(('platforms', 'kept'), [('cpu', True), ('cuda', False)])
def test_a_command_on_cpus_keeps_what_it_frees(platforms, kept):
  run = subprocess.run(
    [sys.executable, '-c', FAULTS],
    env=os.environ | {'JAX_PLATFORMS': platforms},
    capture_output=True,
    text=True,
    check=True,
  )
  faults = int(run.stdout.split()[-1])
  assert faults == 0 if kept else faults > 20
