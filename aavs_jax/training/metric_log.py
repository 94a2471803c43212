"""Metrics of a training: how fast it is, a line a step on the terminal, JSON lines in a file."""

import contextlib
import json
import math
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from aavs_jax.console import duration, say
from aavs_jax.devices import distributed
from aavs_jax.input_pipeline import files

try:
  from tensorboardX.event_file_writer import EventsWriter
  from tensorboardX.proto.event_pb2 import Event
except ImportError:
  EventsWriter = None


class Clock:
  """How fast training is, the share of time spent waiting for input, and the time left."""

  def __init__(self, step: int):
    # Of all processes since the last reading; the loop adds to them.
    self.frames = 0
    self.flops = 0
    self._step = step
    self._since = time.monotonic()
    self._waited = 0.0
    self._validation = 0.0  # how long the last one took

  @contextlib.contextmanager
  def waiting(self):
    """Time inside is time without input."""
    started = time.monotonic()
    yield
    self._waited += time.monotonic() - started

  @contextlib.contextmanager
  def paused(self):
    """Time inside is not training, such as compilation."""
    started = time.monotonic()
    yield
    self._since += time.monotonic() - started

  @contextlib.contextmanager
  def validating(self):
    """Time inside is a validation."""
    started = time.monotonic()
    with self.paused():
      yield
    self._validation = time.monotonic() - started

  def read(self, step: int, total: int, validations: int) -> dict[str, float]:
    """Figures of the steps since the last reading.

    Returns:
      step_seconds, frames_per_second, flops_per_second, input_wait (a share of the time), and
      eta_seconds: of total - step steps at this pace and so many validations.
    """
    elapsed = max(time.monotonic() - self._since, 1e-9)
    step_seconds = elapsed / max(step - self._step, 1)
    result = {
      'step_seconds': step_seconds,
      'frames_per_second': self.frames / elapsed,
      'flops_per_second': self.flops / elapsed,
      'input_wait': self._waited / elapsed,
      'eta_seconds': step_seconds * (total - step) + validations * self._validation,
    }
    self.frames = self.flops = self._waited = 0
    self._step, self._since = step, time.monotonic()
    return result


def slowest_input(wait: float) -> dict[str, float]:
  """The largest share of waiting for input of all processes, and whose it is of several."""
  waits = distributed.all_gather(np.float32(wait)).reshape(-1)
  slowest = int(waits.argmax())
  process = {'input_wait_process': slowest} if len(waits) > 1 else {}
  return {'input_wait': float(waits[slowest]), **process}


def step_line(row: dict[str, float], total: int) -> str:
  """What the terminal shows of a row of training."""
  mfu = f'  MFU {100 * row["mfu"]:.1f} %' if 'mfu' in row else ''
  whose = f', process {row["input_wait_process"]}' if 'input_wait_process' in row else ''
  terms = ' '.join(
    f'{name.removeprefix("loss_")} {value:.3f}'
    for name, value in row.items()
    if name.startswith('loss_')
  )
  return (
    f'  step {row["step"]}/{total}  loss {row["loss"]:.3f} ({terms})  '
    f'{row["step_seconds"]:.3g} s a step '
    f'({100 * row["input_wait"]:.0f} % waiting for input{whose})  '
    f'{row["frames_per_second"]:.1f} frames/s{mfu}  {duration(row["eta_seconds"])} left'
  )


# A bucket's objects cannot be appended to: metrics go there in parts of so many rows, of which
# the last one is written again with every row.
_PART_ROWS = 100


