"""What one accelerator tells in a few minutes: order, time, failures, kernels."""

import json
import time

import jax
import jax.numpy as jnp
import pytest

from aavs_jax import cli
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.perf import bench, peer, sweep
from tests import tiny

MODES = {'bfloat16 compiled': 'bfloat16', 'float32': 'float32'}
KERNELS = {
  'seconds': 0.2,
  'count': 7,
  'largest': [{'name': 'gemm', 'seconds': 0.1, 'count': 3}],
  'parts': [
    {'part': 'AAVS/decoder', 'pass': 'backward', 'seconds': 0.199, 'count': 5},
    {'part': '', 'pass': 'forward', 'seconds': 0.001, 'count': 2},
  ],
}
CONFIGS = {1: tiny.get_config('stage1'), 2: tiny.get_config('stage2')}


@pytest.fixture
def measured(monkeypatch):
  """Measurements that take no time; a list of what was asked for."""
  asked = []

  def run(what, config, frames, phase, repeats):
    asked.append((what, config.task, config.dtype, config.model.sampling, frames, phase))
    if frames == 320:
      raise RuntimeError('RESOURCE_EXHAUSTED: out of memory\nat length')
    found = {'frames': frames, 'gflop_per_frame': 1.0, 'peak_flops': 1e15, 'compile_seconds': 1.0}
    return bench.timed(found | {'peak_memory': 2e9}, [0.1])

  monkeypatch.setattr(bench, 'bench', run)
  monkeypatch.setattr(bench, 'in_child', lambda function, *arguments: function(*arguments))
  monkeypatch.setattr(sweep, 'kernels', lambda *_: KERNELS)
  monkeypatch.setattr(peer, 'require', lambda: None)
  monkeypatch.setitem(peer.MODES, 'cpu', {})
  return asked


def test_what_tells_most_comes_first_and_nothing_twice():
  cases = list(sweep.cases(MODES, 'gather'))
  assert len(set(cases)) == len(cases)
  assert str(cases[0]) == 'stage 2, step of phase 2, 16 clips, bfloat16, gather'
  whos = [case.who for case in cases]
  assert whos.index('bfloat16 compiled') < 8 and whos.index('float32') > whos.index('ours') + 15
  ours = [case for case in cases if case.who == 'ours']
  assert {case.clips for case in ours} == {1, 4, 16, 32, 64}
  assert {(case.stage, case.phase) for case in ours} == {(1, 1), (1, 2), (2, 1), (2, 2)}
  assert not [case for case in sweep.cases({}, 'gather') if case.who != 'ours']


def test_each_case_is_measured_and_one_that_fails_is_noted(measured, tmp_path):
  result = sweep.sweep(tmp_path, CONFIGS, 5)
  assert measured[0] == ('step', 'semantic', 'bfloat16', 'dense', 80, 2)
  assert len(result['rows']) == len(measured) == len(list(sweep.cases({}, 'gather')))
  assert ('step', 'binary', 'bfloat16', 'dense', 80, 1) in measured
  failed = [row for row in result['rows'] if row['clips'] == 64]
  assert failed[0]['error'] == 'RuntimeError: RESOURCE_EXHAUSTED: out of memory'
  assert json.loads((tmp_path / 'sweep.json').read_text()) == result
  table = sweep.format_sweep(result)
  assert '| 2 | training, phase 2 | 16 | ours, bfloat16, dense | 800.0 | 0.8 | 0.1 % |' in table
  assert 'RESOURCE_EXHAUSTED' in table and 'no time' not in table
  assert '| 199.00 | 99.5% | 5 | AAVS/decoder, backward |' in table
  assert '| 1.00 | 0.5% | 2 | 1 more |' in table


def test_what_cannot_be_is_refused_before_it_is_measured(measured, tmp_path):
  with pytest.raises(UserError, match='--stage1 is of the semantic task of aavs'):
    sweep.sweep(tmp_path, {1: CONFIGS[2], 2: CONFIGS[2]}, 5)
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match=r'sweep\.json cannot be written'):
    sweep.sweep(tmp_path / 'file', CONFIGS, 5)
  assert not measured


def test_no_measurement_begins_that_would_end_too_late(measured, monkeypatch, tmp_path):
  clock = iter(range(0, 10_000, 20))
  monkeypatch.setattr(time, 'monotonic', lambda: next(clock))
  result = sweep.sweep(tmp_path, CONFIGS, 5)
  assert 2 <= len(result['rows']) < 8
  assert len(result['rows']) + result['left'] == len(list(sweep.cases({}, 'gather')))
  assert f'no time for {result["left"]} more' in sweep.format_sweep(result)


def test_the_command_writes_tables_of_both_stages(measured, tmp_path, capsys):
  configs = [f'--stage{stage}=tests/tiny.py:stage{stage}' for stage in (1, 2)]
  assert cli.main(['bench', 'sweep', str(tmp_path / 'out'), *configs]) == 0
  assert 'sweep.md' in capsys.readouterr().out
  assert (tmp_path / 'out' / 'sweep.md').read_text().startswith('cpu, jax')
  # Nothing measured is no success.
  assert cli.main(['bench', 'sweep', str(tmp_path / 'none'), '--minutes', '0', *configs]) == 1


def test_kernels_are_those_in_which_the_time_goes():
  @jax.jit
  def run(x):
    with jax.named_scope('product'):
      return x @ x, jnp.cumsum(x[0, :8])

  x = jnp.ones((1000, 1000))
  run(x)
  found = sweep.traced(lambda: run(x), run.lower(x).compile().as_text())
  spent = [kernel['seconds'] for kernel in found['largest']]
  assert spent[0] > found['seconds'] / 2  # the product
  assert spent == sorted(spent, reverse=True) and sum(spent) <= found['seconds'] * (1 + 1e-9)
  assert found['count'] >= 4 and len(spent) > 2
  assert (found['parts'][0]['part'], found['parts'][0]['pass']) == ('product', 'forward')
  assert sum(part['seconds'] for part in found['parts']) == pytest.approx(found['seconds'])
