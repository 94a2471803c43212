"""The training loop of one stage, from first to last step."""

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from aavs_jax import config as config_lib
from aavs_jax import methods
from aavs_jax.console import duration, say
from aavs_jax.devices import distributed
from aavs_jax.devices.interrupt import Stopped, StopSignal
from aavs_jax.devices.mesh import batch_sharding, global_batch, make_mesh
from aavs_jax.devices.profiling import Profiler
from aavs_jax.input_pipeline import files, masks, pipeline
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.host import give_back_freed
from aavs_jax.scoring import score
from aavs_jax.scoring.predictor import Predictor
from aavs_jax.training import checkpoint, flops, metric_log, phases, start, wandb_run, work_folder
from aavs_jax.training.lock import lock
from aavs_jax.training.programs import Programs, compile_step, step_name
from aavs_jax.training.state import Flat
from aavs_jax.training.watch import Watch
from aavs_jax.training.watchdog import Watchdog


def train(
  config: ml_collections.ConfigDict,
  workdir: str | Path,
  *,
  profile: tuple[int, int] | None = None,
  wandb: str = '',
  keep_programs: bool = False,
) -> dict[str, float]:
  """Trains one stage; called again after any interruption, goes on where it was.

  Writes config.json, metrics.jsonl and checkpoints/ into workdir. On the CPU an interrupted run
  reaches weights bit-identical to those of an uninterrupted one. One that stands still, see
  config.train.stuck_after, ends the process.

  Args:
    config: what to train.
    workdir: the run's folder, local or in a bucket.
    profile: trace the steps after the first up to the second number, into workdir/profile.
    wandb: project at Weights & Biases that takes the metrics too.
    keep_programs: keep the compiled step beside what JAX keeps, if it keeps anything, for the next
      start, see Programs; for a process whose code is that of its files.

  Returns:
    Metrics of the best validation: 'miou', 'fscore' and 'step'.

  Raises:
    UserError: the config, the data or the folder is at fault.
    BlockingIOError: another run is in the folder.
    FloatingPointError: loss or gradient is not finite; names step, clips and last checkpoint.
  """
  for folder in (workdir, config.train.init):
    checkpoint.refuse_other_bucket(folder)
  workdir = epath.Path(workdir)  # also gs://
  config_lib.check(config)
  if workdir.exists() and not workdir.is_dir():
    raise UserError(f'{workdir} is a file: name a folder with --workdir')
  if '://' not in str(workdir):
    masks.refuse_data_set(workdir)
  files.refuse_bucket(config.data.masks)
  if config.use_prior and not (config.data.masks or config.oracle_prior):
    raise UserError(
      "config.data.masks is empty: stage 2 validates with stage 1's masks, write them with "
      '`aavs masks` and name their folder'
    )
  clips = work_folder.read_clips(config, workdir)
  epoch = pipeline.epoch_size(clips.train, config.data.item_frames, config.data.batch_items)
  unit = methods.of(config).unit
  phases.require_whole(config, clips.train, unit)
  plan = phases.plan(config, *epoch, unit)
  profiler = Profiler(profile, workdir / 'profile', plan.total)
  with lock(workdir):
    run = _Run(config, workdir, clips, plan)
    if run.is_finished:
      run.claim_inputs()
    else:
      run.begin(wandb, keep_programs)
      _loop(run, profiler)
    return run.result()


def _loop(run: '_Run', profiler: Profiler) -> None:
  """Every step that is left, with what comes between steps."""
  config, plan = run.config, run.plan
  batches = run.batches()
  # Nothing else is watched. The start reads data sets, masks and models for as long as that takes,
  # and shows no progress; after the last save, for which this waits, hardly anything is left.
  with run.dog, run.stop, profiler, contextlib.closing(batches), contextlib.closing(run.writer):
    profiler.at(run.step, run.state)
    try:
      if run.unscored:
        checkpoint.add_metrics(run.manager, run.step, run.validate())
      while run.step < plan.total:
        if plan.phase_at(run.step) != run.phase:
          run.enter_phase_2()
          run.dog.fed(run.step)
        with run.clock.waiting():
          batch = next(batches)
        metrics = run.take_step(batch)
        profiler.at(run.step, run.state)
        if run.step % config.train.log_every_steps == 0 or run.step == plan.total:
          run.log(metrics)
        run.stop.check()
        if plan.validates(run.step):
          run.save(run.validate())
        elif run.step % config.train.checkpoint_every_steps == 0:
          run.save()
      # While a signal is only noted: it would end the process in the middle of the last save.
      run.finish_save()
      run.stop.check()
    except Stopped:
      run.leave()
    except Exception:
      # Or the interpreter ends in the middle of the last checkpoint, which is lost.
      run.manager.wait_until_finished()
      raise