class Writer:
  """Appends metrics to metrics.jsonl, one JSON object a line, and to TensorBoard's files.

  In a bucket to metrics-00000001.jsonl and so on; a part that cannot be written now is tried again
  with the next row. TensorBoard's where the extra `tensorboard` is installed. Of several processes
  one alone writes. What else takes rows, with `write(kind, values)` and `close()`, is handed in as
  `others`.

  Args:
    folder: the work folder.
    resume_step: rows of later steps are removed, since these steps are taken again; of 0 all are.
    unscored: so is the row of a validation of that step.
    silent: write nothing.
    others: see above.
  """

  def __init__(
    self,
    folder: epath.Path,
    resume_step: int,
    *,
    unscored: bool = False,
    silent: bool = False,
    others: Sequence[Any] = (),
  ):
    self._silent = silent
    if silent:
      return

    def kept(line):
      try:
        row = json.loads(line)
        again = unscored and row['kind'] == 'val' and row['step'] == resume_step
        return resume_step and row['step'] <= resume_step and not again
      except (ValueError, KeyError, TypeError):
        return False  # cut short by the kill

    for path in metrics_files(folder):
      text = path.read_text()
      left = ''.join(f'{line}\n' for line in text.splitlines() if kept(line))
      if left != text:
        files.write_text(path, left) if left else path.unlink()
    self._in_bucket = '://' in str(folder)
    self._folder = folder
    self._rows = []  # of the part that is being written
    self._parts = len(metrics_files(folder))  # finished ones
    self._failing = False
    # TensorBoard hides what a killed run has written of the steps that are taken again.
    again = resume_step + 1 if resume_step else 0
    self._others = [*others, *([_Board(folder, again)] if EventsWriter else [])]

  def write(self, kind: str, **values: Any) -> None:
    if self._silent:
      return
    line = json.dumps({'kind': kind, **values, 'time': round(time.time(), 3)}) + '\n'
    if self._in_bucket:
      self._rows.append(line)
      self._write_part()
    else:
      with (self._folder / 'metrics.jsonl').open('a') as file:
        file.write(line)
    for other in self._others:
      other.write(kind, values)

  def _write_part(self) -> None:
    path = self._folder / f'metrics-{self._parts + 1:08}.jsonl'
    try:
      path.write_text(''.join(self._rows))
    except Exception as error:  # each kind of bucket has its own; training matters more
      if not self._failing:
        say(f'  WARNING: {path} cannot be written ({error}): tried again with the next row')
      self._failing = True
      return
    self._failing = False
    if len(self._rows) >= _PART_ROWS:
      self._rows = []
      self._parts += 1

  def close(self) -> None:
    if self._silent:
      return
    if self._failing:
      self._write_part()
    for other in self._others:
      other.close()


_BOARD_ROWS = 1000  # that may wait to be written
_BOARD_FLUSH = 120  # seconds; each sends a bucket all of the file again
_BOARD_PATIENCE = 30  # seconds, at the end, for what is left


class _Board:
  """TensorBoard's files, written by a thread: whatever fails there costs the rest of them alone.

  tensorboardX has such a thread too, which the first fault ends. Whoever then hands it rows or
  closes it waits for ever, and so does the end of the process.

  Args:
    folder: where the files are.
    purge_step: what earlier files have of this step and later ones is hidden.
  """

  def __init__(self, folder: epath.Path, purge_step: int):
    self._folder, self._failed = folder, False
    self._rows = queue.Queue(_BOARD_ROWS)
    self._thread = threading.Thread(target=self._run, args=(purge_step,), daemon=True)
    self._thread.start()

  def write(self, kind: str, values: Mapping[str, Any]) -> None:
    self._put((time.time(), kind, values))

  def close(self) -> None:
    self._put(None)
    self._thread.join(0 if self._failed else _BOARD_PATIENCE)
    if self._thread.is_alive():
      self._give_up(f'not written within {_BOARD_PATIENCE} s')

  def _put(self, row: tuple[float, str, Mapping[str, Any]] | None) -> None:
    if self._failed:
      return
    try:
      self._rows.put_nowait(row)
    except queue.Full:
      self._give_up(f'{_BOARD_ROWS} rows wait to be written')

  def _run(self, purge_step: int) -> None:
    try:
      writer, flushed = EventsWriter(f'{self._folder}/events'), -math.inf
      start = {'status': 'START'}
      writer.write_event(Event(wall_time=time.time(), step=purge_step, session_log=start))
      for moment, kind, values in iter(self._rows.get, None):
        row = [{'tag': f'{kind}/{name}', 'simple_value': v} for name, v in values.items()]
        writer.write_event(Event(wall_time=moment, step=values['step'], summary={'value': row}))
        if time.monotonic() - flushed > _BOARD_FLUSH:
          writer.flush()
          flushed = time.monotonic()
      writer.close()
    except Exception as error:  # of whatever kind: training matters more
      self._give_up(error)

  def _give_up(self, reason: Exception | str) -> None:
    if not self._failed:
      self._failed = True
      text = ' '.join(str(reason).split())[:200] or type(reason).__name__
      say(
        f"  WARNING: TensorBoard's files in {self._folder} get no more rows ({text}); training "
        'goes on'
      )


def metrics_files(folder: epath.PathLike) -> list[epath.Path]:
  """The files of a work folder that hold its metrics, in the order of their rows."""
  folder = epath.Path(folder)
  whole = folder / 'metrics.jsonl'
  return [whole] * files.is_there(whole) + sorted(folder.glob('metrics-*.jsonl'))
