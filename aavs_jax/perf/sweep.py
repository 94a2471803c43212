"""What one accelerator can tell in a few minutes: speed by batch, dtype and form, peer, kernels."""

import collections
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
from aavs_jax.perf import bench, peer
from aavs_jax.perf.bench import TITLES

CLIP_FRAMES = 5
CLIPS = (16, 64, 32, 4, 1)  # of a batch; first what tells most
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


def cases(modes: Mapping[str, str]) -> Iterator[Case]:
  """All measurements, what tells most first: time may end before they do.

  Args:
    modes: of the peer, the best first, and the dtype of ours that each is compared with.
  """
  first = Case('ours', 'step', 2, 2, 'bfloat16', 'dense', CLIPS[0])
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
  for what in TITLES:
    yield from new(what=what, sampling='gather')
  for clips in CLIPS[2:]:
    for what in TITLES:
      yield from new(what=what, clips=clips)
  for what in TITLES:
    yield from new(what=what, dtype='float32')
  yield from new(phase=1)
  for phase in (2, 1):
    yield from new(stage=1, phase=phase)
  yield from new(stage=1, what='predict')
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
  """
  end = time.monotonic() + 60 * minutes
  platform, device = bench.in_child(_device)
  kind = {'cpu': 'cpu', 'gpu': 'cuda', 'cuda': 'cuda'}.get(platform)
  modes = _peer_modes(kind, progress)
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

  for number, case in enumerate(cases(modes)):
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


def _device() -> tuple[str, str]:
  return jax.default_backend(), jax.devices()[0].device_kind


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
  """The kernels of one training step, see `traced`."""
  batch = bench.place(config, frames)
  compiled = bench.compile_step('step', config, batch, phase)
  state = compiled.make_state(jax.random.key(config.seed))
  state, _ = jax.block_until_ready(compiled.run(state, batch))
  return traced(lambda: compiled.run(state, batch))


def traced(run: Callable[[], Any]) -> dict[str, Any]:
  """The kernels in which the device spends most of its time.

  Args:
    run: what it is to do; compiled already.

  Returns:
    'seconds' of all kernels, their number 'count', and 'largest': name, seconds and count of each.
  """
  seconds, number = collections.Counter(), collections.Counter()
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      jax.block_until_ready(run())
    (file,) = Path(folder).rglob('*.xplane.pb')
    for name, nanoseconds in _events(jax.profiler.ProfileData.from_file(str(file))):
      seconds[name] += nanoseconds / 1e9
      number[name] += 1
  return {
    'seconds': sum(seconds.values()),
    'count': sum(number.values()),
    'largest': [
      {'name': name, 'seconds': spent, 'count': number[name]}
      for name, spent in seconds.most_common(KERNELS)
    ],
  }


def _events(trace: jax.profiler.ProfileData) -> Iterator[tuple[str, float]]:
  """Name and nanoseconds of every kernel; on the CPU of every operation."""
  for plane in trace.planes:
    for line in plane.lines:
      of_device = plane.name.startswith('/device:') and line.name.startswith('Stream')
      of_host = plane.name == '/host:CPU' and 'XLA' in line.name
      if of_device or of_host:
        yield from ((event.name, event.duration_ns) for event in line.events)


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
    found = result['kernels']
    lines += [
      '',
      f'A training step of stage 2, phase 2, {CLIPS[0]} clips, is {found["count"]} kernels, '
      f'{1e3 * found["seconds"]:.1f} ms; the largest:',
      '',
      '| ms | share | times | kernel |',
      '|---|---|---|---|',
    ]
    lines += [
      f'| {1e3 * kernel["seconds"]:.2f} | {kernel["seconds"] / found["seconds"]:.1%} '
      f'| {kernel["count"]} | {kernel["name"][:80]} |'
      for kernel in found['largest']
    ]
  return '\n'.join(lines)


def _speed(found: Mapping[str, Any]) -> str:
  return found.get('error') or f'{found["frames_per_second"]:.1f} frames/s'
