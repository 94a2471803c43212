"""One HTML file that shows what a run learned and where it fails, from the files it left behind."""

import base64
import html
import io
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from aavs_jax.input_pipeline import files, prepared
from aavs_jax.input_pipeline.clips import Clip
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.images import load_frame, load_label_ids
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.input_pipeline.labels import IGNORE
from aavs_jax.logging import metrics_files
from aavs_jax.overlay import legend_colour, overlay, overlay_binary

_THUMBNAIL = 160  # pixels
_COLUMNS = 5  # frames shown of a clip
_ALPHA = 0.75  # of overlays: a class must be told by its colour, whatever lies below
_STAGES = {'stage1': 'Stage 1: where does it sound?', 'stage2': 'Stage 2: what sounds?'}
# What makes an artefact that is not there yet; WORKDIR is replaced by the folder's path.
_EVAL = 'aavs eval --data DATA --out WORKDIR/eval'
_COMMANDS = {
  'stage1': 'aavs train --config configs/quick_stage1.py --data DATA --workdir WORKDIR/stage1',
  'stage2': 'aavs train --config configs/quick_stage2.py --data DATA --workdir WORKDIR/stage2 '
  '--config.data.masks=WORKDIR/masks --config.train.init=WORKDIR/stage1',
  'masks': 'aavs masks --workdir WORKDIR/stage1 --data DATA --out WORKDIR/masks',
  'eval/stage1_true': f'{_EVAL}/stage1_true.json --workdir WORKDIR/stage1',
  'eval/stage1_other': f'{_EVAL}/stage1_other.json --workdir WORKDIR/stage1 --audio other',
  'eval/stage1_silence': f'{_EVAL}/stage1_silence.json --workdir WORKDIR/stage1 --audio silence',
  'eval/stage2_masks': f'{_EVAL}/stage2_masks.json --workdir WORKDIR/stage2 '
  '--maps WORKDIR/eval/stage2_masks',
  'eval/stage2_oracle': f'{_EVAL}/stage2_oracle.json --workdir WORKDIR/stage2 --oracle',
}

