"""The training loop of one stage, from first to last step."""

import collections
import contextlib
import functools
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax
import ml_collections
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils

from aavs_jax import checkpoint, distributed, evaluate, flops, stages, steps, wandb_run, work_folder
from aavs_jax import config as config_lib
from aavs_jax.epochs import Length, length_of
from aavs_jax.input_pipeline import pipeline
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.interrupt import Stopped, StopSignal
from aavs_jax.lock import lock
from aavs_jax.logging import Clock, Writer, duration, say, step_line
from aavs_jax.mesh import batch_sharding, global_batch, make_mesh, state_sharding
from aavs_jax.methods import aavs
from aavs_jax.optimizer import make_optimizer
from aavs_jax.profiling import Profiler
from aavs_jax.state import TrainState, create, flatten

# Losses are looked at this many steps late, so that the host never waits for the device.
_LAG = 2


class _Phase(NamedTuple):
  """What a phase needs; all of it follows from the config."""

  step: Callable  # jitted train step
  schedule: optax.Schedule  # learning rate by step of the phase
  abstract: TrainState  # shapes and shardings of its state
  begin: Callable  # (first parameters, best ones of phase 1 or None, step=0) -> state


def train(
  config: ml_collections.ConfigDict,
  workdir: str | Path,
  *,
  profile: tuple[int, int] | None = None,
  wandb: str = '',
) -> dict[str, float]:
  """Trains one stage; called again after any interruption, goes on where it was.

  Writes config.json, metrics.jsonl and checkpoints/ into workdir. On the CPU an interrupted run
  reaches weights bit-identical to those of an uninterrupted one.

  Args:
    config: what to train.
    workdir: the run's folder, local or in a bucket.
    profile: trace the steps after the first up to the second number, into workdir/profile.
    wandb: project at Weights & Biases that takes the metrics too.

  Returns:
    Metrics of the best validation: 'miou', 'fscore' and 'step'.

  Raises:
    UserError: the config, the data or the folder is at fault.
    BlockingIOError: another run is in the folder.
    FloatingPointError: loss or gradient is not finite; names step, clips and last checkpoint.
  """
  workdir = epath.Path(workdir)  # also gs:// or s3://
  config_lib.check(config)
  if config.use_prior and not (config.data.masks or config.oracle_prior):
    raise UserError(
      "config.data.masks is empty: stage 2 validates with stage 1's masks, write them with "
      '`aavs masks` and name their folder'
    )
  clips = work_folder.read_clips(config, workdir)
  length = length_of(config, clips.train)
  profiler = Profiler(profile, workdir / 'profile', length.total)
  with lock(workdir):
    return _train(config, workdir, clips, length, profiler, wandb)


