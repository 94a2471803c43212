"""Ways of training beside each other: what each scores, by number of classes or by method."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from aavs_jax.console import say
from aavs_jax.input_pipeline import files
from aavs_jax.studies import html

# Name of an evaluation -> what it is called, and its colour.
WAYS = {
  'stage2_oracle': ('two stages, true masks (oracle)', '#868e96'),
  'robust_oracle': ('two stages, robust prior, true masks', '#adb5bd'),
  'robust_masks': ("two stages, robust prior, stage 1's masks", '#0b8457'),
  'stage2_masks': ("two stages as published, stage 1's masks", '#3b5bdb'),
  'end_to_end': ('one stage, as many frames', '#d9730d'),
  'robust_none': ('two stages, robust prior, no mask', '#74b816'),
}
_SCORES = {'miou_occurring': 'mIoU', 'fscore_occurring': 'F', 'iou_sounding': 'IoU of what sounds'}

Table = dict[str, dict[str, list[float]]]  # way -> score -> a value a seed


def compare(results: Sequence[Mapping[str, Mapping]]) -> Table:
  """Scores of every way over seeds.

  Args:
    results: of each seed, evaluations by name, see evaluate.evaluate.

  Returns:
    For the names of WAYS that are there and 'stage1': AVSBench's mIoU and F over the classes that
    occur, and the data set's IoU of what sounds, whatever its class; of stage 1 that alone.
  """
  table = {}
  for name in (way for way in WAYS if way in results[0]):
    rows = [{**r[name]['dataset']['overall'], **r[name]['overall']} for r in results]
    table[name] = {score: [row[score] for row in rows] for score in _SCORES}
  heard = [r['stage1_true']['dataset']['overall']['iou_sounding'] for r in results]
  table['stage1'] = {'iou_sounding': heard}
  return table


def title(key: int | str) -> str:
  """What a key of `write` is called."""
  return key if isinstance(key, str) else f'{key} classes'


def write(folder: Path, tables: Mapping[int | str, Table]) -> None:
  """Writes comparison.json and comparison.html, and says the same in lines.

  Args:
    folder: of the study.
    tables: by the number of classes, or by the name of the method, what `compare` returns.
  """
  numbers = {key: table for key, table in tables.items() if isinstance(key, int)}
  files.write_json(folder / 'comparison.json', {str(n): table for n, table in tables.items()})
  lead = 'The same model; one stage sees as many frames as two together. '
  if any('robust_masks' in table for table in tables.values()):
    lead += (
      'With a robust prior stage 2 goes on from the one-stage model, so it has seen more, and '
      'stage 1 is trained again without each part of the clips. '
    )
  body = (
    f'<h1>Where do stepping stones pay?</h1><p class="lead">{lead}Mean over seeds, their range in '
    'brackets.</p>'
    + (html.section('mIoU by the number of classes', picture(numbers)) if len(numbers) > 1 else '')
    + ''.join(html.section(title(key), _table(table)) for key, table in tables.items())
  )
  files.write_text(folder / 'comparison.html', html.page('Where do stepping stones pay?', body))
  for n, table in tables.items():
    say(f'  {title(n)}, percent: ' + ', '.join(_SCORES.values()))
    for name, label in _labels(table).items():
      say('  ' + f'{label:42}' + '  '.join(_cell(table[name].get(score)) for score in _SCORES))


def picture(tables: Mapping[int, Table]) -> str:
  """mIoU against the number of classes, a line a way of training, as SVG."""
  figure = Figure(figsize=(8, 3.6), layout='constrained')
  axes = figure.subplots()
  counts = sorted(tables)
  for name, (label, colour) in WAYS.items():
    there = [n for n in counts if name in tables[n]]
    if not there:
      continue
    values = [[100 * x for x in tables[n][name]['miou_occurring']] for n in there]
    means = [sum(v) / len(v) for v in values]
    axes.plot(there, means, color=colour, marker='o', markersize=4, linewidth=1.6, label=label)
    axes.fill_between(there, list(map(min, values)), list(map(max, values)), color=colour,
                      alpha=0.15, linewidth=0)  # fmt: skip
  axes.set_xscale('log')
  axes.set_xticks(counts, [str(n) for n in counts])
  axes.minorticks_off()
  axes.set_xlabel('classes', fontsize=9)
  axes.set_title('mIoU over occurring classes, percent', loc='left', fontsize=10)
  axes.set_ylim(bottom=0)
  axes.grid(axis='y', color='#e9ecef')
  axes.spines[['top', 'right', 'left']].set_visible(False)
  figure.legend(*axes.get_legend_handles_labels(), loc='outside right', frameon=False, fontsize=8)
  return html.svg(figure, 'comparison')


def _labels(table: Table) -> dict[str, str]:
  labels = {name: WAYS[name][0] for name in WAYS if name in table}
  return labels | {'stage1': 'stage 1 alone, what sounds'}


def _cell(values: Sequence[float] | None) -> str:
  if values is None:
    return '\N{EN DASH}'
  mean = html.percent(sum(values) / len(values))
  if len(values) == 1:
    return mean
  return f'{mean} ({html.percent(min(values))} to {html.percent(max(values))})'


def _table(table: Table) -> str:
  heads = ''.join(f'<th>{html.text(name)}</th>' for name in _SCORES.values())
  rows = ''.join(
    f'<tr><th scope="row">{html.text(label)}</th>'
    + ''.join(f'<td>{_cell(table[name].get(score))}</td>' for score in _SCORES)
    + '</tr>'
    for name, label in _labels(table).items()
  )
  return (
    f'<div class="wide"><table class="scores"><thead><tr><td></td>{heads}</tr></thead>'
    f'<tbody>{rows}</tbody></table></div>'
  )
