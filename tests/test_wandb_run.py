"""Weights & Biases gets the rows, under one run a work folder, and never stops a training."""

import json
import sys
import types

import pytest
from etils import epath

from aavs_jax import cli
from aavs_jax.training.metric_log import Writer
from aavs_jax.training.wandb_run import WandbRun


@pytest.fixture
def runs(monkeypatch):
  """A stand-in for the service's library; the runs begun there, in order."""
  begun = []

  class Run:
    def __init__(self, **arguments):
      self.arguments, self.rows, self.finished = arguments, [], False

    def log(self, row, step):
      self.rows.append((step, row))

    def finish(self):
      self.finished = True

  def init(**arguments):
    begun.append(Run(**arguments))
    return begun[-1]

  library = types.ModuleType('wandb')
  library.init = init
  monkeypatch.setitem(sys.modules, 'wandb', library)
  return begun


def _writer(folder, project='aavs'):
  folder = epath.Path(folder)
  return Writer(folder, 0, others=[WandbRun(folder, project, {'seed': 3})])


def test_rows_arrive(runs, tmp_path):
  writer = _writer(tmp_path)
  writer.write('train', step=2, loss=0.5)
  writer.write('val', step=2, miou=0.25)
  writer.close()
  (run,) = runs
  assert run.arguments['project'] == 'aavs' and run.arguments['config'] == {'seed': 3}
  assert run.arguments['dir'] == str(tmp_path)
  assert run.rows == [
    (2, {'train/step': 2, 'train/loss': 0.5}),
    (2, {'val/step': 2, 'val/miou': 0.25}),
  ]
  assert run.finished


def test_a_restart_goes_on_with_the_same_run(runs, tmp_path):
  for folder, project in (('a', 'aavs'), ('a', 'aavs'), ('b', 'aavs'), ('a', 'other')):
    (tmp_path / folder).mkdir(exist_ok=True)
    _writer(tmp_path / folder, project).close()
  _writer(tmp_path / 'a').close()
  first, again, other_folder, other_project, back = (run.arguments['id'] for run in runs)
  assert first == again == back
  assert len({first, other_folder, other_project}) == 3
  assert {run.arguments['resume'] for run in runs} == {'allow'}


@pytest.mark.parametrize('where', ['init', 'log', 'finish'])
def test_what_fails_there_is_said_once_and_stops_nothing(
  where, runs, tmp_path, monkeypatch, capsys
):
  def fail(*_, **__):
    raise OSError('no network\n at all')

  if where == 'init':
    monkeypatch.setattr(sys.modules['wandb'], 'init', fail)
  writer = _writer(tmp_path)
  if where != 'init':
    monkeypatch.setattr(runs[0], where, fail)
  for step in (1, 2):
    writer.write('train', step=step, loss=0.5)
  writer.close()
  out = capsys.readouterr().out
  assert out.count('WARNING') == 1 and 'no network at all' in out
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [row['step'] for row in rows] == [1, 2]


def test_without_the_library_one_sentence_says_how_to_get_it(
  data_root, tmp_path, monkeypatch, capsys
):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  command = [
    'train', '--config', 'tests/tiny.py:stage1', '--data', data_root,
    '--workdir', str(tmp_path / 'run'), '--wandb', 'aavs',
  ]  # fmt: skip
  assert cli.main(command) == 2
  error = capsys.readouterr().err.strip()
  assert "'.[wandb]'" in error and '\n' not in error
  assert not (tmp_path / 'run').exists()
