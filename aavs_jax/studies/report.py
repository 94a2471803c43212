"""One HTML file that shows what a run learned and where it fails, from the files it left behind."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import ml_collections
import numpy as np
from matplotlib.figure import Figure

from aavs_jax.configs import quick_stage1, quick_stage2
from aavs_jax.evaluate import SHAPE
from aavs_jax.hearing import HEARD
from aavs_jax.input_pipeline import files, prepared
from aavs_jax.input_pipeline.clips import IGNORE, Clip
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.images import load_frame, load_label_ids
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.media.overlay import overlay, overlay_binary
from aavs_jax.stepping_stones import EVALUATIONS
from aavs_jax.studies import html
from aavs_jax.studies.recipes import changes
from aavs_jax.training import work_folder
from aavs_jax.training.metric_log import metrics_files

STUDY = 'study.json'  # in the folder of a study: its data and its config
_THUMBNAIL = 160  # pixels
_COLUMNS = 5  # frames shown of a clip
_ALPHA = 0.75  # of overlays: a class must be told by its colour, whatever lies below
_STAGES = {'stage1': 'Stage 1: where does it sound?', 'stage2': 'Stage 2: what sounds?'}


class _Run(NamedTuple):
  """What a report is of."""

  folder: Path
  data: str | Path
  evaluations: Mapping[str, Mapping | None]  # by name of EVALUATIONS; None: not there yet
  commands: Mapping[str, str]  # that make each part, by its name in the folder


def write_report(workdir: str | Path, data_root: str | Path, out: str | Path | None = None) -> Path:
  """Writes the report of a run: one file, readable without a network and without scripts.

  A section whose files are not there yet says so, with the command that makes them.

  Args:
    workdir: folder of the run.
    data_root: the data set that the run was evaluated on, for the pictures of its test split.
    out: the file to write; WORKDIR/report.html if None.

  Returns:
    The file written.

  Raises:
    UserError: no such folder, or one of something else; a file of the run or of the data set that
      cannot be read.
  """
  for path in (workdir, out or ''):
    files.refuse_bucket(path)
  workdir = Path(workdir)
  if not workdir.is_dir():
    raise UserError(f'{workdir} is no folder: give the workdir of a run')
  names, parts = {path.name for path in workdir.iterdir()}, {STUDY, 'start', 'eval', *_STAGES}
  if names and not names & parts:
    raise UserError(
      f'{workdir} holds none of {", ".join(sorted(parts))}: give the workdir of a run, or a new one'
    )
  out = Path(out) if out is not None else workdir / 'report.html'
  files.require_place(out)
  read_index(str(data_root), 'test')
  evaluations = {name: _read_json(workdir / 'eval' / f'{name}.json', SHAPE) for name in EVALUATIONS}
  run = _Run(workdir, data_root, evaluations, _commands(workdir, data_root))
  title = f'Audio-visual segmentation: {workdir.resolve().name}'
  body = [
    f'<h1>{html.text(title)}</h1>',
    _summary(run),
    html.section('Does it listen?', _listening(run)),
    html.section('Does it name what sounds?', _naming(run)),
    html.section('Training', _start(run) + ''.join(_curves(run, stage) for stage in _STAGES)),
    html.section('Classes', _classes(run)),
    _clips(run),
    html.section('Configurations', ''.join(_config(run, stage) for stage in _STAGES)),
  ]
  files.write_text(out, html.page(title, ''.join(body)))
  return out


# --- reading -----------------------------------------------------------------------------------


def _read_json(path: Path, shape: Any = dict) -> Any:
  """The content of a JSON file of a shape, None if there is no such file."""
  if not files.is_there(path):
    return None
  return files.read_json(path, shape, 'delete it and make it again')


def _read_log(workdir: Path) -> list[dict]:
  """Rows of a run's metrics by step; of steps that a resumed run repeated, the later rows."""
  rows = {}
  for path in metrics_files(workdir):
    # What follows the last newline is a line that a running or killed job has not finished.
    for number, line in enumerate(path.read_text().split('\n')[:-1], 1):
      try:
        row = json.loads(line)
        rows[row['kind'], row['step']] = row
      except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}, line {number}, is not a log entry: remove that line') from error
  return sorted(rows.values(), key=lambda row: row['step'])


def _read_mask(path: Path) -> np.ndarray | None:
  """A grey PNG, uint8 [H, W]; None if it is missing or damaged."""
  data = np.fromfile(path, np.uint8) if path.is_file() else np.empty(0)
  return cv2.imdecode(data, cv2.IMREAD_GRAYSCALE) if data.size else None


