"""Stepping Stones end to end: clips, a start, both stages, evaluations, report."""

import json
import time
from pathlib import Path

import ml_collections

from aavs_jax.configs import base
from aavs_jax.console import Progress, duration, say
from aavs_jax.hearing import hear
from aavs_jax.input_pipeline import files, prepared
from aavs_jax.input_pipeline.compose.dataset import compose
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.index import read_index, require_classes
from aavs_jax.scoring import tables
from aavs_jax.stepping_stones import Evaluation, scores, stepping_stones
from aavs_jax.studies.report import STUDY, write_report
from aavs_jax.train import train


def run_study(
  config: ml_collections.ConfigDict, workdir: str | Path, data: str = '', fresh: bool = False
) -> Path:
  """Runs a study (configs/quickstart.py), or what is left of it; each part is reused if complete.

  Args:
    config: the study.
    workdir: where everything goes; a study of another config there is refused.
    data: a data set in the AVSBench-semantic layout; '' makes one.
    fresh: remove what an earlier run of a study left in workdir first.

  Returns:
    The report of the first seed; each seed has one, in its folder.

  Raises:
    UserError: workdir holds something else, or a study with other settings; `data` is inside a
      workdir that is to be removed; faults of config or data.
  """
  # However they are written, the same folders are the same study.
  workdir = Path(workdir).resolve()
  data = str(Path(data).resolve()) if data else ''
  started = time.monotonic()
  _refuse_foreign(workdir)
  if fresh:
    if data and Path(data).is_relative_to(workdir):
      raise UserError(
        f'--data {data} is inside {workdir}, which --fresh deletes: move the data set elsewhere'
      )
    files.remove_folder(workdir)
  _claim(workdir, {'data': data, 'config': json.loads(config.to_json_best_effort())})

  say('[1] clips')
  if not data:
    data = str(workdir / 'data')
    _make_clips(config, data)
  index = read_index(data)  # checked now, not after stage 1
  require_classes(index)
  prepared.require_files(index)  # the report shows them
  alone = len(config.seeds) == 1
  folders = {seed: workdir if alone else workdir / f'seed{seed}' for seed in config.seeds}
  results = [_run_seed(config, folder, data, seed) for seed, folder in folders.items()]
  say('[7] report')
  reports = [write_report(folder, data) for folder in folders.values()]
  if config.end_to_end:
    comparison = _compare(results)
    files.write_json(workdir / 'comparison.json', comparison)
    say(_format_comparison(comparison))
  say(f'done in {duration(time.monotonic() - started)}; open {" or ".join(map(str, reports))}')
  return reports[0]


def _make_clips(config: ml_collections.ConfigDict, root: str) -> None:
  clips = config.clips.to_dict()
  total = sum(sum(subsets.values()) for subsets in clips.values())
  with Progress('making clips', total, 'clips') as progress:
    compose(
      root,
      clips=clips,
      num_classes=config.num_classes,
      size=tuple(config.image),
      progress=lambda done, _: progress.advance_to(done),
    )


def _started(stage, folder: Path, data: str, seed: int) -> ml_collections.ConfigDict:
  """Stage 1 with its start, which learns to hear here if the config names none."""
  stage = stage.copy_and_resolve_references()
  if stage.train.init:
    say(f'  as given: {stage.train.init}')
    return stage
  stage.seed = seed
  if folder.exists():
    say('  it is there')
  else:
    hear(stage, folder, data)
  stage.train.init = str(folder)
  return stage


def _run_seed(config, folder: Path, data: str, seed: int) -> dict[str, dict]:
  """The start, both stages and all evaluations of one seed; returns the evaluations by name."""
  say(f'[2] the start (seed {seed})')
  stage1 = _started(config.stage1, folder / 'start', data, seed)
  results = stepping_stones(stage1, config.stage2, folder, data=data, seed=seed)
  if config.end_to_end:
    single = _end_to_end(stage1, config.stage2)
    single.seed, single.data.root = seed, data
    say('    the same model end to end on semantic labels, for as many frames')
    train(single, folder / 'end_to_end')
    results |= scores({'end_to_end': Evaluation('end_to_end')}, folder, data=data, masks='')
  say(tables.format_table(list(results.values())))
  return results


def _end_to_end(stage1, stage2) -> ml_collections.ConfigDict:
  """Stage 2's task without a prior, from scratch, for the epochs of both stages."""
  single = stage2.copy_and_resolve_references()
  single.use_prior = False
  single.prior = base.get_config().prior
  single.data.masks = ''
  single.train.init = stage1.train.init
  single.train.trainable = stage1.train.trainable  # those of stage 2 may name keys of the prior
  single.train.epochs = stage1.train.epochs + stage2.train.epochs
  single.train.steps = stage1.train.steps + stage2.train.steps
  return single


def _compare(results: list[dict[str, dict]]) -> dict:
  """Mean and spread over seeds of AVSS mIoU and F for the ways to train."""
  table = {}
  for name in ('stage2_masks', 'stage2_oracle', 'end_to_end'):
    rows = [result[name]['overall'] for result in results]
    keys = ('miou', 'fscore', 'miou_no_background', 'miou_occurring')
    table[name] = {key: [row[key] for row in rows] for key in keys}
  pairs = [[result[f'stage1_{a}']['subsets'] for a in ('true', 'other')] for result in results]
  if 'v1m' in pairs[0][0]:
    differences = [true['v1m']['miou'] - other['v1m']['miou'] for true, other in pairs]
    table['listening_v1m'] = {'difference': differences}
  return table


def _format_comparison(table: dict) -> str:
  lines = ['  over seeds (each, then the mean):']
  for name, values in table.items():
    for key, numbers in values.items():
      each = ' '.join(f'{100 * x:5.1f}' for x in numbers)
      lines.append(f'  {name:14} {key:20} {each}   {100 * sum(numbers) / len(numbers):5.1f}')
  return '\n'.join(lines)


def _refuse_foreign(workdir: Path) -> None:
  """UserError for a folder that holds something, but no study."""
  found = workdir.exists() and any(not p.name.endswith(files.UNFINISHED) for p in workdir.iterdir())
  if found and not (workdir / STUDY).exists():
    raise UserError(
      f'{workdir} holds files but no {STUDY}, so it was not made by a study: name a new or empty '
      'folder with --workdir'
    )


def _claim(workdir: Path, settings: dict) -> None:
  mark = workdir / STUDY
  settings = json.loads(json.dumps(settings))
  if mark.exists():
    if files.read_json(mark, dict, 'restore it, or start anew with --fresh') != settings:
      raise UserError(
        f'{workdir} holds a study with other settings (see {mark}): name another --workdir, or '
        'start anew with --fresh'
      )
    return
  files.write_json(mark, settings)
