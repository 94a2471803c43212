"""Rows of metrics: each once, in order, whatever was interrupted, on a disk and in a bucket."""

import json

import numpy as np
import pytest
from etils import epath

from aavs_jax.training import metric_log
from aavs_jax.training.metric_log import Writer, metrics_files


@pytest.fixture(params=['disk', 'bucket'])
def folder(request, tmp_path):
  if request.param == 'bucket':
    return request.getfixturevalue('bucket')
  return epath.Path(tmp_path)


def _rows(folder):
  text = ''.join(path.read_text() for path in metrics_files(folder))
  return [(row['kind'], row['step']) for row in map(json.loads, text.splitlines())]


def _write(folder, resume_step, steps, **options):
  writer = Writer(folder, resume_step, **options)
  for step in steps:
    writer.write('train', step=step, loss=0.5)
    if step % 4 == 0:
      writer.write('val', step=step, miou=0.5)
  writer.close()


def test_steps_that_are_taken_again_are_there_once(folder, monkeypatch):
  monkeypatch.setattr(metric_log, '_PART_ROWS', 3)
  folder.mkdir(parents=True, exist_ok=True)
  Writer(folder, 0).write('data', step=0, bad_clips=1)
  Writer(folder, 0).write('data', step=0, bad_clips=1)  # killed before its first checkpoint
  _write(folder, 0, range(1, 10))
  _write(folder, 6, range(7, 11))
  _write(folder, 10, range(11, 13))
  whole = [*(('train', s) for s in range(1, 13)), ('val', 4), ('val', 8), ('val', 12)]
  assert _rows(folder) == sorted(whole, key=lambda row: (row[1], row[0]))
  # The validation of the last step is repeated, where its scores were not saved.
  _write(folder, 8, ())
  assert _rows(folder)[-1] == ('val', 8)
  _write(folder, 8, (), unscored=True)
  assert _rows(folder)[-1] == ('train', 8)
  Writer(folder, 0)
  assert _rows(folder) == []


def test_a_line_cut_short_is_dropped(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"kind": "train", "step": 1}\n{"kind": "tra')
  _write(epath.Path(tmp_path), 1, [2])
  assert _rows(tmp_path) == [('train', 1), ('train', 2)]


def test_a_bucket_is_not_sent_all_rows_with_each(bucket, monkeypatch):
  sent = []
  write = epath.Path.write_text
  monkeypatch.setattr(
    type(bucket), 'write_text', lambda self, text: (sent.append(len(text)), write(self, text))
  )
  _write(bucket, 0, range(1, 401))
  rows = sum(len(path.read_text()) for path in metrics_files(bucket))
  assert len(_rows(bucket)) == 500 and len(sent) == 500
  assert sum(sent) < 60 * rows and len(metrics_files(bucket)) == 5


def test_a_bucket_out_of_reach_is_said_once_and_rows_come_later(bucket, monkeypatch, capsys):
  writer = Writer(bucket, 0)
  writer.write('train', step=1, loss=0.5)

  def fail(*_):
    raise ConnectionError('no network')

  with monkeypatch.context() as outage:
    outage.setattr(type(bucket), 'write_text', fail)
    for step in (2, 3):
      writer.write('train', step=step, loss=0.5)
  out = capsys.readouterr().out
  assert out.count('WARNING') == 1 and 'no network' in out
  assert _rows(bucket) == [('train', 1)]
  writer.close()
  assert _rows(bucket) == [('train', 1), ('train', 2), ('train', 3)]


@pytest.mark.parametrize(('resume_step', 'purged'), [(0, 0), (6, 7)])
def test_tensorboard_hides_the_steps_that_are_taken_again(
  resume_step, purged, tmp_path, monkeypatch
):
  asked = []
  monkeypatch.setattr(
    metric_log, 'SummaryWriter', lambda folder, purge_step: asked.append((folder, purge_step))
  )
  Writer(epath.Path(tmp_path), resume_step)
  assert asked == [(str(tmp_path), purged)]


def test_the_clock_counts_what_passed_since_it_was_read(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(metric_log.time, 'monotonic', lambda: now[0])
  clock = metric_log.Clock(0)
  for _ in range(2):
    with clock.validating():
      now[0] += 30
  with clock.waiting():
    now[0] += 2
  now[0] += 6
  clock.frames, clock.flops = 40, 80
  assert clock.read(4, 10, 3) == {
    'step_seconds': 2, 'frames_per_second': 5, 'flops_per_second': 10, 'input_wait': 0.25,
    'eta_seconds': 2 * 6 + 3 * 30,
  }  # fmt: skip
  now[0] += 4
  again = clock.read(6, 10, 0)
  assert (again['step_seconds'], again['frames_per_second'], again['input_wait']) == (2, 0, 0)


def test_a_line_of_a_step():
  row = {'step': 5, 'loss': 1.25, 'loss_mask': 0.5, 'step_seconds': 2.0, 'input_wait': 0.25,
         'frames_per_second': 5.0, 'mfu': 0.125, 'eta_seconds': 90.0}  # fmt: skip
  line = metric_log.step_line(row, 10)
  assert 'step 5/10  loss 1.250 (mask 0.500)' in line and '25 % waiting for input)' in line
  assert 'MFU 12.5 %' in line


def test_the_longest_wait_of_all_processes_is_told(monkeypatch):
  waits = np.array([[0.25], [0.75], [0.5]], np.float32)
  monkeypatch.setattr(metric_log.distributed, 'all_gather', lambda wait: waits)
  assert metric_log.slowest_input(0.25) == {'input_wait': 0.75, 'input_wait_process': 1}