def _scores(evaluation: Mapping) -> html.Scores:
  return {'all': evaluation['overall'], **evaluation['subsets']}


# --- what is missing ---------------------------------------------------------------------------


def _commands(folder: Path, data: str | Path) -> dict[str, str]:
  """The command that makes each part of a run, by its name in the folder.

  None of a study with more than the quickstart's parts, or of another method: its own command is
  the only one for these.
  """
  folder = folder.resolve()
  study = _study(folder)
  if study and (
    study['looks']
    or study['robust']
    or study['stage2'].get('prior', {}).get('predicted')
    or study['stage1'].get('method', 'aavs') != 'aavs'
  ):
    return {}
  place, data = shlex.quote(str(folder)), shlex.quote(str(Path(data).resolve()))
  stages = {
    'stage1': f' --config.train.init={place}/start',
    'stage2': f' --config.data.masks={place}/masks --config.train.init={place}/stage1',
  }
  commands = {
    stage: f'aavs train --config configs/quick_{stage}.py --data {data} --workdir {place}/{stage}'
    f'{given}{_overrides(study, folder, stage)}'
    for stage, given in stages.items()
  }
  commands['start'] = (
    f'aavs start --config configs/quick_stage1.py --data {data} --out {place}/start'
    f'{_overrides(study, folder, "stage1")}'
  )
  commands['masks'] = f'aavs masks --workdir {place}/stage1 --data {data} --out {place}/masks'
  if study and study['stage2'].get('prior', {}).get('soft'):
    commands['masks'] += ' --soft'
  for name, evaluation in EVALUATIONS.items():
    out = f'{place}/eval/{name}'
    commands[f'eval/{name}'] = (
      f'aavs eval --data {data} --out {out}.json --workdir {place}/{evaluation.stage}'
      + (f' --audio {evaluation.audio}' if evaluation.audio != 'true' else '')
      + (' --oracle' if evaluation.prior == 'oracle' else '')
      + (' --no-prior' if evaluation.prior == 'none' else '')
      + (f' --maps {out}' if evaluation.maps else '')
    )
  return commands


def _study(folder: Path) -> dict | None:
  """The config of the study that a run is of, if there is one."""
  shape = {'stage1': dict, 'stage2': dict, 'seeds': [int], ...: object}
  marks = [place / STUDY for place in (folder, folder.parent) if files.is_there(place / STUDY)]
  if not marks:
    return None
  study = files.read_json(marks[0], {'config': shape, ...: object}, 'restore it')['config']
  return {'looks': None, 'robust': None, **study}


def _overrides(study: dict | None, folder: Path, stage: str) -> str:
  """What a run's study, if there is one, changes of the quickstart's stage."""
  if study is None:
    return ''
  seeds = {f'seed{seed}': seed for seed in study['seeds']}
  seed = seeds.get(folder.name, next(iter(seeds.values())))
  module = {'stage1': quick_stage1, 'stage2': quick_stage2}[stage]
  # Both as JSON has them, without tuples.
  origin = json.loads(module.get_config().to_json_best_effort())
  new = {**study[stage], 'seed': seed}
  changed = changes(*map(ml_collections.ConfigDict, (new, origin)))
  texts = {key: tuple(v) if isinstance(v, list) else v for key, v in changed.items()}
  return ''.join(
    ' ' + shlex.quote(f'--config.{key}={value}')
    for key, value in texts.items()
    if key not in ('data.root', 'data.masks')
  )


def _missing(run: _Run, names: Sequence[str]) -> str:
  """A line for each part that is not there, with the command that makes it."""

  def way(name):
    if name not in run.commands:
      return 'The command of the study makes it when it is given again.'
    return f'Make it with <code>{html.text(run.commands[name])}</code>'

  return ''.join(
    f'<p class="missing">Not there yet: {html.text(name)}. {way(name)}</p>' for name in names
  )


# --- sections ----------------------------------------------------------------------------------


def _difference(first: html.Scores, second: html.Scores) -> html.Scores:
  return {
    group: {key: first[group][key] - second[group][key] for key in ('miou', 'fscore')}
    for group in first
    if group in second
  }


