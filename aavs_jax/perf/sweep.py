"""What one accelerator can tell in a few minutes: speed by batch, dtype and form, peer, kernels."""

import collections
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from aavs_jax.console import duration
from aavs_jax.input_pipeline import files
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.perf import bench, hlo, peer
from aavs_jax.perf.bench import TITLES

CLIP_FRAMES = 5
CLIPS = (16, 32, 4, 1, 64)  # of a batch; first what tells most
KERNELS = 10
_REPEATS = 5


class Case(NamedTuple):
  """One measurement."""

  who: str  # 'ours', or a mode of the peer, see peer.MODES
  what: str  # a key of bench.TITLES
  stage: int
  phase: int
  dtype: str
  sampling: str
  clips: int

  def __str__(self) -> str:
    step = f'step of phase {self.phase}' if self.what == 'step' else 'predict'
    how = f'{self.dtype}, {self.sampling}' if self.who == 'ours' else f'the peer, {self.who}'
    return f'stage {self.stage}, {step}, {self.clips} clips, {how}'


def cases(modes: Mapping[str, str], sampling: str) -> Iterator[Case]:
  """All measurements, what tells most first: time may end before they do.

  Args:
    modes: of the peer, the best first, and the dtype of ours that each is compared with.
    sampling: the form of all but two, which have the other one.
  """
  first = Case('ours', 'step', 2, 2, 'bfloat16', sampling, CLIPS[0])
  seen = set()

  def new(**changes):
    case = first._replace(**changes)
    if case not in seen:
      seen.add(case)
      yield case

  for clips in CLIPS[:2]:
    for what in TITLES:
      yield from new(what=what, clips=clips)
  for what in TITLES:
    for mode in list(modes)[:1]:
      yield from new(who=mode, what=what, dtype=modes[mode])
  for clips in CLIPS[2:]:
    for what in TITLES:
      yield from new(what=what, clips=clips)
  for what in TITLES:
    yield from new(what=what, dtype='float32')
  yield from new(phase=1)
  for phase in (2, 1):
    yield from new(stage=1, phase=phase)
  yield from new(stage=1, what='predict')
  for what in TITLES:
    yield from new(what=what, sampling={'gather': 'dense', 'dense': 'gather'}[sampling])
  for mode in modes:
    for clips in CLIPS[1:]:
      for what in TITLES:
        yield from new(who=mode, what=what, dtype=modes[mode], clips=clips)


