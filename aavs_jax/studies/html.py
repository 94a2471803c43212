"""Pieces of a page in HTML: text, tables of scores, curves, pictures, and how they look."""

import base64
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from aavs_jax.media.overlay import legend_colour

Scores = Mapping[str, Mapping[str, float]]  # 'all' or a subset -> miou, fscore, ...


def page(title: str, body: str) -> str:
  """A whole document, readable without a network and without scripts."""
  return (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{text(title)}</title><style>{_CSS}</style></head>\n'
    f'<body><main>{body}</main></body></html>\n'
  )


def text(value: object) -> str:
  return html.escape(str(value))


def section(heading: str, content: str) -> str:
  return f'\n<section><h2>{text(heading)}</h2>{content}</section>'


def percent(value: float | None) -> str:
  return '\N{EN DASH}' if value is None else f'{100 * value:.1f}'


def points(value: float | None) -> str:
  """A difference in percentage points, with its sign."""
  return '\N{EN DASH}' if value is None else f'{100 * value:+.1f}'.replace('-', '\N{MINUS SIGN}')


def score_table(
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
  heads = ''.join(f'<th colspan="{len(metrics)}">{text(group)}</th>' for group in groups)
  units = ''.join(f'<th>{text(name)}</th>' for name in metrics.values()) * len(groups)
  lines = []
  for i, (label, scores, write) in enumerate(rows):
    cells = []
    for group in groups:
      mark = ' class="mark"' if marked == (i, group) else ''
      values = (scores.get(group, {}).get(key) for key in metrics)
      cells += [f'<td{mark}>{write(value)}</td>' for value in values]
    lines.append(f'<tr><th scope="row">{text(label)}</th>{"".join(cells)}</tr>')
  return (
    f'<div class="wide"><table class="scores"><thead><tr><td></td>{heads}</tr>'
    f'<tr><td></td>{units}</tr></thead>'
    f'<tbody>{"".join(lines)}</tbody></table></div>'
  )


def plot(
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


def svg(figure: Figure, salt: str) -> str:
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


def swatch(class_id: int) -> str:
  colour = 'rgb(%d,%d,%d)' % legend_colour(class_id)  # noqa: UP031
  return f'<span class="swatch" style="background:{colour}"></span>'


def picture(image: np.ndarray, alt: str) -> str:
  """RGB, uint8 [H, W, 3], as a JPEG within the page."""
  return animation([image], alt, 'jpeg', quality=82)


def animation(images: Sequence[np.ndarray], alt: str, kind: str = 'webp', **options) -> str:
  """Images of one size, RGB, uint8 [H, W, 3], as one that moves; Pillow's options of its kind."""
  buffer = io.BytesIO()
  first, *others = map(Image.fromarray, images)
  first.save(
    buffer, kind, **(dict(save_all=True, append_images=others) if others else {}), **options
  )
  data = base64.b64encode(buffer.getvalue()).decode('ascii')
  source = f'data:image/{kind};base64,{data}'
  return f'<img src="{source}" alt="{text(alt)}" width="{first.width}" height="{first.height}">'


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
.grid { display: grid; grid-template-columns: 64px repeat(var(--shown), minmax(0, 160px));
  gap: 6px 12px; align-items: center; }
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
  .grid { grid-template-columns: 48px repeat(var(--shown), minmax(0, 1fr)); gap: 4px; } }
"""