def _summary(run: _Run) -> str:
  stage1, other = run.evaluations['stage1_true'], run.evaluations['stage1_other']
  stage2, oracle = run.evaluations['stage2_masks'], run.evaluations['stage2_oracle']
  tiles, sentences = [], []
  counted = stage2 or stage1
  if counted:
    sentences.append(
      f'Scores on the {counted["clips"]} clips ({counted["frames"]} frames) of the '
      f'{counted["split"]} split, in percent.'
    )
  if stage1:
    iou = stage1['overall']['miou']
    tiles.append((html.percent(iou), 'stage 1: IoU of what sounds'))
    sentences.append(f'Stage 1 finds the sounding pixels with an IoU of {html.percent(iou)}.')
  if stage1 and other:
    drop = _difference(_scores(stage1), _scores(other))
    group = 'v1m' if 'v1m' in drop else 'all'
    where = 'clips with several sources (v1m)' if group == 'v1m' else 'all clips'
    gain = drop[group]['miou']
    right, wrong = (html.percent(_scores(e)[group]['miou']) for e in (stage1, other))
    tiles.append((html.points(gain), f'IoU on {group} owed to the right sound'))
    sentences.append(
      f'With the sound of another clip it scores {wrong} instead of {right} on {where}: the '
      'difference is what it hears.'
    )
  if stage2:
    miou, published = (stage2['overall'][key] for key in ('miou_occurring', 'miou'))
    published = f'{html.percent(published)} over all {len(stage2["per_class"])}, as published'
    tiles.append((html.percent(miou), f'stage 2: mIoU over the classes that occur ({published})'))
    sentences.append(
      'Stage 2 names the sources with a mIoU, over the classes that occur, of '
      f'{html.percent(miou)} ({published})'
    )
    if oracle:
      miou = oracle['overall']['miou_occurring']
      sentences[-1] += f', and of {html.percent(miou)} given the true masks'
    sentences[-1] += '.'
  if not sentences:
    sentences.append('Nothing of this run has been evaluated yet.')
  shown = ''.join(
    f'<div><b>{score}</b><span>{html.text(what)}</span></div>' for score, what in tiles
  )
  return f'<p class="lead">{html.text(" ".join(sentences))}</p><div class="tiles">{shown}</div>'


def _listening(run: _Run) -> str:
  labels = {
    'stage1_true': 'true sound',
    'stage1_other': 'sound of another clip',
    'stage1_silence': 'silence',
  }
  missing = _missing(run, [f'eval/{name}' for name in labels if run.evaluations[name] is None])
  there = {name: _scores(run.evaluations[name]) for name in labels if run.evaluations[name]}
  if not there:
    return missing
  rows = [(labels[name], scores, html.percent) for name, scores in there.items()]
  marked = None
  if 'stage1_true' in there and 'stage1_other' in there:
    marked = (len(rows), 'v1m')
    difference = _difference(there['stage1_true'], there['stage1_other'])
    rows.append(('true \N{MINUS SIGN} another', difference, html.points))
  return (
    '<p>Stage 1, the same pictures with three kinds of sound. Where several things could sound '
    '(v1m), only the sound tells which one does: a model that merely looks scores the same in '
    'the first two rows.</p>'
    + html.score_table(rows, {'miou': 'IoU', 'fscore': 'F'}, marked)
    + missing
  )


def _naming(run: _Run) -> str:
  labels = {'stage2_masks': 'masks of stage 1', 'stage2_oracle': 'true masks (oracle)'}
  missing = _missing(run, [f'eval/{name}' for name in labels if run.evaluations[name] is None])
  there = {name: run.evaluations[name] for name in labels if run.evaluations[name]}
  if not there:
    return missing
  rows = [(labels[name], _scores(result), html.percent) for name, result in there.items()]
  classes = len(next(iter(there.values()))['per_class'])

  def table(suffix: str) -> str:
    return html.score_table(rows, {f'miou{suffix}': 'mIoU', f'fscore{suffix}': 'F'})

  return (
    '<p>Stage 2 given the masks that stage 1 predicts, and given the true ones. The mean runs over '
    'the classes that occur among the clips of a column, in truth or prediction, background '
    f'included.</p>{table("_occurring")}'
    f'<h3>Over all {classes} classes, as published</h3>'
    '<p>A class that never occurs among the clips of a column counts as 0, so a test set of few '
    f'classes scores low.</p>{table("")}'
    f'<h3>The same without the background class</h3>{table("_no_background")}{missing}'
  )


def _start(run: _Run) -> str:
  """How well the network that hears had learnt to, before stage 1 began."""
  heard = _read_json(run.folder / 'start' / HEARD, {'classes': int, 'seconds': int, 'right': float})
  if not heard:
    return ''
  return (
    f'<p>Before stage 1 the network that hears has learnt which of {heard["classes"]} classes '
    f'sound: in {html.percent(heard["right"])} % of {heard["seconds"]} held-out seconds it tells '
    'all of them right. It is not trained any further.</p>'
  )


