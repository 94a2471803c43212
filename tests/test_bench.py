"""Timing: figures that fit each other, programs that are kept, and the peer of the same sizes."""

import json
import multiprocessing
import os
import signal
import statistics
import sys
import time

import jax
import pytest

from aavs_jax import cli, methods
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.perf import bench, peer
from aavs_jax.training import flops
from tests import tiny

TINY = ['--config', 'tests/tiny.py:stage1', '--config.model.decoder_layers=0', '--frames', '2']


def _check(result, seconds):
  """The figures of one measurement fit each other."""
  assert len(result['seconds']) == seconds and min(result['seconds']) > 0
  assert result['median_seconds'] == statistics.median(result['seconds'])
  assert result['least_seconds'] <= result['median_seconds'] <= result['most_seconds']
  assert result['frames_per_second'] == 2 / result['median_seconds']


def test_noise_has_no_more_targets_than_a_frame_may():
  config = tiny.get_config('stage1')
  for most in (1, 3):
    config.data.max_targets = most
    classes = bench.random_batch(config, 2)['target_classes']
    assert classes.tolist() == [[0, 1, -1][:most]] * 2


def test_predict(tmp_path, capsys):
  path = tmp_path / 'bench.json'
  assert cli.main(['bench', 'predict', *TINY, '--repeats', '4', '--json', str(path)]) == 0
  result = json.loads(path.read_text())['result']
  _check(result, 4)
  config = tiny.get_config('stage1')
  config.model.decoder_layers = 0
  params = jax.eval_shape(methods.of(config).init, jax.random.key(0))
  done = flops.forward_flops(config, params, bench.random_batch(config, 2))
  assert result['gflop_per_frame'] * 2e9 == pytest.approx(done)
  speed = done / 2 * result['frames_per_second']
  assert result['tflops_per_second'] * 1e12 == pytest.approx(speed)
  assert result['peak_memory_of'] == 'process' and result['peak_memory'] > 1e8
  assert 'mfu' not in result and 'no MFU' in capsys.readouterr().out


def test_a_batch_that_cannot_be_is_refused(capsys):
  for arguments, words in (
    (['--frames', '0'], '--frames is 0'),
    (['--frames', '3', '--config.train.accumulate=2'], 'use a multiple of 2'),
    (['--repeats', '0'], '--repeats is 0'),
  ):
    assert cli.main(['bench', 'step', *TINY, *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_compiling_anew_and_from_the_cache(capsys):
  config = tiny.get_config('stage1')
  config.model.decoder_layers = 0
  result = bench.compile_times(config, 2, 2)
  assert set(result) == {'step', 'predict'}
  for times in result.values():
    assert times['kept'] and 0 < times['cached_seconds'] < times['cold_seconds']
  # In a process of its own: the cache of this one is as it was.
  assert not str(jax.config.jax_compilation_cache_dir or '').startswith('/tmp/tmp')
  assert 'from the cache' in bench.format_compile_times(result)


def test_a_process_that_dies_is_said_so():
  with pytest.raises(UserError, match='died'):
    bench.in_child(os._exit, 3)


def test_a_signal_ends_the_process_that_measures_as_well():
  def end(number, frame):
    sys.exit(128 + number)

  before = signal.signal(signal.SIGALRM, end)
  started = time.monotonic()
  try:
    signal.alarm(3)
    with pytest.raises(SystemExit):
      bench.in_child(time.sleep, 60)
  finally:
    signal.signal(signal.SIGALRM, before)
  assert time.monotonic() - started < 30 and not multiprocessing.active_children()


def test_where_figures_cannot_go_is_said_before_they_are_taken(tmp_path, capsys):
  command = ['bench', 'predict', '--config', 'tests/tiny.py:stage1', '--json', str(tmp_path)]
  assert cli.main(command) == 2
  told = capsys.readouterr()
  assert 'is a folder: name a file' in told.err and not told.out


def test_without_the_peer_one_sentence_says_how_to_get_it(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'transformers', None)
  assert cli.main(['bench', 'step', *TINY, '--peer']) == 2
  error = capsys.readouterr().err.strip()
  assert 'transformers' in error and "'.[peer]'" in error and '\n' not in error


def test_the_peer_stands_beside_its_like(capsys):
  command = ['bench', 'predict', '--config', 'tests/small_maps.py:tpavi', '--peer']
  assert cli.main(command) == 2
  assert 'the config is of tpavi' in capsys.readouterr().err
  bench.require_one(1)
  with pytest.raises(UserError, match='JAX sees 8 devices, and the peer runs on one'):
    bench.require_one(8)


def test_the_peer_has_the_sizes_of_the_config():
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  config = tiny.get_config('stage2')
  config.model.decoder_layers = 2
  model = peer.build(config.to_dict())
  shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
  assert shapes['class_predictor.weight'] == (config.num_classes + 1, config.model.hidden)
  assert shapes['model.transformer_module.queries_features.weight'] == (6, 32)
  decoder = {
    name.split('.layers.')[1].split('.')[0] for name in shapes if 'decoder.layers.' in name
  }
  assert decoder == {'0', '1'}


def test_what_trains_of_the_peer():
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  model = peer.build(tiny.get_config('stage1').to_dict())
  first, second = peer.choose_trained(model, 1), peer.choose_trained(model, 2)
  assert set(first) < set(second)
  # Down to the first block of the backbone in phase 2, and there the norms alone.
  backbone = [name for name in second if '.swin.' in name]
  assert backbone == [name for name in second if name not in first]
  assert any('layers.0.blocks.0.layernorm_before' in name for name in backbone)
  assert all('layernorm' in name for name in backbone)
  assert not any('attn.' in name or 'fc' in name for name in second)


@pytest.mark.slow
@pytest.mark.parametrize('what', ['predict', 'step'])
def test_beside_the_peer(what, tmp_path, capsys):
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  path = tmp_path / 'bench.json'
  command = ['bench', what, *TINY, '--repeats', '2', '--peer', '--json', str(path)]
  assert cli.main(command) == 0
  result = json.loads(path.read_text())['result']
  ours, theirs = result['ours']['float32'], result['peer']['float32']
  for found in (ours, theirs):
    _check(found, 2 * bench.ROUNDS)
  ratio = theirs['median_seconds'] / ours['median_seconds']
  assert theirs['speed_ratio'] == pytest.approx(ratio)
  assert theirs['memory_ratio'] == ours['peak_memory'] / theirs['peak_memory']
  assert theirs['parameters'] > theirs['trained_parameters']
  # One number of each table, and what was compared.
  text = capsys.readouterr().out
  assert f'{theirs["frames_per_second"]:.2f}' in text and 'transformers' in text
