"""Stepping Stones end to end: clips, a start, both stages, evaluations, report."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import ml_collections
from etils import epath

from aavs_jax import methods
from aavs_jax.configs import base
from aavs_jax.console import Progress, duration, say
from aavs_jax.cross_fit import cross_fit
from aavs_jax.hearing import hear
from aavs_jax.input_pipeline import files, listening, prepared
from aavs_jax.input_pipeline.compose.dataset import compose
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.index import read_index, require_classes
from aavs_jax.scoring import tables
from aavs_jax.stepping_stones import EVALUATIONS, FOLDS, Evaluation, scores, stepping_stones
from aavs_jax.studies import comparison
from aavs_jax.studies.report import STUDY, write_report
from aavs_jax.train import train
from aavs_jax.training.lock import LEASE, LOCK, lock
from aavs_jax.training.start import require_same_meaning

_ROBUST = {
  f'robust_{prior}': Evaluation('robust', prior=prior) for prior in ('masks', 'oracle', 'none')
}


def run_study(
  config: ml_collections.ConfigDict, workdir: str | Path, data: str = '', fresh: bool = False
) -> Path:
  """Runs a study (configs/quickstart.py), or what is left of it; each part is reused if complete.

  Args:
    config: the study. With several numbers of classes (configs/compose_bench.py) or methods
      (configs/methods_study.py) it is a study of each, in a folder of its own, and a comparison.
    workdir: where everything goes; a study of another config there is refused.
    data: a data set in the AVSBench-semantic layout; '' makes one.
    fresh: remove what an earlier run of a study left in workdir first.

  Returns:
    The page to open: the report of the first seed, each of which has one in its folder, or the
    comparison.

  Raises:
    BlockingIOError: this study goes on in another process.
    UserError: workdir holds something else, or a study with other settings; `data` is inside a
      workdir that is to be removed, or given where the study makes clips of its own; faults of
      config or data.
  """
  for path in (workdir, data):
    files.refuse_bucket(path)
  # However they are written, the same folders are the same study.
  workdir = Path(workdir).resolve()
  data = str(Path(data).resolve()) if data else ''
  several = not isinstance(config.num_classes, int)
  if data and (several or config.looks is not None):
    raise UserError(
      f'--data {data} has classes and looks of its own, and this study makes clips of '
      f'{config.num_classes} classes: leave --data out, or take configs/quickstart.py'
    )
  _refuse_foreign(workdir)
  _require_starts(config)
  if fresh and workdir.exists():
    for name, path in {'--data': data, **_starts(config)}.items():
      if path and Path(path).resolve().is_relative_to(workdir):
        raise UserError(
          f'{name} {path} is inside {workdir}, which --fresh deletes: move it elsewhere'
        )
    with lock(epath.Path(workdir)):  # that of a study which goes on stays
      files.remove_folder(workdir)
  with lock(epath.Path(workdir)):
    return _run(config, workdir, data, several or bool(config.others))


def _run(config: ml_collections.ConfigDict, workdir: Path, data: str, several: bool) -> Path:
  """`run_study` in a folder that is this process's alone; `several`: of a study of each."""
  started = time.monotonic()
  _claim(workdir, {'data': data, 'config': json.loads(config.to_json_best_effort())})
  if several:
    tables = {}
    for key, one, clips in _studies(config, workdir, data):
      say(comparison.title(key))
      folder = workdir / (key if config.others else f'classes{key}')
      run_study(one, folder, clips)
      found = files.read_json(folder / 'comparison.json', dict, 'remove it')
      (tables[key],) = found.values()
    comparison.write(workdir, tables)
    pages = [workdir / 'comparison.html']
  else:
    pages = _run_one(config, workdir, data)
  say(f'done in {duration(time.monotonic() - started)}; open {" or ".join(map(str, pages))}')
  return pages[0]


def _starts(config: ml_collections.ConfigDict) -> dict[str, str]:
  """What is named as the start of a stage, by the key that names it."""
  found = {}
  for key in ('stage1', 'stage2', 'looks', 'robust'):
    if config[key] is not None:
      found[f'config.{key}.train.init'] = config[key].train.init
  for name, stages in config.others.items():
    for key in ('stage1', 'stage2'):
      found[f'config.others.{name}.{key}.train.init'] = stages[key].train.init
  return found