def _curves(run: _Run, stage: str) -> str:
  rows = _read_log(run.folder / stage)
  if not rows:
    begins = stage == 'stage1' and not files.is_there(run.folder / 'start')
    return _missing(run, ['start', stage] if begins else [stage])
  train = [row for row in rows if row['kind'] == 'train']
  val = [row for row in rows if row['kind'] == 'val']
  figure = Figure(figsize=(10.4, 2.9), layout='constrained')
  loss, score = figure.subplots(1, 2)
  html.plot(loss, 'training loss', train, {'loss': '#3b5bdb'})
  html.plot(score, 'validation, percent', val, {'miou': '#0b8457', 'fscore': '#d9730d'}, scale=100)
  names = {'stage1': ('IoU', 'F'), 'stage2': ('mIoU', 'F')}[stage]
  if val:
    score.legend(score.lines[:2], names, frameon=False, loc='lower right')
  return (
    f'<h3>{html.text(_STAGES[stage])}</h3><div class="wide">{html.svg(figure, stage)}</div>'
    + _left_out(run.folder / stage)
  )


def _left_out(workdir: Path) -> str:
  """The clips that a stage was trained without, and what is wrong with each."""
  bad = _read_json(workdir / work_folder.BAD_CLIPS, prepared.BAD_CLIPS)
  if not bad:
    return ''
  rows = ''.join(f'<li>{html.text(row["clip"])}: {html.text(row["text"])}</li>' for row in bad)
  title = f'Bad clips left out of training: {len(bad)}'
  return f'<details><summary>{title}</summary><ul>{rows}</ul></details>'


def _classes(run: _Run) -> str:
  evaluation = run.evaluations['stage2_masks']
  if evaluation is None:
    return _missing(run, ['eval/stage2_masks'])
  rows = [row for row in evaluation['per_class'] if row['iou'] is not None]
  bars = ''.join(
    f'<div class="bar">{html.swatch(row["id"])}<span>{html.text(row["name"])}</span>'
    f'<span class="track"><span style="width:{100 * row["iou"]:.1f}%"></span></span>'
    f'<span class="number">{html.percent(row["iou"])}</span>'
    f'<span class="number faint">{row["frames"]}</span></div>'
    for row in sorted(rows, key=lambda row: -row['iou'])
  )
  return (
    '<p>IoU of each class in stage 2, and the number of frames it occurs in, in truth or '
    f'prediction. {len(evaluation["per_class"]) - len(rows)} further classes never occur.</p>'
    f'<div class="bars">{bars}</div>'
  )


def _config(run: _Run, stage: str) -> str:
  config = _read_json(run.folder / stage / 'config.json')
  if config is None:
    return _missing(run, [stage])
  content = html.text(json.dumps(config, indent=2, ensure_ascii=False))
  return f'<details><summary>{html.text(stage)}/config.json</summary><pre>{content}</pre></details>'


# --- clips -------------------------------------------------------------------------------------


