"""Training runs in processes of their own: begun, interrupted, compared bit by bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from aavs_jax.training import checkpoint
from aavs_jax.training.metric_log import metrics_files

ROOT = Path(__file__).parents[1]
_CLI = 'import sys; from aavs_jax import cli; sys.exit(cli.main())'
# Layers that are scanned over in backbone, encoder and decoder, and blocks that are dropped.
DEEP = (
  '--config.model.swin.depths=(1,1,4,1)', '--config.model.swin.drop_path=0.3',
  '--config.model.encoder_layers=2', '--config.model.decoder_layers=6',
)  # fmt: skip
# Of a row of metrics, what depends on the clock.
_CLOCK = (
  'time', 'step_seconds', 'frames_per_second', 'tflops_per_second', 'input_wait',
  'input_wait_process', 'eta_seconds',
)  # fmt: skip


def environment(cache: Path) -> dict[str, str]:
  """Of processes that share what they compile."""
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


def start(
  workdir, data, environment, *overrides, program=_CLI, config='tests/tiny.py:stage1'
) -> subprocess.Popen:
  """Starts the command line's training into a folder."""
  command = [
    sys.executable, '-c', program, 'train', '--config', config,
    '--data', str(data), '--workdir', str(workdir), *overrides,
  ]  # fmt: skip
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )


def state(workdir):
  """Step of the newest checkpoint and everything that it holds, as numpy."""
  step = checkpoint.latest_step(workdir / 'checkpoints')
  return step, checkpoint.read_arrays(workdir / 'checkpoints' / str(step) / 'state')


def history(workdir):
  """Rows of metrics without what depends on the clock."""
  text = ''.join(path.read_text() for path in metrics_files(workdir))
  rows = map(json.loads, text.splitlines())
  return [{key: value for key, value in row.items() if key not in _CLOCK} for row in rows]


def require_same(found, expected) -> None:
  """AssertionError unless two runs have ended with the same bits: weights, rows, best step."""
  (step, a), (expected_step, b) = state(found), state(expected)
  assert step == expected_step
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert history(found) == history(expected)
  a, b = (checkpoint.load_flat(workdir) for workdir in (found, expected))
  jax.tree.map(np.testing.assert_array_equal, a, b)


def logged(workdir) -> int:
  """Training steps that are in the log."""
  return sum(path.read_text().count('"train"') for path in metrics_files(workdir))


def saving(workdir) -> bool:
  """Whether a checkpoint is being written, or was when the run was killed."""
  return any('tmp' in path.name for path in (workdir / 'checkpoints').glob('*'))
