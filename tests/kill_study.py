"""Kills a small training again and again, and compares its end with that of one left alone.

  python -m tests.kill_study --kills 100 [--seed 0] [--json FILE]

Each kill is a SIGKILL at a random moment: some time after the start, some time after a row of the
log, or within a save. The same command is started again until the training ends, which then must
have the same bits as the uninterrupted one: every array of the newest checkpoint and of the best
one, every row of metrics without times. Then another begins in a new folder, until so many kills
have been made. Exit status 1 on a difference.

The model is a stand-in that is traced in no time, so that a start takes seconds; all else is the
command line's training.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import logging as absl_logging
from etils import epath

from aavs_jax.input_pipeline.compose.dataset import compose
from aavs_jax.training import checkpoint
from tests import runs
from tests.stand_in import STAND_IN

# 36 steps, a save after every second one, six validations.
_SHORT = (
  '--config.train.epochs=6.0', '--config.train.checkpoint_every_steps=2',
  '--config.optimizer.lr=0.05',
)  # fmt: skip
_SAVES = 0.4  # share of the kills that are aimed at a save


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--kills', type=int, default=100, help='(%(default)s)')
  parser.add_argument('--seed', type=int, default=0, help='of the moments (%(default)s)')
  parser.add_argument('--json', help='also write the figures here')
  args = parser.parse_args()
  absl_logging.set_verbosity(absl_logging.ERROR)
  with tempfile.TemporaryDirectory(prefix='kill-study-') as folder:
    result = study(Path(folder), args.kills, random.Random(args.seed))
  print(json.dumps(result))
  if args.json:
    Path(args.json).write_text(json.dumps(result, indent=1))
  return 0 if result['equal'] else 1


def study(folder: Path, kills: int, draws: random.Random) -> dict:
  """Kills trainings in a folder; returns figures: 'kills', 'in_save', 'trainings', 'equal', ..."""
  compose(
    folder / 'data',
    clips={'train': {'v1s': 4, 'v1m': 4, 'v2': 2}, 'val': {'v1s': 1, 'v1m': 1, 'v2': 1},
           'test': {'v1s': 1, 'v1m': 1, 'v2': 1}},
    num_classes=4,
    size=(96, 72),
  )  # fmt: skip
  environment = runs.environment(folder / 'cache')

  def start(workdir):
    return runs.start(workdir, folder / 'data', environment, *_SHORT, STAND_IN)

  begun = time.monotonic()
  for name in ('uninterrupted', 'warm'):  # with all that is compiled in the cache, for its duration
    started = time.monotonic()
    process = start(folder / name)
    output = process.communicate()[0]
    if process.returncode:
      raise RuntimeError(output)
    whole = time.monotonic() - started
  result = {'kills': 0, 'in_save': 0, 'before_first_save': 0, 'trainings': 0, 'equal': True}
  while result['kills'] < kills or result['trainings'] == 0 or (folder / 'killed').exists():
    workdir = folder / 'killed'
    process = start(workdir)
    if result['kills'] < kills:
      _kill_at_random(process, workdir, whole, draws)
    output = process.communicate()[0]
    if process.returncode == -9:
      result['kills'] += 1
      result['in_save'] += runs.saving(workdir)
      result['before_first_save'] += (
        checkpoint.latest_step(epath.Path(workdir / 'checkpoints')) is None
      )
      steps, half = runs.logged(workdir), ', half a checkpoint' * runs.saving(workdir)
      print(f'  kill {result["kills"]}: {steps} steps in the log{half}', flush=True)
      continue
    if process.returncode:
      raise RuntimeError(output)
    result['trainings'] += 1
    try:
      runs.require_same(workdir, folder / 'uninterrupted')
    except AssertionError as error:
      result['equal'] = False
      print(f'another end than the uninterrupted one: {error}', flush=True)
    workdir.rename(folder / f'ended{result["trainings"]}')
  result['seconds'] = round(time.monotonic() - begun)
  return result


def _kill_at_random(
  process: subprocess.Popen, workdir: Path, whole: float, draws: random.Random
) -> None:
  """SIGKILL at a moment of a kind that is drawn, unless the process has ended before it."""
  kind = draws.random()
  if kind < _SAVES:
    ready, delay = (lambda: runs.saving(workdir)), draws.uniform(0, 0.02)
  elif kind < 0.8:
    at = runs.logged(workdir) + draws.randint(0, 6)
    ready, delay = (lambda: runs.logged(workdir) >= at), draws.uniform(0, whole / 20)
  else:
    ready, delay = (lambda: True), draws.uniform(0, whole)
  # What an earlier kill has left of a save goes when training begins.
  after = draws.randint(0, 2) if kind < _SAVES else 0
  seen, inside = 0, runs.saving(workdir)
  while process.poll() is None:
    now = ready()
    if kind < _SAVES:
      seen += now and not inside
      inside = now
      now = now and seen > after
    if now:
      break
    time.sleep(0.001)
  time.sleep(delay)
  process.kill()


if __name__ == '__main__':
  sys.exit(main())