def _choose(ranked: Sequence[dict]) -> dict[str, list[dict]]:
  """Six worst, three around the median and three best of clips ranked worst first, none twice."""
  worst, rest = ranked[:6], ranked[6:]
  best = rest[-3:]
  middle = rest[: len(rest) - len(best)]
  start = min(max(len(ranked) // 2 - 1 - len(worst), 0), max(len(middle) - 3, 0))
  return {'Worst clips': worst, 'Around the median': middle[start : start + 3], 'Best clips': best}


def _clips(run: _Run) -> str:
  by_stage = {
    stage: {(row['subset'], row['uid']): row for row in run.evaluations[name]['per_clip']}
    for stage, name in (('stage 2', 'stage2_masks'), ('stage 1', 'stage1_true'))
    if run.evaluations[name]
  }
  missing = [] if (run.folder / 'masks').is_dir() else ['masks']
  if 'stage 2' not in by_stage:
    missing.append('eval/stage2_masks')
  if not by_stage:
    return html.section('Clips', _missing(run, missing))
  leading = next(iter(by_stage))
  ranked = sorted(by_stage[leading].values(), key=lambda row: row['miou'])
  clips = {(clip.subset, clip.uid): clip for clip in read_index(run.data, split='test')}
  sections = [_missing(run, missing)]
  for heading, rows in _choose(ranked).items():
    if not rows:
      continue
    cards = []
    for row in rows:
      key = row['subset'], row['uid']
      if key not in clips:
        raise UserError(
          f'{run.data} has no test clip {row["uid"]} in {row["subset"]}, which the evaluation '
          'has: give the data set that the run was evaluated on'
        )
      scores = {stage: of.get(key) for stage, of in by_stage.items()}
      cards.append(_card(run.folder, clips[key], scores))
    sections.append(html.section(f'{heading} by {leading}', ''.join(cards)))
  median = ranked[len(ranked) // 2]
  moving = _moving(run.folder, clips[median['subset'], median['uid']])
  sections.insert(0, html.section('The median clip, in motion', moving) if moving else '')
  table = ''.join(
    f'<tr><th scope="row">{html.text(row["uid"])}</th><td>{html.text(row["subset"])}</td>'
    f'<td>{html.percent(row["miou"])}</td><td>{html.percent(row["fscore"])}</td></tr>'
    for row in ranked
  )
  sections.append(
    f'<details><summary>All {len(ranked)} clips, worst first</summary><table><thead><tr>'
    '<td>clip</td><th>subset</th><th>IoU</th><th>F</th></tr></thead>'
    f'<tbody>{table}</tbody></table></details>'
  )
  return ''.join(sections)


def _moving(workdir: Path, clip: Clip) -> str:
  """Every second of a clip for half a second: frame and, beside it, prediction; '' without any."""
  size, place = 2 * _THUMBNAIL, Path(clip.subset) / clip.uid
  images = []
  for t in range(clip.num_frames):
    frame = load_frame(clip, t, size)
    for folder, draw in (('eval/stage2_masks', overlay), ('masks', overlay_binary)):
      ids = _read_mask(workdir / folder / place / f'{t}.png')
      if ids is not None:
        ids = ids if draw is overlay else ids > 127
        images.append(np.hstack([frame, draw(frame, ids, _ALPHA)]))
        break
  if not images:
    return ''
  moving = html.animation(images, 'frame and prediction', duration=500, loop=0, quality=70)
  return f'<p>{html.text(clip.uid)}: frame and prediction.</p><p>{moving}</p>'


def _card(workdir: Path, clip: Clip, scores: Mapping[str, Mapping | None]) -> str:
  """One clip: rows of pictures, the scores and the classes that occur in what is shown."""
  times = list(range(0, clip.num_frames, max(1, clip.num_frames // _COLUMNS)))[:_COLUMNS]
  frames = [load_frame(clip, t, _THUMBNAIL) for t in times]
  truth = [load_label_ids(clip, t) for t in times]
  place = Path(clip.subset) / clip.uid
  masks = [_read_mask(workdir / 'masks' / place / f'{t}.png') for t in times]
  masks = [mask if mask is None else mask > 127 for mask in masks]  # soft ones, too
  named = [_read_mask(workdir / 'eval' / 'stage2_masks' / place / f'{t}.png') for t in times]

  cells = ['<span></span>', *(f'<span class="faint">second {t}</span>' for t in times)]
  for label, ids, draw in (
    ('frame', None, None),
    ('truth', truth, overlay),
    ('stage 1', masks, overlay_binary),
    ('stage 2', named, overlay),
  ):
    cells.append(f'<span class="row">{label}</span>')
    for i, (t, frame) in enumerate(zip(times, frames)):
      if ids is None:
        cells.append(html.picture(frame, f'frame {t}'))
      elif ids[i] is None:
        cells.append('<span class="absent">none</span>')
      else:
        cells.append(html.picture(draw(frame, ids[i], _ALPHA), f'{label}, second {t}'))
  shown = ' · '.join(
    f'{stage} {"mIoU" if stage == "stage 2" else "IoU"} <b>{html.percent(row["miou"])}</b>'
    for stage, row in scores.items()
    if row
  )
  legend = _legend(truth, named, clip.data_set.classes)
  return (
    f'<article><header><code>{html.text(clip.uid)}</code>'
    f'<span class="tag">{html.text(clip.subset)}</span>'
    f'<span class="score">{shown}</span></header>'
    f'<div class="grid" style="--shown:{len(times)}">{"".join(cells)}</div>'
    f'<p class="legend">{legend}</p></article>'
  )


def _legend(
  truth: Sequence[np.ndarray], named: Sequence[np.ndarray | None], names: Sequence[str]
) -> str:
  """The classes of the labels and predictions shown, in their colours."""

  def classes(images: Sequence[np.ndarray]) -> set[int]:
    return {int(v) for image in images for v in np.unique(image)} - {0, IGNORE}

  predictions = [image for image in named if image is not None]
  true, predicted = classes(truth), classes(predictions)
  entries = []
  for class_id in sorted(true | predicted):
    note = ''
    if predictions and class_id not in predicted:
      note = ' (missed)'
    elif class_id not in true:
      note = ' (not there)'
    entries.append(f'<span>{html.swatch(class_id)}{html.text(names[class_id])}{note}</span>')
  return ''.join(entries) or '<span>silent throughout</span>'
