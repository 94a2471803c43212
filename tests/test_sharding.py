"""Any number of devices gives the losses of one; each case is a process with fake CPU devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def _losses(data_root, workdir, devices, fsdp):
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'
  # Parameters of the tiny model are all below the size from which arrays are spread.
  program = (
    'import sys; from aavs_jax import cli, mesh; mesh.FSDP_MIN_SIZE = 1; sys.exit(cli.main())'
  )
  arguments = [
    'train', '--config', 'tests/tiny.py:stage1', '--data', data_root, '--workdir', str(workdir),
    '--config.data.batch_items=4', f'--config.mesh.fsdp={fsdp}', '--config.train.epochs=1.0',
  ]  # fmt: skip
  done = subprocess.run(
    [sys.executable, '-c', program, *arguments],
    cwd=ROOT, env=os.environ | {'XLA_FLAGS': flags}, text=True, capture_output=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert f'{devices} cpu device' in done.stdout
  return [row['loss'] for row in rows if row['kind'] == 'train']


@pytest.mark.slow
def test_losses_do_not_depend_on_the_devices(data_root, tmp_path):
  alone = _losses(data_root, tmp_path / '1', 1, 1)
  assert len(alone) == 3
  for devices, fsdp in [(4, 1), (4, 2)]:
    spread = _losses(data_root, tmp_path / f'{devices}x{fsdp}', devices, fsdp)
    np.testing.assert_allclose(spread, alone, rtol=1e-5)
