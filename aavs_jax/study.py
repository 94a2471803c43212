"""Stepping Stones end to end: clips, stage 1, its masks, stage 2, evaluations, report."""

import json
import shutil
import time
from pathlib import Path

import ml_collections

from aavs_jax import evaluate, metrics
from aavs_jax.logging import Progress, duration, say
from aavs_jax.report import write_report
from aavs_jax.train import train
from input_pipeline.compose import compose
from input_pipeline.errors import UserError

_MARK = 'study.json'


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
    The report of the first seed.
  """
  workdir = Path(workdir)
  started = time.monotonic()
  if fresh and workdir.exists():
    if not (workdir / _MARK).exists():
      raise UserError(f'{workdir} was not made by a study, so --fresh will not delete it')
    shutil.rmtree(workdir)
  _claim(workdir, {'data': str(data), 'config': json.loads(config.to_json_best_effort())})

  say('[1] clips')
  if not data:
    data = str(workdir / 'data')
    clips = config.clips.to_dict()
    total = sum(sum(subsets.values()) for subsets in clips.values())
    with Progress('making clips', total, 'clips') as progress:
      compose(
        data,
        clips=clips,
        num_classes=config.num_classes,
        size=tuple(config.image),
        progress=lambda done, _: progress.advance_to(done),
      )
  results = []
  for seed in config.seeds:
    folder = workdir if len(config.seeds) == 1 else workdir / f'seed{seed}'
    results.append(_run_seed(config, folder, data, seed))
  say('[6] report')
  report = None
  for seed in config.seeds:
    folder = workdir if len(config.seeds) == 1 else workdir / f'seed{seed}'
    report = report or write_report(folder, data)
  if config.end_to_end:
    comparison = _compare(results)
    evaluate.write_json(workdir / 'comparison.json', comparison)
    say(_format_comparison(comparison))
  say(f'done in {duration(time.monotonic() - started)}; open {report}')
  return report


def _run_seed(config, folder: Path, data: str, seed: int) -> dict[str, dict]:
  """Both stages and all evaluations of one seed; returns the evaluations by name."""
  stage1, stage2 = (
    config.stage1.copy_and_resolve_references(),
    config.stage2.copy_and_resolve_references(),
  )
  for stage in (stage1, stage2):
    stage.seed = seed
    stage.data.root = data
  say(f'[2] stage 1: where the sound comes from (seed {seed})')
  train(stage1, folder / 'stage1')
  say("[3] stage 1's masks of val and test, the stepping stones of stage 2")
  written = evaluate.write_masks(folder / 'stage1', data=data, out=folder / 'masks')
  if not written:
    say('  all there')
  say('[4] stage 2: what it is')
  stage2.data.masks = str(folder / 'masks')
  stage2.train.init = str(folder / 'stage1')
  train(stage2, folder / 'stage2')

  say('[5] evaluation on the test split')
  plan = {f'stage1_{audio}': ('stage1', {'audio': audio}) for audio in evaluate.AUDIO}
  plan['stage2_masks'] = ('stage2', {'maps': folder / 'eval' / 'stage2_masks'})
  plan['stage2_oracle'] = ('stage2', {'oracle': True})
  if config.end_to_end:
    single = _end_to_end(stage1, stage2)
    say('    the same model end to end on semantic labels, for as many frames')
    train(single, folder / 'end_to_end')
    plan['end_to_end'] = ('end_to_end', {})
  results = {}
  for name, (stage, options) in plan.items():
    out = folder / 'eval' / f'{name}.json'
    if out.exists():
      results[name] = json.loads(out.read_text())
      continue
    results[name] = evaluate.evaluate(folder / stage, data=data, out=out, **options)
  say(metrics.format_table(list(results.values())))
  return results


def _end_to_end(stage1, stage2) -> ml_collections.ConfigDict:
  """Stage 2's task without a prior, from scratch, for the epochs of both stages."""
  single = stage2.copy_and_resolve_references()
  single.use_prior = False
  single.data.masks = ''
  single.train.init = ''
  single.train.epochs = stage1.train.epochs + stage2.train.epochs
  return single


def _compare(results: list[dict[str, dict]]) -> dict:
  """Mean and spread over seeds of AVSS mIoU and F for the ways to train."""
  table = {}
  for name in ('stage2_masks', 'stage2_oracle', 'end_to_end'):
    rows = [result[name]['overall'] for result in results]
    table[name] = {
      key: [row[key] for row in rows] for key in ('miou', 'fscore', 'miou_no_background')
    }
  table['listening_v1m'] = {
    'difference': [
      r['stage1_true']['subsets']['v1m']['miou'] - r['stage1_other']['subsets']['v1m']['miou']
      for r in results
    ]
  }
  return table


def _format_comparison(table: dict) -> str:
  lines = ['  over seeds (each, then the mean):']
  for name, values in table.items():
    for key, numbers in values.items():
      each = ' '.join(f'{100 * x:5.1f}' for x in numbers)
      lines.append(f'  {name:14} {key:20} {each}   {100 * sum(numbers) / len(numbers):5.1f}')
  return '\n'.join(lines)


def _claim(workdir: Path, settings: dict) -> None:
  mark = workdir / _MARK
  settings = json.loads(json.dumps(settings))
  if mark.exists():
    if json.loads(mark.read_text()) != settings:
      raise UserError(
        f'{workdir} holds a study with other settings (see {mark}): name another --workdir, or '
        'start anew with --fresh'
      )
    return
  evaluate.write_json(mark, settings)