class _Run:
  """A training in its work folder, which this process has for itself."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    clips: work_folder.Clips,
    plan: phases.Plan,
  ):
    self.config, self.workdir, self.clips, self.plan = config, workdir, clips, plan
    # Where it stands; the manager removes what a killed run has left of its last checkpoint.
    latest = checkpoint.latest_step(workdir / 'checkpoints')
    work_folder.claim(workdir, config, clips, latest)
    self.manager, self._save_failed = self._make_manager(), False
    if self.manager.latest_step() != latest:  # it would go on from another than is compared below
      raise OSError(f'{workdir / "checkpoints"} cannot be read reliably now: try again')
    # Stopped before the end of its validation, which then comes first.
    self.unscored = (
      latest is not None and plan.validates(latest) and self.manager.metrics(latest) is None
    )
    self.latest = latest
    self.phase = 1 if latest is None else checkpoint.saved_phase(self.manager, latest)
    # Whether a phase is still to begin, for which alone a start is needed.
    self.begins = latest is None or self.phase < plan.phase_at(plan.total - 1)
    self.is_finished = latest == plan.total and not self.unscored

  def _make_manager(self) -> ocp.CheckpointManager:
    folder = self.workdir / 'checkpoints'
    return checkpoint.make_manager(folder, self.config.train.keep_checkpoints)

  def claim_inputs(self) -> Flat | None:
    """The start, once it and the masks are what the run began with.

    Of a finished run as well: its result would be taken for one of other inputs.
    """
    given = work_folder.load_start(self.config, methods.of(self.config), needed=self.begins)
    work_folder.claim_inputs(
      self.workdir, self.config, self.clips, given, self.latest, goes_on=not self.is_finished
    )
    if self.latest is not None:
      work_folder.keep_config(self.workdir, self.config)
    return given

  def begin(self, wandb: str, keep_programs: bool) -> None:
    """Builds what is trained, as it was left or from its start, and says so."""
    config, workdir, plan, latest = self.config, self.workdir, self.plan, self.latest
    method, mesh = methods.of(config), make_mesh(config.mesh.fsdp)
    self.method, self.mesh = method, mesh
    kept = jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir
    self._programs = Programs(kept if keep_programs else None, workdir, config, method, mesh)
    self.key = key = jax.random.key(config.seed)
    given = self.claim_inputs()
    # Asked now, and not when phase 2 begins: the start may be gone by then.
    lacks = start.start_lacks(config) if self.begins else ()
    if latest is None:
      first, lacking, shapes = start.first(config, method, mesh, key, given, lacks)
      self._programs.keep_shapes(shapes)
      later = phases.needed_later(config, method, first)
      self._later = lambda: later
    else:
      lacking, shapes = [], self._programs.shapes()
      later = phases.needed_later(config, method, given) if given and self.begins else None
      # Drawn when its time comes, which need not be in this process.
      self._later = lambda: start.first(config, method, mesh, key, later, lacks, resumed=True)[0]
    del given

    @functools.cache
    def phase_of(number: int) -> phases.Phase:
      # Of nothing that holds the state, which goes with the run and not when memory is looked for.
      return phases.build(config, method, mesh, number, plan.steps_of(number), shapes)

    self.phase_of = phase_of
    if latest is None:
      self.state = self.phase_of(1).begin(first)
    else:
      abstract = self.phase_of(self.phase).abstract
      self.state = checkpoint.restore(self.manager, latest, abstract)
    self.step = int(self.state.step)

    self.writer = metric_log.Writer(
      workdir,
      self.step,
      unscored=self.unscored,
      silent=not distributed.is_first(),
      others=wandb_run.begin(wandb, workdir, config),
    )
    abstract = self.phase_of(self.phase).abstract
    work_folder.announce(
      config, workdir, lacking, abstract, len(self.clips.train), plan.total, self.step
    )
    if self.clips.bad and not self.step:
      self.writer.write('data', step=0, bad_clips=len(self.clips.bad))
    self._predictor = Predictor(self.method)
    self._compiled = {}  # by phase and frames of the batch: with whole clips, v2's are longer
    self._counting, self._work = ThreadPoolExecutor(1), []  # FLOPs of each step since the last row
    self._keeping = ThreadPoolExecutor(1)  # may wait for a bucket, for which no row is to wait
    self.clock, self.stop = metric_log.Clock(self.step), StopSignal()
    self._scores = None, None  # of the last validation, with its step
    self.dog = Watchdog(config.train.stuck_after, self.step)
    self._watch = Watch(
      [clip.uid for clip in self.clips.train], lambda: self.manager.latest_step(), workdir
    )

  def batches(self) -> Iterator[dict[str, np.ndarray]]:
    """Those from the next step on."""
    data = self.config.data
    return pipeline.training_batches(
      self.clips.train,
      config_lib.task_of(self.config),
      item_frames=data.item_frames,
      batch_items=data.batch_items,
      seed=self.config.seed,
      start=self.step,
      threads=data.threads,
      workers=data.workers,
      process=jax.process_index(),
      processes=jax.process_count(),
    )

  def take_step(self, batch: dict[str, np.ndarray]) -> Mapping[str, jax.Array]:
    """The next step; what it returns, and the state, may still be on its way."""
    clips = batch.pop('clip')
    # The host is a few steps ahead, and neither this nor the step's call waits for a device: the
    # next batch travels while the devices are at the steps before it.
    batch = global_batch(batch, batch_sharding(self.mesh))
    if (self.phase, len(clips)) not in self._compiled:
      self._compiled[self.phase, len(clips)] = self._compile(batch)
    run, work = self._compiled[self.phase, len(clips)]
    self._work.append(work)
    with jax.profiler.StepTraceAnnotation('train', step_num=self.step):
      self.state, metrics = run(self.state, batch, self.key)
    self.step += 1
    self.clock.frames += len(batch['weight'])
    self._watch.add(self.step, clips, metrics)
    self.dog.fed(self.step)
    return metrics

  def _compile(self, batch: dict[str, jax.Array]) -> tuple[Callable[..., Any], Future[int]]:
    """The compiled step, and the FLOPs of the model in one run of it."""
    phase, arguments = self.phase_of(self.phase), (self.state, batch, self.key)
    name = step_name(self.phase, self.plan.steps_of(self.phase), arguments)
    frames, started = len(batch['weight']), time.monotonic()
    with self.clock.paused(), jax.set_mesh(self.mesh):
      if kept := self._programs.step(name):
        (compiled, counted), work = kept, Future()
        work.set_result(counted)
        say(f'  the training step for {frames} frames is as an earlier run compiled it')
      else:
        say(f'  compiling the training step for {frames} frames ...')
        lowered = phase.step.lower(*arguments)
        # Seconds of Python, for which no step has to wait.
        shapes = jax.eval_shape(lambda: batch)
        work = self._counting.submit(flops.step_flops, self.config, phase.abstract, shapes)
        compiled, anew = compile_step(lowered)
        give_back_freed()
        say(f'  compiled in {duration(time.monotonic() - started)}')
        if anew:
          self._keeping.submit(self._programs.keep_step, name, compiled, work)
      self.dog.fed(self.step)
      distributed.wait_for_all(f'compiled for step {self.step}')
    return compiled, work

  def enter_phase_2(self) -> None:
    """From the best of phase 1 with what has waited; or from the last, by phase2_continues."""
    if self.method.phase2_continues:
      state, self.phase = self.state, 2
      self.state = self.phase_of(2).begin({}, state.flat, state.opt_state, step=self.step)
      say(f'phase 2 from step {self.step}: what has waited trains too')
      return
    self.finish_save()
    step, _ = checkpoint.best(self.manager)
    best = checkpoint.restore(self.manager, step, self.phase_of(1).abstract).flat
    self.phase = 2
    with self.clock.paused():
      later = self._later()
    self.state = self.phase_of(2).begin(later, best, step=self.step)
    say(f'phase 2 from step {self.step}: the best weights so far, what waited for it anew')

  def log(self, metrics: Mapping[str, jax.Array]) -> None:
    """A row of the last step and of the pace since the last row."""
    # What goes on counts on; what begins with phase 2 counts from there.
    last = self.step - 1
    count = last if self.method.phase2_continues else self.plan.step_of_phase(last)
    values = {name: float(value) for name, value in metrics.items()}
    self._watch.look()
    self.clock.flops = sum(work.result() for work in self._work)
    self._work.clear()
    pace = self.clock.read(self.step, self.plan.total, self.plan.validations(self.step))
    row = {
      **self._place(),
      **values,
      'learning_rate': float(self.phase_of(self.phase).schedule(count)),
      **pace,
      **metric_log.slowest_input(pace['input_wait']),
    }
    row |= flops.speed(row.pop('flops_per_second'), flops.peak())
    self.writer.write('train', **row)
    say(metric_log.step_line(row, self.plan.total))

  def _place(self) -> dict[str, float]:
    return {
      'step': self.step,
      'epoch': self.step / self.plan.steps_per_epoch,
      'phase': self.phase,
    }

  def validate(self) -> dict[str, float]:
    """Scores of the state on the validation clips. Raises Stopped."""
    self._watch.look()
    clips = self.clips.val
    stop_if_asked = self.stop.after_each(len(clips))

    def on_clip(*_):
      self.dog.fed(self.step)
      stop_if_asked()

    with self.clock.validating():
      result = score.score(
        self.config,
        self._predictor,
        self.state.variables,
        clips,
        on_clip=on_clip,
        title='validation',
      )
    scores = {name: float(result['overall'][name]) for name in ('miou', 'fscore')}
    self._scores = self.step, scores
    self.writer.write('val', **self._place(), **scores)
    say(f'  step {self.step}  validation mIoU {scores["miou"]:.4f}  F {scores["fscore"]:.4f}')
    return scores

  def save(self, metrics: dict[str, float] | None = None) -> None:
    """Saves the state, if it is good, in the background."""
    self._watch.look()
    self._mend_failed_save()
    checkpoint.save(self.manager, self.state, self.phase, metrics)
    self.dog.fed(self.step)  # it has waited for the save before

  def _mend_failed_save(self) -> None:
    """Says that the save before has failed, if so; the manager would refuse the next one for that.

    Raises:
      OSError: the one before it had failed too.
    """
    reason = ''
    try:
      self.manager.wait_until_finished()
    except Exception as error:  # of a disk, a bucket, or that it took too long
      reason = _reason(error)
    reasons = sorted(filter(None, distributed.gather(reason)))
    if not reasons:
      self._save_failed = False
      return
    text = f'the last checkpoint could not be saved ({reasons[0]})'
    if self._save_failed:
      raise OSError(f'{text}, nor could the one before it')
    self._save_failed = True
    say(f'  WARNING: {text}')
    self.manager = self._make_manager()

  def finish_save(self) -> None:
    """Waits until the state is saved, now if it was not or that has failed."""
    self._mend_failed_save()
    # As the first process finds it: another may see a shared disk later.
    if distributed.gather(self.manager.latest_step())[0] != self.step:
      step, scores = self._scores
      self.save(scores if step == self.step else None)
    self.manager.wait_until_finished()

  def leave(self) -> NoReturn:
    """Ends the process in good order, after a signal."""
    self.finish_save()
    say(f'stopped by a signal at step {self.step}; the same command goes on from there')
    # Ended in good order for whoever sent SIGTERM; Ctrl-C ends what comes after as well.
    raise SystemExit(0 if self.stop.received == signal.SIGTERM else 130)

  def result(self) -> dict[str, float]:
    """Metrics of the best validation, when all is written."""
    self.manager.wait_until_finished()
    step, metrics = checkpoint.best(self.manager)
    result = {**metrics, 'step': step}
    self.manager.close()
    say(f'  best validation mIoU {result["miou"]:.4f} at step {step}; weights in {self.workdir}')
    return result


def _reason(error: BaseException) -> str:
  """Why a save has failed: Orbax hands on what other threads or processes make of it."""
  cause = error
  while cause is not None and not (isinstance(cause, OSError) and cause.errno):
    cause = cause.__cause__ or cause.__context__
  return ' '.join(str(cause or error).split())[:200] or type(error).__name__