def _require_starts(config: ml_collections.ConfigDict) -> None:
  """UserError where stage 2 is to begin with what stage 1 has learnt and cannot."""
  for stages in (config, *config.others.values()):
    if config.looks is None and not stages.stage2.train.init:
      same = methods.of(stages.stage2).must_match
      require_same_meaning(
        stages.stage2, stages.stage1, 'stage 1, with which stage 2 begins,', same
      )


def _studies(
  config: ml_collections.ConfigDict, workdir: Path, data: str
) -> Iterator[tuple[int | str, ml_collections.ConfigDict, str]]:
  """What is compared, a number of classes or a method; the study of it; and its data, or ''."""
  if not config.others:
    for number in config.num_classes:
      one = config.copy_and_resolve_references()
      with one.ignore_type():
        one.num_classes = number
      yield number, one, ''
    return
  if not data:
    data = str(workdir / 'data')
    _make_clips(config, data)
  for name, stages in {config.stage1.method: config, **config.others}.items():
    one = config.copy_and_resolve_references()
    one.stage1, one.stage2 = stages.stage1, stages.stage2
    one.others = {}
    yield name, one, data


def _run_one(config: ml_collections.ConfigDict, workdir: Path, data: str) -> list[Path]:
  """All seeds on one data set; returns their pages."""
  say('[1] clips')
  made = not data
  if made:
    data = str(workdir / 'data')
    _make_clips(config, data)
  index = read_index(data)  # checked now, not after stage 1
  require_classes(index)
  prepared.require_files(index)  # the report shows them
  # With which stage 1 is evaluated: what cannot be shows now, and not after both stages.
  listening.other_sounds(read_index(data, 'test', config.stage1.data.subsets))
  alone = len(config.seeds) == 1
  folders = {seed: workdir if alone else workdir / f'seed{seed}' for seed in config.seeds}
  results = [_run_seed(config, folder, data, seed) for seed, folder in folders.items()]
  say('[7] report')
  reports = [write_report(folder, data) for folder in folders.values()]
  if len(results[0]) > len(EVALUATIONS):  # there is more than one way
    found = results[0]['stage2_masks']['per_class']
    occurring = sum(row['frames'] > 0 for row in found if row['id'])
    comparison.write(
      workdir, {config.num_classes if made else occurring: comparison.compare(results)}
    )
    return [workdir / 'comparison.html', *reports]
  return reports


def _make_clips(
  config: ml_collections.ConfigDict, root: str, *, seed: int = 0, visible: bool = False
) -> None:
  clips = config.clips.to_dict()
  if visible:
    clips = {split: of for split, of in clips.items() if split != 'test'}
  total = sum(sum(subsets.values()) for subsets in clips.values())
  with Progress('making clips', total, 'clips') as progress:
    compose(
      root,
      clips=clips,
      num_classes=config.num_classes,
      size=tuple(config.image),
      seed=seed,
      visible=visible,
      progress=lambda done, _: progress.advance_to(done),
    )


def _start(config: ml_collections.ConfigDict, folder: Path, data: str, seed: int) -> str:
  """What the stages begin with: what config.stage1 names, or what learns here to hear, and see."""
  if config.stage1.train.init:
    say(f'  as given: {config.stage1.train.init}')
    return config.stage1.train.init
  start = folder / 'start'
  if start.exists():
    say('  it is there')
  else:
    hearing = config.stage1.copy_and_resolve_references()
    hearing.seed = seed
    hear(hearing, start, data)
  if config.looks is None:
    return str(start)
  say('    the looks of the classes, from silent clips in which all is labelled')
  looks = config.looks.copy_and_resolve_references()
  looks.seed, looks.train.init, looks.data.root = seed, str(start), f'{data}_looks'
  _make_clips(config, looks.data.root, seed=1, visible=True)
  train(looks, folder / 'looks')
  return str(folder / 'looks')