def _train(
  config: ml_collections.ConfigDict,
  workdir: epath.Path,
  clips: work_folder.Clips,
  length: Length,
  profiler: Profiler,
  wandb: str,
) -> dict[str, float]:
  """What `train` does once it has the folder for itself."""
  train_clips, val_clips, bad_clips = clips
  steps_per_epoch, total, _, boundary = length

  # Where it stands; the manager removes what a killed run has left of its last checkpoint.
  latest = checkpoint.latest_step(workdir / 'checkpoints')
  work_folder.claim(workdir, config, clips, latest)
  manager = checkpoint.make_manager(workdir / 'checkpoints', config.train.keep_checkpoints)
  # Stopped before the end of its validation, which then comes first.
  unscored = latest is not None and length.validates(latest) and manager.metrics(latest) is None
  if latest == total and not unscored:
    return _result(manager, workdir)
  start = work_folder.load_start(config, needed=latest is None or bool(boundary))
  work_folder.claim_inputs(workdir, config, val_clips, start, latest)

  # What: parameters, and for each phase its optimiser, state layout and compiled step.
  method = aavs(config)
  mesh = make_mesh(config.mesh.fsdp)
  key = jax.random.key(config.seed)

  def init(key):
    return flatten(method.init(key))

  # Created where they will be: no device holds more than its part of the model.
  places = state_sharding(mesh, jax.eval_shape(init, key))
  fresh = jax.jit(init, out_shardings=places)(key)
  first, lacking = stages.first_params(fresh, start, stages.start_lacks(config))
  del fresh, start
  abstract_params = jax.eval_shape(lambda: first)

  @functools.cache
  def phase_tools(phase):
    count = (boundary if phase == 1 and boundary else total) - (boundary if phase == 2 else 0)
    lr = config.optimizer.lr if phase == 1 else config.optimizer.lr_phase2
    optimizer, schedule = make_optimizer(config.optimizer, lr, count)
    paths = stages.trainable_paths(config, abstract_params, phase)

    def make_state(first, best=None, step=0):
      params = stages.params_of_phase(config, phase, first, best)
      return create(params, paths, optimizer, step, config.train.frozen_dtype)

    abstract = jax.eval_shape(make_state, abstract_params, abstract_params)
    sharding = state_sharding(mesh, abstract)
    abstract = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
      abstract,
      sharding,
    )
    step = jax.jit(
      functools.partial(
        steps.train_step,
        method=method,
        optimizer=optimizer,
        accumulate=config.train.accumulate,
      ),
      donate_argnums=0,
      out_shardings=(sharding, None),
    )
    begin = jax.jit(make_state, static_argnames='step', out_shardings=sharding)
    return _Phase(step, schedule, abstract, begin)

  # Where to begin: the latest checkpoint, or the first parameters.
  if latest is None:
    phase = 1
    state = phase_tools(1).begin(first)
  else:
    phase = checkpoint.saved_phase(manager, latest)
    state = checkpoint.restore(manager, latest, phase_tools(phase).abstract)
  first = stages.needed_later(config, first)
  step = int(state.step)
  others = wandb_run.begin(wandb, workdir, config)
  writer = Writer(
    workdir, step, unscored=unscored, silent=not distributed.is_first(), others=others
  )
  work_folder.announce(
    config, workdir, lacking, phase_tools(phase).abstract, len(train_clips), total, step
  )
  if bad_clips and not step:
    writer.write('data', step=0, bad_clips=len(bad_clips))

  batches = pipeline.training_batches(
    train_clips,
    config_lib.task_of(config),
    item_frames=config.data.item_frames,
    batch_items=config.data.batch_items,
    seed=config.seed,
    start=step,
    threads=config.data.threads,
    workers=config.data.workers,
    process=jax.process_index(),
    processes=jax.process_count(),
  )
  predictor = evaluate.Predictor(method)
  compiled = {}  # by phase and frames of the batch: with whole clips, v2's are longer
  in_flight = collections.deque()  # (step, clip indices, metrics) not yet looked at
  clock = Clock(step)
  stop = StopSignal()

  def look(keep: int) -> None:
    """Stops on a loss or gradient that is not finite, in all but the newest `keep` steps."""
    while len(in_flight) > keep:
      at, clips, metrics = in_flight.popleft()
      # A gradient that is not finite spoils the parameters, though this step's loss is still good.
      loss, norm = float(metrics['loss']), float(metrics['gradient_norm'])
      if not np.isfinite([loss, norm]).all():
        saved = manager.latest_step()
        raise FloatingPointError(
          f'the loss of step {at} is {loss} and its gradient {norm} on clips '
          f'{", ".join(train_clips[i].uid for i in dict.fromkeys(clips.tolist()))}; the last good '
          f'checkpoint is {"none" if saved is None else workdir / "checkpoints" / str(saved)}: '
          'lower optimizer.lr or look at these clips'
        )

  def save(metrics: dict[str, float] | None) -> None:
    look(0)
    checkpoint.save(manager, state, phase, metrics)

  def validate() -> dict[str, float]:
    look(0)
    on_clip = stop.after_each(len(val_clips))
    with clock.validating():
      result = evaluate.score(
        config, predictor, state.params, val_clips, on_clip=on_clip, title='validation'
      )
    scores = {name: float(result['overall'][name]) for name in ('miou', 'fscore')}
    writer.write('val', step=step, epoch=step / steps_per_epoch, phase=phase, **scores)
    say(f'  step {step}  validation mIoU {scores["miou"]:.4f}  F {scores["fscore"]:.4f}')
    return scores

  def leave() -> NoReturn:
    if manager.latest_step() != step:
      save(None)
    manager.wait_until_finished()
    say(f'stopped by a signal at step {step}; the same command goes on from there')
    # Ended in good order for whoever sent SIGTERM; Ctrl-C ends what comes after as well.
    raise SystemExit(0 if stop.received == signal.SIGTERM else 130)

  with stop, profiler, contextlib.closing(batches), contextlib.closing(writer):
    profiler.at(step, state)
    if unscored:
      try:
        checkpoint.add_metrics(manager, step, validate())
      except Stopped:
        leave()
    while step < total:
      if stages.phase_at(config, step, steps_per_epoch) != phase:
        phase = 2
        manager.wait_until_finished()
        best = checkpoint.best_step(manager)
        best = checkpoint.restore(manager, best, phase_tools(1).abstract)
        state = phase_tools(2).begin(first, {**best.trained, **best.frozen}, step=step)
        del best
        say(f'phase 2 from step {step}: the best weights so far, Swin adapters anew')
      with clock.waiting():
        batch = next(batches)
      clips = batch.pop('clip')
      # The host is up to _LAG steps ahead, and neither this nor the step's call waits for a device:
      # the next batch travels while the devices are at the steps before it.
      batch = global_batch(batch, batch_sharding(mesh))
      if (phase, len(clips)) not in compiled:
        with clock.paused(), jax.set_mesh(mesh):
          compiled[phase, len(clips)] = _compile(config, phase_tools(phase).step, state, batch, key)
          distributed.wait_for_all(f'compiled for step {step}')
      run, work = compiled[phase, len(clips)]
      with jax.profiler.StepTraceAnnotation('train', step_num=step):
        state, metrics = run(state, batch, key)
      step += 1
      clock.frames += len(batch['weight'])
      clock.flops += work
      profiler.at(step, state)
      in_flight.append((step, clips, metrics))
      look(_LAG)

      if step % config.train.log_every_steps == 0 or step == total:
        values = {name: float(value) for name, value in metrics.items()}
        lr = float(phase_tools(phase).schedule(step - 1 - (boundary if phase == 2 else 0)))
        look(0)
        pace = clock.read(step, total, length.validations(step))
        pace |= flops.speed(pace.pop('flops_per_second'), flops.peak())
        pace |= _slowest_input(pace['input_wait'])
        epoch = step / steps_per_epoch
        row = dict(step=step, epoch=epoch, phase=phase, **values, learning_rate=lr, **pace)
        writer.write('train', **row)
        say(step_line(row, total))
      try:
        stop.check()
        if length.validates(step):
          save(validate())
        elif step % config.train.checkpoint_every_steps == 0:
          save(None)
      except Stopped:
        leave()
  return _result(manager, workdir)


def _result(manager, workdir: epath.Path) -> dict[str, float]:
  manager.wait_until_finished()
  best = checkpoint.best_step(manager)
  result = {**manager.metrics(best), 'step': best}
  manager.close()
  say(f'  best validation mIoU {result["miou"]:.4f} at step {best}; weights in {workdir}')
  return result


def _slowest_input(wait: float) -> dict[str, float]:
  """The largest share of waiting for input of all processes, and whose it is of several."""
  waits = multihost_utils.process_allgather(np.float32(wait)).reshape(-1)
  slowest = int(waits.argmax())
  process = {'input_wait_process': slowest} if len(waits) > 1 else {}
  return {'input_wait': float(waits[slowest]), **process}


def _compile(config, step, state, batch, key):
  """The compiled step, and the FLOPs of the model in one run of it."""
  started = time.monotonic()
  say(f'  compiling the training step for {len(batch["weight"])} frames ...')
  compiled = step.lower(state, batch, key).compile()
  work = flops.step_flops(config, state, batch)
  say(f'  compiled in {duration(time.monotonic() - started)}')
  return compiled, work
