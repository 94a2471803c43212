"""`aavs bench input`: its figures fit together, and it sees memory grow."""

import json

import numpy as np
import pytest

from aavs_jax import cli
from aavs_jax.input_pipeline import bench, prepare
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.items import Item, Task, load_training_item
from aavs_jax.perf.bench import in_child

TASK = Task(True, 71, 32, 32, 4, True, '')
LOADING = bench.Loading(item_frames=5, batch_items=2, threads=1, workers=0)


def test_parts_add_up_to_what_a_core_can_read(data_root, tmp_path, capsys):
  path = tmp_path / 'input.json'
  assert not cli.main([
    'bench', 'input', '--config', 'tests/tiny.py:stage2', '--data', data_root, '--clips', '2',
    '--seconds', '0.2', '--json', str(path), '--config.data.threads=2',
  ])  # fmt: skip
  result = json.loads(path.read_text())['result']
  assert 'shards' not in result
  parts = result['raw']['milliseconds']
  assert set(parts) == {'log-mel', 'image: decode', 'image: resize', 'label', 'the rest'}
  per_core = result['raw']['frames_per_second_per_core']
  assert sum(parts.values()) == pytest.approx(1000 / per_core)
  assert result['raw']['cores'] == pytest.approx(1000 / per_core)
  assert result['raw']['delivered'] > 0
  assert result['log_mel_times_real_time'] > 10
  shown = capsys.readouterr().out
  assert f'{per_core:.0f} frames/s a core' in shown and '2 threads' in shown


@pytest.mark.parametrize(('cores', 'words'), [(1, '1 core, '), (2, '2 cores, ')])
def test_the_machine_is_said_with_its_cores(cores, words, monkeypatch):
  monkeypatch.setattr(bench.host, 'cores', lambda: cores)
  assert bench._machine().startswith(words)


def test_a_prepared_data_set_is_timed_as_shards(data_root, tmp_path):
  prepare.prepare(data_root, tmp_path / 'shards', image_size=32, eval_size=32, workers=1)
  result = bench.bench_input(TASK, LOADING, data=str(tmp_path / 'shards'), clips=2, seconds=0.2)
  assert 'raw' not in result and 'log_mel_times_real_time' not in result
  parts = result['shards']['milliseconds']
  assert set(parts) == {'log-mel', 'record, labels', 'image', 'the rest'}
  assert 'shards' in bench.format_input(result, LOADING)


def _watched(data_root):
  """Of an epoch that keeps nothing, and of one that keeps 67 MB at a time, and what is said."""

  def watch(say):
    return bench.bench_memory(TASK, LOADING, data=data_root, clips=10, say=say)

  told, kept = [], []
  return watch(told.append), watch(lambda line: kept.append(np.ones(1 << 23))), told


def test_memory_that_an_epoch_keeps_is_seen(data_root):
  # In a process of its own: that of tests gives back at any time what others of them have taken.
  flat, growing, told = in_child(_watched, data_root)
  assert len(flat['megabytes']) == len(told) == 6  # an epoch of 12 items in batches of 2
  assert abs(flat['growth']) < bench.FLAT_MB and ': flat' in bench.format_memory(flat)
  assert 280 < growing['growth'] < 480 and 'NOT flat' in bench.format_memory(growing)


def test_more_clips_than_there_are_is_refused(data_root):
  with pytest.raises(UserError, match='has 10 training clips'):
    bench.bench_memory(TASK, LOADING, data=data_root, clips=11, say=print)


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--clips', '0'], '--clips is 0: use 1 or more'),
    (['--memory', '-3'], '--memory is -3: use 1 or more'),
    (['--memory', '0'], '--memory is 0: use 1 or more'),
    (['--seconds', 'nan'], '--seconds is nan: use a length above 0'),
  ],
)
def test_nothing_to_measure_is_refused(flags, words, data_root, capsys):
  assert cli.main(['bench', 'input', '--data', data_root, *flags]) == 2
  assert words in capsys.readouterr().err


def test_copies_are_clips_of_their_own(data_root, tmp_path):
  made = bench._sample(bench.read_index(data_root, 'train'), 3)
  copies = bench._multiply(made, tmp_path, 7)
  assert len({copy.folder for copy in copies}) == 7
  first = [load_training_item(c, Item(0, 0, 5), TASK) for c in (made[0], copies[3])]
  assert all(np.array_equal(first[0][name], first[1][name]) for name in first[0])
