"""Evaluation files as tables, for the terminal and in Markdown."""

import itertools
from collections.abc import Container, Mapping, Sequence

_KINDS = {'': 'all classes', '_no_background': 'no background', '_occurring': 'occurring classes'}


def format_table(results: Sequence[Mapping]) -> str:
  """A plain-text table of several evaluation files.

  Args:
    results: evaluation files as dicts; a key "name" names the row, else its task does.

  Returns:
    Lines joined by newlines. One row a file: name, audio, prior, then mIoU / F in percent over all
    clips and over each subset that occurs in any of the files, in the order of the file that has
    the most of them. With a semantic file among them, also mIoU / F over all clips as the mean over
    the classes that occur.
  """
  by_length = sorted(results, key=lambda result: -len(result['subsets']))
  subsets = list(dict.fromkeys(name for result in by_length for name in result['subsets']))

  def cell(scores: Mapping | None, suffix: str = '') -> str:
    if scores is None or f'miou{suffix}' not in scores:
      return '-'
    return f'{100 * scores[f"miou{suffix}"]:.1f} / {100 * scores[f"fscore{suffix}"]:.1f}'

  # Of the binary task both classes occur: there is one mean only.
  with_occurring = any(result['task'] == 'semantic' for result in results)
  occurring = ['occurring classes'] if with_occurring else []
  rows = [['name', 'audio', 'prior', 'all', *occurring, *subsets]]
  for result in results:
    name, prior = result.get('name', result['task']), result['prior'] or '-'
    rows.append([name, result['audio'], prior, cell(result['overall'])])
    rows[-1] += [cell(result['overall'], '_occurring') for _ in occurring]
    rows[-1] += [cell(result['subsets'].get(name)) for name in subsets]
  return aligned(rows, 3, markdown=False)


def title(name: str, split: str, audio: str, prior: str | None) -> str:
  """What an evaluation is of, in words."""
  words = f'{name} on {split}, {audio} audio'
  return words + (f', {"no" if prior == "none" else prior} prior' if prior else '')


def format_evaluation(result: Mapping, *, markdown: bool = False) -> str:
  """An evaluation file on its own: every protocol, over all clips and over each subset.

  Args:
    result: the file as a dict.
    markdown: a document with a title and, for the semantic task, a second table, of the classes.

  Returns:
    Lines joined by newlines; scores in percent, followed by their 95 % intervals.
  """
  what = title(*(result[key] for key in ('name', 'split', 'audio', 'prior')))
  notes = [
    f'{result["clips"]} clips, {result["frames"]} frames. Percent (95 % interval over clips).',
  ]
  if result['audio'] != 'true':
    notes.append(
      "IoU and F are against the clips' own labels; every pixel predicted sounding is a false "
      'positive.'
    )
  if 'released' in result:
    scores = ', '.join(f'{name} {100 * value:.2f}' for name, value in result['released'].items())
    notes.append(f'By the metric of the released code: {scores}.')
  sections = _sections(result)
  head = ['all', *result['subsets']]
  rows = [
    [section, label, *(_with_interval(column, key) for column in columns)]
    for section, columns, labels in sections
    for label, key in labels
  ]
  if not markdown:
    indented = [[f'  {label}', *cells] for _, label, *cells in rows]
    lines = iter(aligned([['', *head], *indented], 1, markdown).splitlines())
    text = [what, *notes, '', next(lines), next(lines)]
    for section, _, labels in sections:
      text += [section, *itertools.islice(lines, len(labels))]
    return '\n'.join(text)
  table = aligned([['protocol', 'score', *head], *rows], 2, markdown)
  parts = [f'# {what[0].upper()}{what[1:]}', ' '.join(notes), table]
  if result['task'] == 'semantic':
    parts.append(_class_table(result))
  return '\n\n'.join(parts) + '\n'


def _sections(result: Mapping) -> list[tuple[str, list[Mapping], list[tuple[str, str]]]]:
  """Name, scores of each column, and (label, key in the scores) of each row, of every protocol."""
  dataset = result['dataset']
  avsbench_columns = [result['overall'], *result['subsets'].values()]
  dataset_columns = [dataset['overall'], *dataset['subsets'].values()]
  if result['task'] == 'semantic':
    avsbench_name = 'AVSBench (mean over frames, then classes)'
    scores = [(f'{name}, {kind}', key + suffix) for suffix, kind in _KINDS.items()
              for name, key in (('mIoU', 'miou'), ('F', 'fscore'), ('J&F', 'jf'))]  # fmt: skip
    avsbench_scores = [(label, key) for label, key in scores if not key.startswith('jf')]
  else:
    avsbench_name = 'AVSBench (mean over clips)'
    avsbench_scores = [('mIoU', 'miou'), ('F, best threshold per clip', 'fscore')]
    scores = [('IoU', 'miou'), ('F', 'fscore'), ('J&F', 'jf'), ('F, best threshold', 'fscore_best')]
  return [
    (avsbench_name, avsbench_columns, avsbench_scores),
    ('data set (all pixels together)', dataset_columns, scores),
    ('silent pixels', avsbench_columns, [('false positives', 'false_positive_rate')]),
  ]


def _class_table(result: Mapping) -> str:
  """Markdown of the classes that occur, by both protocols."""
  rows = [['class', 'frames', 'AVSBench IoU', 'F', 'data set IoU', 'F', 'J&F']]
  for by_frames, by_pixels in zip(result['per_class'], result['dataset']['per_class']):
    if by_frames['iou'] is not None:
      values = [by_frames[key] for key in ('iou', 'fscore')]
      values += [by_pixels[key] for key in ('iou', 'fscore', 'jf')]
      rows.append([by_frames['name'], str(by_frames['frames']), *map(_percent, values)])
  return aligned(rows, 1, markdown=True)


def _percent(share: float) -> str:
  return f'{100 * share:.1f}'.replace('100.0', '100')


def _with_interval(scores: Mapping, key: str) -> str:
  low, high = scores['ci95'][key]
  return f'{_percent(scores[key])} ({_percent(low)}-{_percent(high)})'


def padded(rows: Sequence[Sequence[str]], right: Container[int]) -> list[tuple[str, ...]]:
  """Cells as wide as their column, the text to the left, in the columns `right` to the right."""
  columns = []
  for i, column in enumerate(zip(*rows)):
    width = max(map(len, column))
    columns.append([text.rjust(width) if i in right else text.ljust(width) for text in column])
  return list(zip(*columns))


def aligned(rows: Sequence[Sequence[str]], words: int, markdown: bool) -> str:
  """Rows, the first being the head; the first `words` columns to the left, numbers to the right."""
  head, *body = padded(rows, range(words, len(rows[0])))
  rule = ['-' * len(text) for text in head]
  if markdown:
    rule[words:] = [f'{line[1:]}:' for line in rule[words:]]
  lines = [head, rule, *body]
  return '\n'.join(f'| {" | ".join(row)} |' if markdown else '  '.join(row) for row in lines)
