"""Imports run one way: input_pipeline, models, losses and metrics, steps, train, cli."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each module may import only modules of lower rank; a module without a rank fails the test.
RANK = {
  'input_pipeline': 0, 'configs': 0, 'types': 0, 'console': 0,
  'distributed': 1, 'hlo': 1, 'interrupt': 1, 'mesh': 1, 'overlay': 1, 'recipe': 1, 'metrics': 1,
  'tables': 1, 'torch_files': 1, 'peer': 1,
  'metric_log': 2, 'lock': 2, 'protocols': 2, 'timeline': 2, 'models': 2, 'profiling': 2,
  'wandb_run': 2, 'watch': 2, 'optimizer': 2, 'video': 3,
  'methods': 3, 'config': 4, 'state': 4, 'flops': 5, 'steps': 5, 'checkpoint': 5, 'phases': 6,
  'predictor': 6, 'start': 6, 'score': 7, 'work_folder': 8, 'evaluate': 9, 'hand_over': 9,
  'predict': 9, 'train': 9, 'report': 11, 'html': 2, 'stepping_stones': 10, 'bench': 8, 'aot': 9,
  'convert': 9,  'study': 12, 'reproduce': 11, 'recordings': 10, 'selftest': 11, 'cli': 13,
}  # fmt: skip


def _imported(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      module = '.' * node.level + (node.module or '')
      yield from (f'{module}.{alias.name}' for alias in node.names)


def _rank(name):
  parts = name.split('.')
  if parts[0] == 'aavs_jax' and len(parts) > 1:
    return RANK[parts[1]]
  return None


@pytest.mark.parametrize(
  'path', sorted((ROOT / 'input_pipeline').glob('*.py')), ids=lambda p: p.stem
)
def test_input_pipeline_knows_nothing_of_the_model(path):
  banned = ('jax', 'flax', 'optax', 'orbax', 'aavs_jax', 'tensorflow', 'torch')
  assert not [name for name in _imported(path) if name.split('.')[0] in banned]


@pytest.mark.parametrize('path', sorted((ROOT / 'aavs_jax').glob('[!_]*.py')), ids=lambda p: p.stem)
def test_arrows_point_one_way(path):
  own = RANK[path.stem]
  for name in _imported(path):
    rank = _rank(name)
    assert rank is None or rank < own, f'{path.stem} imports {name}'


def test_folders_of_the_same_names_do_not_take_the_place_of_ours(tmp_path):
  """A project that has `configs` and `input_pipeline` of its own, which Python finds first."""
  for name in ('configs', 'input_pipeline'):
    (tmp_path / name).mkdir()
    (tmp_path / name / '__init__.py').write_text('raise RuntimeError("not ours")')
  config = tmp_path / 'mine.py'
  config.write_text(
    'from aavs_jax.configs import avss_stage2\n'
    'def get_config():\n'
    '  config = avss_stage2.get_config()\n'
    '  config.seed = 5\n'
    '  return config\n'
  )
  code = 'from aavs_jax import config; print(config.load("mine.py").seed)'
  paths = os.pathsep.join([str(tmp_path), str(ROOT)])
  environment = {**os.environ, 'PYTHONPATH': paths}
  run = subprocess.run(
    [sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True, text=True
  )
  assert (run.stdout, run.returncode) == ('5\n', 0), run.stderr


def test_modules_are_attributes_of_the_package():
  code = (
    'import sys, aavs_jax\n'
    'assert "jax" not in sys.modules\n'
    'assert aavs_jax.overlay.overlay\n'
    'assert not hasattr(aavs_jax, "nonsense")\n'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


def test_the_least_versions_that_are_tested_are_those_that_are_asked_for():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  lists = [project['dependencies'], *project['optional-dependencies'].values()]
  asked = {text.replace('>=', '==') for texts in lists for text in texts if '>=' in text}
  tested = (ROOT / '.ci' / 'least.txt').read_text().splitlines()
  assert {line for line in tested if not line.startswith('#')} == asked
