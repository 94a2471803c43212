"""Rows of metrics: each once, in order, whatever was interrupted, on a disk and in a bucket."""

import errno
import json
import struct
import threading

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
  assert out.count('cannot be written') == 1 and 'no network' in out
  assert _rows(bucket) == [('train', 1)]
  writer.close()
  assert _rows(bucket) == [('train', 1), ('train', 2), ('train', 3)]


class _Events:
  """A stand-in for tensorboardX's writer of events, which need not be installed."""

  def __init__(self, path):
    self.written = []

  def write_event(self, event):
    self.written.append(event)

  def flush(self):
    pass

  def close(self):
    self.flush()


@pytest.fixture
def events(monkeypatch):
  """The stand-in in the library's place."""
  monkeypatch.setattr(metric_log, 'EventsWriter', _Events)
  monkeypatch.setattr(metric_log, 'Event', dict, raising=False)
  return _Events


@pytest.mark.parametrize(('resume_step', 'purged'), [(0, 0), (6, 7)])
def test_tensorboard_hides_the_steps_that_are_taken_again(
  resume_step, purged, events, tmp_path, monkeypatch
):
  begun = {}
  monkeypatch.setattr(metric_log, 'EventsWriter', lambda path: begun.setdefault(path, events(path)))
  _write(epath.Path(tmp_path), resume_step, [8])
  first, *others = begun[f'{tmp_path}/events'].written
  assert first['step'] == purged and first['session_log'] == {'status': 'START'}
  assert [event['step'] for event in others] == [8, 8]


def _within(seconds, function):
  """AssertionError if the function takes longer."""
  thread = threading.Thread(target=function, daemon=True)
  thread.start()
  thread.join(seconds)
  assert not thread.is_alive()


@pytest.mark.parametrize('where', ['__init__', 'write_event', 'flush', 'close'])
def test_a_board_that_fails_is_said_once_and_stops_nothing(
  where, events, tmp_path, monkeypatch, capsys
):
  faults, works = [OSError(errno.ENOSPC, 'No space\n left')], getattr(events, where)

  def fail_once(*arguments):
    if faults:
      raise faults.pop()
    return works(*arguments)

  monkeypatch.setattr(events, where, fail_once)
  _within(20, lambda: _write(epath.Path(tmp_path), 0, range(1, 31)))
  out = capsys.readouterr().out
  assert out.count('WARNING') == 1 and 'No space left' in out
  assert len(_rows(tmp_path)) == 37


@pytest.mark.parametrize(('rows', 'words'), [(30, '10 rows wait'), (5, 'not written within 0.2 s')])
def test_a_board_that_is_stuck_keeps_nobody_waiting(
  rows, words, events, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(metric_log, '_BOARD_ROWS', 10)
  monkeypatch.setattr(metric_log, '_BOARD_PATIENCE', 0.2)
  released = threading.Event()
  monkeypatch.setattr(events, 'flush', lambda self: released.wait(60))
  _within(20, lambda: _write(epath.Path(tmp_path), 0, range(1, rows + 1)))
  released.set()
  out = capsys.readouterr().out
  assert out.count('WARNING') == 1 and words in out
  assert len(_rows(tmp_path)) == rows + rows // 4


def test_tensorboards_files_hold_the_rows(tmp_path):
  library = pytest.importorskip('tensorboardX.proto.event_pb2')
  _write(epath.Path(tmp_path), 6, [8])
  (path,) = tmp_path.glob('events.out.tfevents.*')
  left, found = path.read_bytes(), []
  while left:  # length, its checksum, so many bytes, their checksum
    (length,) = struct.unpack('<Q', left[:8])
    found.append(library.Event.FromString(left[12 : 12 + length]))
    left = left[16 + length :]
  assert [event.step for event in found] == [0, 7, 8, 8]
  assert found[1].session_log.status == library.SessionLog.START
  values = [{value.tag: value.simple_value for value in e.summary.value} for e in found[2:]]
  assert values == [{'train/step': 8, 'train/loss': 0.5}, {'val/step': 8, 'val/miou': 0.5}]


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