Scores = Mapping[str, Mapping[str, float]]  # 'all' or a subset -> miou, fscore, ...


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
    UserError: no such folder, a file of the run or of the data set that cannot be read.
  """
  workdir = Path(workdir)
  if not workdir.is_dir():
    raise UserError(f'{workdir} is no folder: give the workdir of a run')
  evaluations = {
    name.removeprefix('eval/'): _read_json(workdir / f'{name}.json')
    for name in _COMMANDS
    if name.startswith('eval/')
  }
  title = f'Audio-visual segmentation: {workdir.resolve().name}'
  body = [
    f'<h1>{_text(title)}</h1>',
    _summary(evaluations),
    _section('Does it listen?', _listening(workdir, evaluations)),
    _section('Does it name what sounds?', _naming(workdir, evaluations)),
    _section('Training', ''.join(_curves(workdir, stage) for stage in _STAGES)),
    _section('Classes', _classes(workdir, evaluations['stage2_masks'])),
    _clips(workdir, data_root, evaluations),
    _section('Configurations', ''.join(_config(workdir, stage) for stage in _STAGES)),
  ]
  page = (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{_text(title)}</title><style>{_CSS}</style></head>\n'
    f'<body><main>{"".join(body)}</main></body></html>\n'
  )
  out = workdir / 'report.html' if out is None else Path(out)
  files.write_text(out, page)
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
  if not path.is_file():
    return None
  return cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_GRAYSCALE)


def _scores(evaluation: Mapping) -> Scores:
  return {'all': evaluation['overall'], **evaluation['subsets']}


# --- pieces of HTML ----------------------------------------------------------------------------


def _text(value: object) -> str:
  return html.escape(str(value))


def _section(heading: str, content: str) -> str:
  return f'\n<section><h2>{_text(heading)}</h2>{content}</section>'


def _missing(workdir: Path, names: Sequence[str]) -> str:
  """A line for each artefact that is not there, with the command that makes it."""
  place = shlex.quote(str(workdir.resolve()))
  return ''.join(
    f'<p class="missing">Not there yet: {_text(name)}. Make it with '
    f'<code>{_text(_COMMANDS[name].replace("WORKDIR", place))}</code></p>'
    for name in names
  )


def _percent(value: float | None) -> str:
  return '\N{EN DASH}' if value is None else f'{100 * value:.1f}'


def _points(value: float | None) -> str:
  """A difference in percentage points, with its sign."""
  return '\N{EN DASH}' if value is None else f'{100 * value:+.1f}'.replace('-', '\N{MINUS SIGN}')


def _score_table(
  rows: Sequence[tuple[str, Scores, Callable[[float | None], str]]],
  metrics: Mapping[str, str],
  marked: tuple[int, str] | None = None,
) -> str:
  """A table of scores: groups of columns for all clips and each subset, a column for each metric.

  Args:
    rows: label, scores, and how a number is written.
    metrics: key in the scores -> heading.
    marked: (row, subset) to highlight.
  """
  groups = list(dict.fromkeys(group for _, scores, _ in rows for group in scores))
  heads = ''.join(f'<th colspan="{len(metrics)}">{_text(group)}</th>' for group in groups)
  units = ''.join(f'<th>{_text(name)}</th>' for name in metrics.values()) * len(groups)
  lines = []
  for i, (label, scores, write) in enumerate(rows):
    cells = []
    for group in groups:
      mark = ' class="mark"' if marked == (i, group) else ''
      values = (scores.get(group, {}).get(key) for key in metrics)
      cells += [f'<td{mark}>{write(value)}</td>' for value in values]
    lines.append(f'<tr><th scope="row">{_text(label)}</th>{"".join(cells)}</tr>')
  return (
    f'<div class="wide"><table class="scores"><thead><tr><td></td>{heads}</tr>'
    f'<tr><td></td>{units}</tr></thead>'
    f'<tbody>{"".join(lines)}</tbody></table></div>'
  )


# --- sections ----------------------------------------------------------------------------------


def _difference(first: Scores, second: Scores) -> Scores:
  return {
    group: {key: first[group][key] - second[group][key] for key in ('miou', 'fscore')}
    for group in first
    if group in second
  }


def _summary(evaluations: Mapping[str, Mapping | None]) -> str:
  stage1, other = evaluations['stage1_true'], evaluations['stage1_other']
  stage2, oracle = evaluations['stage2_masks'], evaluations['stage2_oracle']
  tiles, sentences = [], []
  counted = stage2 or stage1
  if counted:
    sentences.append(
      f'Scores on the {counted["clips"]} clips ({counted["frames"]} frames) of the '
      f'{counted["split"]} split, in percent.'
    )
  if stage1:
    iou = stage1['overall']['miou']
    tiles.append((_percent(iou), 'stage 1: IoU of what sounds'))
    sentences.append(f'Stage 1 finds the sounding pixels with an IoU of {_percent(iou)}.')
  if stage1 and other:
    drop = _difference(_scores(stage1), _scores(other))
    group = 'v1m' if 'v1m' in drop else 'all'
    where = 'clips with several sources (v1m)' if group == 'v1m' else 'all clips'
    gain = drop[group]['miou']
    tiles.append((_points(gain), f'IoU on {group} owed to the right sound'))
    sentences.append(
      f'With the sound of another clip it scores {_percent(_scores(other)[group]["miou"])} instead '
      f'of {_percent(_scores(stage1)[group]["miou"])} on {where}: the difference is what it hears.'
    )
  if stage2:
    miou, published = (stage2['overall'][key] for key in ('miou_occurring', 'miou'))
    published = f'{_percent(published)} over all {len(stage2["per_class"])}, as published'
    tiles.append((_percent(miou), f'stage 2: mIoU over the classes that occur ({published})'))
    sentences.append(
      'Stage 2 names the sources with a mIoU, over the classes that occur, of '
      f'{_percent(miou)} ({published})'
    )
    if oracle:
      miou = oracle['overall']['miou_occurring']
      sentences[-1] += f', and of {_percent(miou)} given the true masks'
    sentences[-1] += '.'
  if not sentences:
    sentences.append('Nothing of this run has been evaluated yet.')
  shown = ''.join(f'<div><b>{value}</b><span>{_text(what)}</span></div>' for value, what in tiles)
  return f'<p class="lead">{_text(" ".join(sentences))}</p><div class="tiles">{shown}</div>'


def _listening(workdir: Path, evaluations: Mapping[str, Mapping | None]) -> str:
  labels = {
    'stage1_true': 'true sound',
    'stage1_other': 'sound of another clip',
    'stage1_silence': 'silence',
  }
  missing = _missing(workdir, [f'eval/{name}' for name in labels if evaluations[name] is None])
  there = {name: _scores(evaluations[name]) for name in labels if evaluations[name]}
  if not there:
    return missing
  rows = [(labels[name], scores, _percent) for name, scores in there.items()]
  marked = None
  if 'stage1_true' in there and 'stage1_other' in there:
    marked = (len(rows), 'v1m')
    difference = _difference(there['stage1_true'], there['stage1_other'])
    rows.append(('true \N{MINUS SIGN} another', difference, _points))
  return (
    '<p>Stage 1, the same pictures with three kinds of sound. Where several things could sound '
    '(v1m), only the sound tells which one does: a model that merely looks scores the same in '
    'the first two rows.</p>' + _score_table(rows, {'miou': 'IoU', 'fscore': 'F'}, marked) + missing
  )


def _naming(workdir: Path, evaluations: Mapping[str, Mapping | None]) -> str:
  labels = {'stage2_masks': 'masks of stage 1', 'stage2_oracle': 'true masks (oracle)'}
  missing = _missing(workdir, [f'eval/{name}' for name in labels if evaluations[name] is None])
  there = {name: evaluations[name] for name in labels if evaluations[name]}
  if not there:
    return missing
  rows = [(labels[name], _scores(result), _percent) for name, result in there.items()]
  classes = len(next(iter(there.values()))['per_class'])

  def table(suffix: str) -> str:
    return _score_table(rows, {f'miou{suffix}': 'mIoU', f'fscore{suffix}': 'F'})

  return (
    '<p>Stage 2 given the masks that stage 1 predicts, and given the true ones. The mean runs over '
    'the classes that occur among the clips of a column, in truth or prediction, background '
    f'included.</p>{table("_occurring")}'
    f'<h3>Over all {classes} classes, as published</h3>'
    '<p>A class that never occurs among the clips of a column counts as 0, so a test set of few '
    f'classes scores low.</p>{table("")}'
    f'<h3>The same without the background class</h3>{table("_no_background")}{missing}'
  )


def _curves(workdir: Path, stage: str) -> str:
  rows = _read_log(workdir / stage)
  if not rows:
    return _missing(workdir, [stage])
  train = [row for row in rows if row['kind'] == 'train']
  val = [row for row in rows if row['kind'] == 'val']
  figure = Figure(figsize=(10.4, 2.9), layout='constrained')
  loss, score = figure.subplots(1, 2)
  _plot(loss, 'training loss', train, {'loss': '#3b5bdb'})
  _plot(score, 'validation, percent', val, {'miou': '#0b8457', 'fscore': '#d9730d'}, scale=100)
  names = {'stage1': ('IoU', 'F'), 'stage2': ('mIoU', 'F')}[stage]
  if val:
    score.legend(score.lines[:2], names, frameon=False, loc='lower right')
  return (
    f'<h3>{_text(_STAGES[stage])}</h3><div class="wide">{_svg(figure, stage)}</div>'
    + _left_out(workdir, stage)
  )


def _left_out(workdir: Path, stage: str) -> str:
  """The clips that a stage was trained without, and what is wrong with each."""
  bad = _read_json(workdir / stage / 'bad_clips.json', prepared.BAD_CLIPS)
  if not bad:
    return ''
  rows = ''.join(f'<li>{_text(row["clip"])}: {_text(row["text"])}</li>' for row in bad)
  title = f'Bad clips left out of training: {len(bad)}'
  return f'<details><summary>{title}</summary><ul>{rows}</ul></details>'


def _plot(
  axes: Axes, title: str, rows: Sequence[Mapping], colours: Mapping[str, str], scale: float = 1
) -> None:
  """Draws keys of log rows over epochs; a dashed line marks where the second phase begins."""
  epochs = [row['epoch'] for row in rows]
  for key, colour in colours.items():
    few = len(rows) <= 60
    axes.plot(epochs, [scale * row[key] for row in rows], color=colour, linewidth=1.6,
              marker='o' if few else None, markersize=3)  # fmt: skip
  second = [row['epoch'] for row in rows if row['phase'] == 2]
  if second and len(second) < len(rows):
    axes.axvline(second[0], color='#868e96', linewidth=1, linestyle='--')
    axes.annotate('phase 2', (second[0], 1), (4, -4), xycoords=('data', 'axes fraction'),
                  textcoords='offset points', va='top', fontsize=8, color='#868e96')  # fmt: skip
  axes.set_title(title, loc='left', fontsize=10, fontweight='bold')
  axes.set_xlabel('epoch', fontsize=9)
  axes.set_ylim(bottom=0)
  axes.grid(axis='y', color='#e9ecef')
  axes.tick_params(labelsize=8, length=0)
  axes.spines[['top', 'right', 'left']].set_visible(False)


def _svg(figure: Figure, salt: str) -> str:
  """The figure as an SVG element that may stand in HTML beside others."""
  buffer = io.StringIO()
  with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': salt}):
    figure.savefig(buffer, format='svg', transparent=True)
  svg = buffer.getvalue()
  svg = svg[svg.index('<svg') :]
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
  svg = re.sub(r' xmlns(:\w+)?="[^"]*"', '', svg)
  used = set(re.findall(r'#([\w.-]+)', svg))  # other ids would be there twice
  return re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else '', svg)


def _classes(workdir: Path, evaluation: Mapping | None) -> str:
  if evaluation is None:
    return _missing(workdir, ['eval/stage2_masks'])
  rows = [row for row in evaluation['per_class'] if row['iou'] is not None]
  bars = ''.join(
    f'<div class="bar">{_swatch(row["id"])}<span>{_text(row["name"])}</span>'
    f'<span class="track"><span style="width:{100 * row["iou"]:.1f}%"></span></span>'
    f'<span class="number">{_percent(row["iou"])}</span>'
    f'<span class="number faint">{row["frames"]}</span></div>'
    for row in sorted(rows, key=lambda row: -row['iou'])
  )
  return (
    '<p>IoU of each class in stage 2, and the number of frames it occurs in, in truth or '
    f'prediction. {len(evaluation["per_class"]) - len(rows)} further classes never occur.</p>'
    f'<div class="bars">{bars}</div>'
  )


def _swatch(class_id: int) -> str:
  colour = 'rgb(%d,%d,%d)' % legend_colour(class_id)  # noqa: UP031
  return f'<span class="swatch" style="background:{colour}"></span>'


def _config(workdir: Path, stage: str) -> str:
  config = _read_json(workdir / stage / 'config.json')
  if config is None:
    return _missing(workdir, [stage])
  content = _text(json.dumps(config, indent=2, ensure_ascii=False))
  return f'<details><summary>{_text(stage)}/config.json</summary><pre>{content}</pre></details>'


# --- clips -------------------------------------------------------------------------------------


def _choose(ranked: Sequence[dict]) -> dict[str, list[dict]]:
  """Six worst, three around the median and three best of clips ranked worst first, none twice."""
  worst, rest = ranked[:6], ranked[6:]
  best = rest[-3:]
  middle = rest[: len(rest) - len(best)]
  start = min(max(len(ranked) // 2 - 1 - len(worst), 0), max(len(middle) - 3, 0))
  return {'Worst clips': worst, 'Around the median': middle[start : start + 3], 'Best clips': best}


def _clips(workdir: Path, data_root: str | Path, evaluations: Mapping[str, Mapping | None]) -> str:
  by_stage = {
    stage: {(row['subset'], row['uid']): row for row in evaluations[name]['per_clip']}
    for stage, name in (('stage 2', 'stage2_masks'), ('stage 1', 'stage1_true'))
    if evaluations[name]
  }
  missing = [] if (workdir / 'masks').is_dir() else ['masks']
  if 'stage 2' not in by_stage:
    missing.append('eval/stage2_masks')
  if not by_stage:
    return _section('Clips', _missing(workdir, missing))
  leading = next(iter(by_stage))
  ranked = sorted(by_stage[leading].values(), key=lambda row: row['miou'])
  clips = {(clip.subset, clip.uid): clip for clip in read_index(data_root, split='test')}
  sections = [_missing(workdir, missing)]
  for heading, rows in _choose(ranked).items():
    if not rows:
      continue
    cards = []
    for row in rows:
      key = row['subset'], row['uid']
      if key not in clips:
        raise UserError(
          f'{data_root} has no test clip {row["uid"]} in {row["subset"]}, which the evaluation '
          'has: give the data set that the run was evaluated on'
        )
      scores = {stage: of.get(key) for stage, of in by_stage.items()}
      cards.append(_card(workdir, clips[key], scores))
    sections.append(_section(f'{heading} by {leading}', ''.join(cards)))
  table = ''.join(
    f'<tr><th scope="row">{_text(row["uid"])}</th><td>{_text(row["subset"])}</td>'
    f'<td>{_percent(row["miou"])}</td><td>{_percent(row["fscore"])}</td></tr>'
    for row in ranked
  )
  sections.append(
    f'<details><summary>All {len(ranked)} clips, worst first</summary><table><thead><tr>'
    '<td>clip</td><th>subset</th><th>IoU</th><th>F</th></tr></thead>'
    f'<tbody>{table}</tbody></table></details>'
  )
  return ''.join(sections)


def _card(workdir: Path, clip: Clip, scores: Mapping[str, Mapping | None]) -> str:
  """One clip: rows of pictures, the scores and the classes that occur in what is shown."""
  times = list(range(0, clip.num_frames, max(1, clip.num_frames // _COLUMNS)))[:_COLUMNS]
  frames = [load_frame(clip, t, _THUMBNAIL) for t in times]
  truth = [load_label_ids(clip, t) for t in times]
  place = Path(clip.subset) / clip.uid
  masks = [_read_mask(workdir / 'masks' / place / f'{t}.png') for t in times]
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
        cells.append(_picture(frame, f'frame {t}'))
      elif ids[i] is None:
        cells.append('<span class="absent">none</span>')
      else:
        cells.append(_picture(draw(frame, ids[i], _ALPHA), f'{label}, second {t}'))
  shown = ' · '.join(
    f'{stage} {"mIoU" if stage == "stage 2" else "IoU"} <b>{_percent(row["miou"])}</b>'
    for stage, row in scores.items()
    if row
  )
  legend = _legend(truth, named, clip.data_set.classes)
  return (
    f'<article><header><code>{_text(clip.uid)}</code><span class="tag">{_text(clip.subset)}</span>'
    f'<span class="score">{shown}</span></header>'
    f'<div class="grid">{"".join(cells)}</div><p class="legend">{legend}</p></article>'
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
    entries.append(f'<span>{_swatch(class_id)}{_text(names[class_id])}{note}</span>')
  return ''.join(entries) or '<span>silent throughout</span>'


def _picture(image: np.ndarray, alt: str) -> str:
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, 'JPEG', quality=82)
  data = base64.b64encode(buffer.getvalue()).decode('ascii')
  return (
    f'<img src="data:image/jpeg;base64,{data}" alt="{_text(alt)}" '
    f'width="{_THUMBNAIL}" height="{_THUMBNAIL}">'
  )


_CSS = """
:root { --ink: #212529; --faint: #868e96; --line: #e3e6ea; --accent: #3b5bdb; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 12px; }
h2 { font-size: 21px; letter-spacing: -0.01em; margin: 0 0 10px; }
h3 { font-size: 15px; margin: 20px 0 8px; }
p { margin: 0 0 14px; max-width: 75ch; }
.lead { font-size: 18px; color: #495057; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 24px 28px; margin: 24px 0; }
.tiles { display: flex; flex-wrap: wrap; gap: 16px; }
.tiles div { flex: 1 1 220px; background: #fff; border: 1px solid var(--line);
  border-radius: 10px; padding: 16px 20px; }
.tiles b { display: block; font-size: 32px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--faint); font-size: 14px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 15px; }
th, td { padding: 7px 14px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
thead th, thead td { color: var(--faint); font-weight: 500; font-size: 13px; border-bottom: 0;
  padding-bottom: 2px; }
thead td { text-align: left; }
thead tr:last-child th, thead tr:last-child td { border-bottom: 1px solid #adb5bd;
  padding: 0 14px 6px; }
thead th[colspan] { text-align: center; font-weight: 700; color: var(--ink); }
.scores td:nth-child(even) { border-left: 14px solid #fff; }
.scores thead tr:last-child th:nth-child(even) { border-left: 14px solid #fff; }
th[scope=row] { text-align: left; font-weight: 500; padding-left: 0; }
td.mark { background: #fff3bf; font-weight: 700; }
.missing { background: #fff9db; border-left: 3px solid #fab005; padding: 8px 14px; font-size: 15px;
  max-width: none; }
code, pre { font: 13px/1.5 ui-monospace, 'SF Mono', Menlo, Consolas, monospace; }
svg { display: block; max-width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.bars { columns: 2; column-gap: 48px; }
.bar { display: grid; grid-template-columns: 14px 130px 1fr 44px 48px; gap: 10px;
  align-items: center; font-size: 14px; line-height: 26px; break-inside: avoid; }
.track { height: 12px; background: #eef0f3; border-radius: 3px; overflow: hidden; }
.track span { display: block; height: 100%; background: var(--accent); border-radius: 3px; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.faint { color: var(--faint); font-size: 13px; }
.swatch { display: inline-block; width: 14px; height: 14px; border-radius: 3px;
  border: 1px solid rgba(0, 0, 0, 0.25); }
article { border-top: 1px solid var(--line); padding: 20px 0 6px; }
article:first-of-type { border-top: 0; padding-top: 4px; }
article header { display: flex; flex-wrap: wrap; gap: 12px; align-items: baseline;
  margin-bottom: 8px; }
article header code { font-size: 14px; font-weight: 600; overflow-wrap: anywhere; }
.tag { background: #edf0ff; color: var(--accent); border-radius: 4px; padding: 0 7px;
  font-size: 13px; }
.score { margin-left: auto; font-size: 14px; font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: 64px repeat(5, minmax(0, 160px)); gap: 6px 12px;
  align-items: center; }
.grid img { display: block; width: 100%; height: auto; border-radius: 4px; }
.row { font-size: 13px; font-weight: 600; }
.absent { color: var(--faint); font-size: 13px; text-align: center; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 12px 0; font-size: 14px;
  padding-left: 76px; max-width: none; }
.legend span { display: inline-flex; align-items: center; gap: 6px; }
details { margin: 10px 0; }
summary { cursor: pointer; font-weight: 500; }
pre { background: #f6f7f9; padding: 14px; border-radius: 6px; overflow-x: auto; }
@media (max-width: 720px) { .bars { columns: 1; } section { padding: 18px 14px; }
  .grid { grid-template-columns: 48px repeat(5, minmax(0, 1fr)); gap: 4px; } }
"""
