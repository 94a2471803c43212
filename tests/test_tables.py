"""Evaluation files as tables."""

import re

import numpy as np

from aavs_jax.input_pipeline.avsbench import SemanticClip
from aavs_jax.scoring import metrics, protocols, tables


def test_table_is_aligned_and_complete():
  def result(audio, subsets):
    return {
      'task': 'binary', 'audio': audio, 'prior': None,
      'overall': {'miou': 0.5, 'fscore': 0.625},
      'subsets': {name: {'clips': 1, 'miou': 1.0, 'fscore': 0.0625} for name in subsets},
    }  # fmt: skip

  results = [{**result('true', ['v1s', 'v2']), 'name': 'mine'}, result('silence', ['v2'])]
  lines = tables.format_table(results).splitlines()
  assert len({len(line) for line in lines}) == 1
  assert lines[0].split() == ['name', 'audio', 'prior', 'all', 'v1s', 'v2']
  assert lines[2].split('  ')[0].strip() == 'mine'
  assert '50.0 / 62.5' in lines[2] and '100.0 / 6.2' in lines[2]
  assert lines[3].split()[:3] == ['binary', 'silence', '-']


def test_table_of_semantic_files_shows_the_mean_over_classes_that_occur():
  scores = {'miou': 0.875, 'fscore': 0.9375}
  binary = {
    'name': 'stage 1', 'task': 'binary', 'audio': 'silence', 'prior': None, 'overall': scores,
    'subsets': {name: {'clips': 1, **scores} for name in ('v1s', 'v1m', 'v2')},
  }  # fmt: skip
  occurring = {**scores, 'miou': 0.086, 'miou_occurring': 0.684, 'fscore_occurring': 0.75}
  semantic = {
    **binary, 'name': 'end to end', 'task': 'semantic', 'prior': 'oracle', 'overall': occurring
  }  # fmt: skip
  lines = tables.format_table([binary, semantic]).splitlines()
  assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 100
  columns = [[part.strip() for part in re.split('  +', line)] for line in lines]
  assert columns[0][3:5] == ['all', 'occurring classes']
  assert columns[2][3:5] == ['87.5 / 93.8', '-']
  assert columns[3][3:5] == ['8.6 / 93.8', '68.4 / 75.0']


def _evaluation(task, audio):
  """An evaluation file of random maps of three subsets."""
  rng = np.random.default_rng(0)
  subsets = ('v1s', 'v1m', 'v2')
  clips = [SemanticClip('', f'uid{i}', subset, 'test', 5) for subset in subsets for i in range(4)]
  records = []
  for _ in clips:
    target = rng.random((5, 8, 8)) < 0.3
    if task == 'binary':
      scores = rng.normal(size=(5, 2, 8, 8)).astype(np.float32)
      records.append(metrics.binary_record(scores, target))
    else:
      ids = rng.integers(0, 7, (5, 8, 8)).astype(np.uint8)
      records.append(metrics.semantic_record(ids, np.where(target, ids, 0).astype(np.uint8), 71))
  return {
    'name': 'stage 2', 'task': task, 'split': 'test', 'audio': audio, 'prior': None, 'clips': 12,
    'frames': 60, **protocols.summarise(clips, np.array(records), audio=audio),
  }  # fmt: skip


def test_every_protocol_stands_in_the_table_of_an_evaluation():
  result = _evaluation('binary', 'noise')
  lines = tables.format_evaluation(result).splitlines()
  assert max(map(len, lines)) <= 100
  assert lines[0] == 'stage 2 on test, noise audio'
  assert 'every pixel predicted sounding is a false positive' in lines[2]
  rows = [re.split('  +', line.strip()) for line in lines[4:]]
  assert rows[0] == ['all', 'v1s', 'v1m', 'v2']
  by_label = {row[0]: row[1:] for row in rows}
  for label, scores, key in [
    ('mIoU', result['overall'], 'miou'),
    ('F, best threshold per clip', result['overall'], 'fscore'),
    ('IoU', result['dataset']['overall'], 'miou'),
    ('J&F', result['dataset']['overall'], 'jf'),
    ('F, best threshold', result['dataset']['overall'], 'fscore_best'),
    ('false positives', result['overall'], 'false_positive_rate'),
  ]:
    low, high = (100 * end for end in scores['ci95'][key])
    assert by_label[label][0] == f'{100 * scores[key]:.1f} ({low:.1f}-{high:.1f})'
    assert len(by_label[label]) == 4
  v2 = result['dataset']['subsets']['v2']
  assert by_label['F'][3].startswith(f'{100 * v2["fscore"]:.1f} (')


def test_the_markdown_of_a_semantic_evaluation_has_its_classes():
  result = _evaluation('semantic', 'true')
  lines = tables.format_evaluation(result).splitlines()
  assert max(map(len, lines)) <= 100 and 'false positive.' not in lines[2]
  text = tables.format_evaluation(result, markdown=True)
  title, _, scores, classes = text.rstrip().split('\n\n')
  assert title == '# Stage 2 on test, true audio'
  without = tables.format_evaluation(result | {'prior': 'none'}).splitlines()[0]
  assert without == 'stage 2 on test, true audio, no prior'
  assert len(scores.splitlines()) == 2 + 6 + 9 + 1
  for table in (scores, classes):
    assert len({line.count('|') for line in table.splitlines()}) == 1
  cells = [[cell.strip() for cell in row.split('|')[1:-1]] for row in classes.splitlines()[2:]]
  occurring = [row for row in result['dataset']['per_class'] if row['iou'] is not None]
  assert [row[0] for row in cells] == [row['name'] for row in occurring] and len(cells) == 7
  assert cells[3][-1] == f'{100 * occurring[3]["jf"]:.1f}'


def test_percents_have_three_digits():
  assert [tables._percent(x) for x in (1.0, 0.9996, 0.9994)] == ['100', '100', '99.9']


def test_the_scores_of_the_released_code_are_said_in_percent():
  result = _evaluation('binary', 'true') | {'released': {'miou': 0.5, 'fscore': 0.625}}
  said = 'By the metric of the released code: miou 50.00, fscore 62.50.'
  for markdown in (False, True):
    assert said in tables.format_evaluation(result, markdown=markdown)


def test_a_class_that_is_never_found_is_in_the_table_of_classes():
  result = _evaluation('semantic', 'true')
  for row in (result['per_class'][3], result['dataset']['per_class'][3]):
    row.update({key: 0.0 for key in ('iou', 'fscore', 'jf') if key in row})
  text = tables.format_evaluation(result, markdown=True)
  name = result['per_class'][3]['name']
  (row,) = [line for line in text.splitlines() if line.startswith(f'| {name} ')]
  assert [cell.strip() for cell in row.split('|')[3:-1]] == ['0.0'] * 5
