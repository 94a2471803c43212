"""Imports run one way, from floor to floor, without a circle."""

import ast
import graphlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (  # each imports only what stands above it here; those of one line do not know each other
  'input_pipeline configs types console serving signals',
  'devices media',
  'models',
  'methods',
  'config',
  'scoring',
  'training',
  'train evaluate hand_over predict export hearing pytorch perf',
  'cross_fit demo',
  'stepping_stones',
  'studies',
  'cli',
)
FLOOR = {name: floor for floor, line in enumerate(FLOORS) for name in line.split()}
# By module, as it is imported. Configs and input_pipeline lie beside the package.
MODULES = {
  '.'.join(('aavs_jax', *path.relative_to(ROOT).with_suffix('').parts[start:])): path
  for folder, start in (('aavs_jax', 1), ('configs', 0), ('input_pipeline', 0))
  for path in sorted((ROOT / folder).rglob('*.py'))
  if path.name != '__init__.py' or path.parent.name == 'methods'
}


def _imported(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      module = '.' * node.level + (node.module or '')
      yield from (f'{module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize(
  'path', sorted((ROOT / 'input_pipeline').rglob('*.py')), ids=lambda p: p.stem
)
def test_input_pipeline_knows_nothing_of_the_model(path):
  banned = ('jax', 'flax', 'optax', 'orbax', 'aavs_jax', 'tensorflow', 'torch')
  assert not [name for name in _imported(path) if name.split('.')[0] in banned]


@pytest.mark.parametrize('module', MODULES)
def test_arrows_point_one_way(module):
  own = module.split('.')[1]
  for name in _imported(MODULES[module]):
    package, _, rest = name.partition('.')
    if package == 'aavs_jax':
      other = rest.split('.')[0]
      assert other == own or FLOOR[other] < FLOOR[own], f'{module} imports {name}'


def test_there_is_no_circle():
  graph = {}
  for module, path in MODULES.items():
    names = set()
    for name in _imported(path):
      if name.startswith('.'):  # in input_pipeline
        up = len(name) - len(name.lstrip('.'))
        package = module.split('.')[:-up]
        name = '.'.join((*package, name.lstrip('.')))
      # The name itself, or what is defined in a module of that name.
      names.add(name if name in MODULES else name.rpartition('.')[0])
    graph[module] = {name for name in names & MODULES.keys() if name != module}
  assert sum(map(len, graph.values())) > 200
  graphlib.TopologicalSorter(graph).prepare()


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
    'assert aavs_jax.console.say\n'
    'assert not hasattr(aavs_jax, "nonsense")\n'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


def test_benchmarks_and_the_self_test_need_nothing_that_reads_data():
  code = (
    'import sys\n'
    'for name in ("array_record", "av", "cv2", "grain", "librosa", "matplotlib", "orbax",\n'
    '             "soundfile", "tensorflow_datasets"):\n'
    '  sys.modules[name] = None\n'
    'from aavs_jax import config\n'
    'from aavs_jax.perf import aot, bench, peer, sweep\n'
    'from aavs_jax.pytorch import selftest\n'
    'config.load("configs/avss_stage2.py")\n'
  )
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_the_least_versions_that_are_tested_are_those_that_are_asked_for():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  lists = [project['dependencies'], *project['optional-dependencies'].values()]
  asked = {text.replace('>=', '==') for texts in lists for text in texts if '>=' in text}
  tested = (ROOT / '.ci' / 'least.txt').read_text().splitlines()
  assert {line for line in tested if not line.startswith('#')} == asked