def sweep(
  out: str | Path,
  configs: Mapping[int, ml_collections.ConfigDict],
  minutes: float,
  progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Runs measurement after measurement, each in a process of its own, while time lasts.

  What was found is in OUT/sweep.json after each one. One that fails, as for want of memory, is
  noted and the next one runs.

  Args:
    out: a folder.
    configs: of the stages 1 and 2.
    minutes: no measurement begins that would end later, were it as long as the longest so far.
    progress: told what runs, and what it gave.

  Returns:
    device, jax, 'rows': a Case as a dictionary with what `bench.bench` or `peer.measure` tells, or
    'error'; 'kernels', see `kernels`; 'left': how many measurements there was no time for.

  Raises:
    UserError: a config is of another stage or method, OUT cannot be written, or JAX sees several
      devices and the peer is installed.
  """
  end = time.monotonic() + 60 * minutes
  for stage, task in ((1, 'binary'), (2, 'semantic')):
    if (configs[stage].method, configs[stage].task) != ('aavs', task):
      raise UserError(
        f'--stage{stage} is of the {configs[stage].task} task of {configs[stage].method}: give the '
        f"config of aavs's stage {stage}"
      )
  files.refuse_bucket(out)
  files.require_place(Path(out) / 'sweep.json')
  platform, device, count = bench.in_child(bench.where)
  kind = peer.DEVICES.get(platform)
  modes = _peer_modes(kind, progress)
  if modes:
    bench.require_one(count)
  result = {'device': device, 'jax': jax.__version__, 'rows': [], 'kernels': {}, 'left': 0}
  longest = 0.0

  def run(title, function, *arguments):
    nonlocal longest
    if time.monotonic() + longest > end:
      return None
    progress(f'{title} ... {duration(max(0, end - time.monotonic()))} left')
    started = time.monotonic()
    try:
      found = bench.in_child(function, *arguments)
    except Exception as error:
      found = {'error': f'{type(error).__name__}: {error}'.splitlines()[0][:300]}
    longest = max(longest, time.monotonic() - started)
    return found

  for number, case in enumerate(cases(modes, configs[2].model.sampling)):
    config = configs[case.stage].copy_and_resolve_references()
    config.dtype, config.model.sampling = case.dtype, case.sampling
    frames = case.clips * CLIP_FRAMES
    if case.who == 'ours':
      run_it = (bench.bench, case.what, config, frames, case.phase, _REPEATS)
    else:
      run_it = (_peer, case.what, config, frames, case.phase, kind, case.who)
    found = run(str(case), *run_it)
    if found is None:
      result['left'] += 1
      continue
    result['rows'].append(case._asdict() | found)
    progress(f'  {_speed(found)}')
    if number == 0 and 'error' not in found:
      result['kernels'] = run(f'{case}, a trace', kernels, config, frames, case.phase) or {}
    files.write_json(Path(out) / 'sweep.json', result)
  files.write_json(Path(out) / 'sweep.json', result)
  return result


def _peer_modes(kind: str | None, progress: Callable[[str], None]) -> dict[str, str]:
  """Of the peer on this kind of device, the fastest first; none where it is not installed."""
  try:
    peer.require()
  except UserError as error:
    progress(f'without the peer: {error}')
    return {}
  return dict(reversed(peer.MODES[kind].items())) if kind else {}


def _peer(what, config, frames, phase, kind, mode) -> dict[str, Any]:
  batch = bench.random_batch(config, frames)
  found = peer.measure(what, config.to_dict(), batch, phase, _REPEATS, kind, mode)
  return bench.timed(found, found['seconds'])


def kernels(config: ml_collections.ConfigDict, frames: int, phase: int) -> dict[str, Any]:
  """The kernels of one training step, see `traced`; in a process of its own."""
  # Recorded as one command, kernels would not say to which operation they belong.
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{flags} --xla_gpu_enable_command_buffer='
  batch = bench.place(config, frames)
  compiled = bench.compile_step('step', config, batch, phase)
  state, _ = jax.block_until_ready(compiled.run(compiled.make_state(), batch))
  return traced(lambda: compiled.run(state, batch), compiled.text())


def traced(run: Callable[[], Any], text: str) -> dict[str, Any]:
  """What the device spends its time with.

  Args:
    run: what it is to do; compiled already.
    text: of the compiled module, from which parts of the model have their names.

  Returns:
    'seconds' of all kernels, their number 'count', and sorted by seconds 'largest': name, seconds
    and count of the kernels that take most, and 'parts': part and pass (see hlo.part_of), seconds
    and count of all.
  """
  scope = dict(re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', text, re.M))
  by_name, by_part = (collections.defaultdict(lambda: [0.0, 0]) for _ in range(2))
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      jax.block_until_ready(run())
    (file,) = Path(folder).rglob('*.xplane.pb')
    for event in _events(jax.profiler.ProfileData.from_file(str(file))):
      operation = dict(event.stats).get('hlo_op', event.name)
      for table, key in (
        (by_name, event.name),
        (by_part, hlo.part_of(scope.get(operation, ''))),
      ):
        table[key][0] += event.duration_ns / 1e9
        table[key][1] += 1

  def ordered(table, *names):
    rows = sorted(table.items(), key=lambda row: -row[1][0])
    return [
      dict(zip(names, key)) | {'seconds': spent, 'count': count} for key, (spent, count) in rows
    ]

  return {
    'seconds': sum(spent for spent, _ in by_name.values()),
    'count': sum(count for _, count in by_name.values()),
    'largest': ordered({(name,): found for name, found in by_name.items()}, 'name')[:KERNELS],
    'parts': ordered(by_part, 'part', 'pass'),
  }


def _events(trace: jax.profiler.ProfileData) -> Iterator[Any]:
  """Every kernel; on the CPU every operation."""
  for plane in trace.planes:
    for line in plane.lines:
      of_device = plane.name.startswith('/device:') and line.name.startswith('Stream')
      of_host = plane.name == '/host:CPU' and 'XLA' in line.name
      if of_device or of_host:
        yield from line.events


def format_sweep(result: Mapping[str, Any]) -> str:
  """Tables in Markdown, for people."""
  lines = [
    f'{result["device"]}, jax {result["jax"]}',
    '',
    '| stage | step | clips | who | frames/s | TFLOP/s | MFU | peak memory | compiled in |',
    '|---|---|---|---|---|---|---|---|---|',
  ]
  order = {clips: place for place, clips in enumerate(sorted(CLIPS))}
  rows = sorted(
    result['rows'], key=lambda r: (r['what'], -r['stage'], -r['phase'], order[r['clips']])
  )
  for row in rows:
    step = f'training, phase {row["phase"]}' if row['what'] == 'step' else 'predict'
    ours = row['who'] == 'ours'
    who = f'ours, {row["dtype"]}, {row["sampling"]}' if ours else f'peer, {row["who"]}'
    begin = f'| {row["stage"]} | {step} | {row["clips"]} | {who} '
    if 'error' in row:
      lines.append(f'{begin}| {row["error"]} | | | | |')
      continue
    speed = f'{row["tflops_per_second"]:.1f}' if ours else ''
    share = f'{100 * row["mfu"]:.1f} %' if 'mfu' in row else ''
    compiled = f'{row["compile_seconds"]:.0f} s' if ours else ''
    lines.append(
      f'{begin}| {row["frames_per_second"]:.1f} | {speed} | {share} '
      f'| {row["peak_memory"] / 1e9:.1f} GB | {compiled} |'
    )
  if result['left']:
    lines += ['', f'There was no time for {result["left"]} more measurements.']
  if result['kernels'] and 'error' not in result['kernels']:
    lines += _tables_of_kernels(result['kernels'])
  return '\n'.join(lines)


def _tables_of_kernels(found: Mapping[str, Any]) -> Iterator[str]:
  def row(kernel, name):
    return (
      f'| {1e3 * kernel["seconds"]:.2f} | {kernel["seconds"] / found["seconds"]:.1%} '
      f'| {kernel["count"]} | {name} |'
    )

  yield from (
    '',
    f'A training step of stage 2, phase 2, {CLIPS[0]} clips, is {found["count"]} kernels, '
    f'{1e3 * found["seconds"]:.1f} ms; the largest:',
    '',
    '| ms | share | times | kernel |',
    '|---|---|---|---|',
  )
  yield from (row(kernel, kernel['name'][:80]) for kernel in found['largest'])
  yield from ('', 'By part of the model:', '', '| ms | share | times | part |', '|---|---|---|---|')
  large = [part for part in found['parts'] if part['seconds'] > found['seconds'] / 100]
  yield from (row(part, f'{part["part"] or "(no name)"}, {part["pass"]}') for part in large)
  rest = [part for part in found['parts'] if part not in large]
  together = {key: sum(part[key] for part in rest) for key in ('seconds', 'count')}
  yield row(together, f'{len(rest)} more')


def _speed(found: Mapping[str, Any]) -> str:
  return found.get('error') or f'{found["frames_per_second"]:.1f} frames/s'