def _run_seed(config, folder: Path, data: str, seed: int) -> dict[str, dict]:
  """The start, both stages and all evaluations of one seed; returns the evaluations by name."""
  say(f'[2] the start (seed {seed})')
  stage1, stage2 = (stage.copy_and_resolve_references() for stage in (config.stage1, config.stage2))
  stage1.train.init = _start(config, folder, data, seed)
  if config.looks is not None:  # as the published stages, which begin with the same
    stage2.train.init = stage2.train.init or stage1.train.init
  results = stepping_stones(stage1, stage2, folder, data=data, seed=seed)
  if config.end_to_end:
    single = _end_to_end(stage1, stage2)
    single.seed, single.data.root = seed, data
    say('    the same model end to end on semantic labels, for as many frames')
    train(single, folder / 'end_to_end')
    results |= scores({'end_to_end': Evaluation('end_to_end')}, folder, data=data, masks='')
  if config.robust is not None:
    robust = config.robust.copy_and_resolve_references()
    # It is to do without a mask as well, so it begins with what does.
    begins = str(folder / 'end_to_end') if config.end_to_end else stage2.train.init
    robust.train.init = robust.train.init or begins or str(folder / 'stage1')
    results |= _robust(stage1, robust, folder, data, seed)
  say(tables.format_table(list(results.values())))
  return results


def _robust(stage1, stage2, folder: Path, data: str, seed: int) -> dict[str, dict]:
  """Stage 2 once more, trained on what it will meet; its evaluations by name."""
  masks = folder / 'masks'
  if stage2.prior.predicted:
    say("    stage 1's masks of the training clips, by models that have not been trained on them")
    stage1 = stage1.copy_and_resolve_references()
    stage1.seed = seed
    cross_fit(
      stage1, folder / 'cross_fit', data=data, out=masks, folds=FOLDS, soft=stage2.prior.soft
    )
  say('    stage 2 with a robust prior')
  stage2.seed, stage2.data.root, stage2.data.masks = seed, data, str(masks)
  train(stage2, folder / 'robust')
  return scores(_ROBUST, folder, data=data, masks=masks)


def _end_to_end(stage1, stage2) -> ml_collections.ConfigDict:
  """Stage 2's task without a prior, from the start, for the epochs of both stages."""
  single = stage2.copy_and_resolve_references()
  single.use_prior = single.oracle_prior = False
  single.prior = base.get_config().prior
  single.data.masks = ''
  single.train.init = stage1.train.init
  single.train.trainable = stage1.train.trainable  # those of stage 2 may name keys of the prior
  single.train.epochs = stage1.train.epochs + stage2.train.epochs
  single.train.steps = stage1.train.steps + stage2.train.steps
  if all(stage.train.eval_every_steps == stage.train.steps for stage in (stage1, stage2)):
    single.train.eval_every_steps = single.train.steps  # chosen at the end alone, as they are
  return single


def _refuse_foreign(workdir: Path) -> None:
  """UserError for a folder that holds something, but no study."""
  names = [path.name for path in workdir.iterdir()] if workdir.exists() else []
  found = any(name not in (LOCK, LEASE) and not name.endswith(files.UNFINISHED) for name in names)
  if found and not (workdir / STUDY).exists():
    raise UserError(
      f'{workdir} holds files but no {STUDY}, so it was not made by a study: name a new or empty '
      'folder with --workdir'
    )


def _first_difference(begun: dict, now: dict, above: str = '') -> str | None:
  """The first key in which they differ; one that only `now` has may be new in this version."""
  for key, old in begun.items():
    new, name = now.get(key), f'{above}{key}'
    if isinstance(old, dict) and isinstance(new, dict):
      if found := _first_difference(old, new, f'{name}.'):
        return found
    elif key not in now or old != new:
      return name
  return None


def _claim(workdir: Path, settings: dict) -> None:
  mark = workdir / STUDY
  settings = json.loads(json.dumps(settings))
  if mark.exists():
    begun = files.read_json(mark, dict, 'restore it, or start anew with --fresh')
    if key := _first_difference(begun, settings):
      raise UserError(
        f'{workdir} holds a study with other settings ({key}, see {mark}): name another --workdir, '
        'or start anew with --fresh'
      )
    return
  files.write_json(mark, settings)
