"""Metrics against the release's numbers, and against slow computations of its formulas."""

import re
from pathlib import Path

import numpy as np
import pytest

from aavs_jax import metrics
from input_pipeline.labels import CLASS_NAMES, IGNORE

GOLDENS = np.load(Path(__file__).parent / 'goldens' / 'metrics.npz')


def golden_semantic_sums():
  return [
    metrics.semantic_frame_sums(GOLDENS[f'semantic/{k}/pred'], GOLDENS[f'semantic/{k}/target'], 71)
    for k in range(3)
  ]


def slow_binary(scores, target):
  thresholds = np.linspace(0, 1 - 1e-10, 255).astype(np.float32)
  ious, curves = [], []
  for (background, sounding), truth in zip(scores, target):
    predicted = sounding > background
    if truth.any():
      ious.append((predicted & truth).sum() / (predicted | truth).sum())
      probability = 1 / (1 + np.exp(background - 2 * sounding))
      curve = []
      for threshold in thresholds:
        above = probability >= threshold
        precision = (above & truth).sum() / (above.sum() + 1e-20)
        recall = (above & truth).sum() / (truth.sum() + 1e-20)
        bottom = 0.3 * precision + recall
        curve.append(1.3 * precision * recall / bottom if bottom else 0.0)
      curves.append(curve)
    else:
      ious.append((~predicted).sum() / predicted.size)
  return np.mean(ious), np.mean(curves, axis=0).max() if curves else 0.0


def slow_semantic(pred, target, num_classes):
  sums = np.zeros((3, num_classes))
  for p, t in zip(pred, target):
    p, t = p[t != IGNORE], t[t != IGNORE]
    for c in range(num_classes):
      hit, predicted, true = ((p == c) & (t == c)).sum(), (p == c).sum(), (t == c).sum()
      if predicted + true:
        precision, recall = hit / max(predicted, 1), hit / max(true, 1)
        f = 1.3 * precision * recall / (0.3 * precision + recall) if hit else 0.0
        sums[:, c] += hit / (predicted + true - hit), f, 1
  return sums


@pytest.mark.parametrize('k', range(4))
def test_binary_clip_equals_release(k):
  miou, fscore = metrics.binary_clip_metrics(
    GOLDENS[f'binary/{k}/scores'], GOLDENS[f'binary/{k}/target'].astype(bool)
  )
  assert miou == pytest.approx(float(GOLDENS[f'binary/{k}/miou']), abs=1e-6)
  assert fscore == pytest.approx(float(GOLDENS[f'binary/{k}/fscore']), abs=1e-6)


def test_binary_data_set_result_is_the_mean_over_clips():
  per_clip = {
    ('v1m', str(k)): metrics.binary_clip_metrics(
      GOLDENS[f'binary/{k}/scores'], GOLDENS[f'binary/{k}/target'].astype(bool)
    )
    for k in range(4)
  }
  summary = metrics.summarise_binary(per_clip)
  assert summary['overall']['miou'] == pytest.approx(
    float(GOLDENS['binary/dataset_miou']), abs=1e-6
  )


@pytest.mark.parametrize('k', range(3))
def test_semantic_clip_sums_equal_release(k):
  for name, values in zip(('iou_sum', 'f_sum', 'count'), golden_semantic_sums()[k]):
    np.testing.assert_allclose(values, GOLDENS[f'semantic/{k}/{name}'], atol=1e-6)


def test_semantic_data_set_scores_equal_release():
  per_clip = {('v1s', str(k)): sums for k, sums in enumerate(golden_semantic_sums())}
  overall = metrics.summarise_semantic(per_clip)['overall']
  for name in ('miou', 'miou_no_background', 'fscore', 'fscore_no_background'):
    assert overall[name] == pytest.approx(float(GOLDENS[f'semantic/{name}']), abs=1e-6)


@pytest.mark.parametrize('seed', range(6))
def test_binary_equals_slow_computation(seed):
  rng = np.random.default_rng(seed)
  scores = rng.normal(scale=3, size=(4, 2, 9, 7)).astype(np.float32)
  target = rng.random((4, 9, 7)) < (0.3 if seed else 0)  # seed 0: silent throughout
  target[1] = False
  scores[2, 1] = -20  # nothing predicted
  scores[3] = np.round(scores[3])  # ties of the two scores, and equal probabilities
  np.testing.assert_allclose(
    metrics.binary_clip_metrics(scores, target), slow_binary(scores, target), atol=1e-6
  )


def test_threshold_rank_at_and_beside_every_threshold():
  thresholds = metrics._THRESHOLDS
  beside = [np.nextafter(thresholds, np.float32(end)) for end in (-1, 2)]
  values = np.clip(np.concatenate([thresholds, *beside]), 0, 1)
  expected = (values[:, None] >= thresholds).sum(axis=1)
  np.testing.assert_array_equal(metrics._threshold_rank(values), expected)


def test_extreme_scores_are_scored_without_warning():
  scores = np.stack([np.full((1, 4, 4), 1e4), np.full((1, 4, 4), -1e4)], axis=1)
  with np.errstate(all='raise'):
    miou, fscore = metrics.binary_clip_metrics(
      scores.astype(np.float32), np.eye(4, dtype=bool)[None]
    )
  # Nothing is predicted, but the threshold 0 lets every pixel through.
  assert miou == 0
  assert fscore == pytest.approx(1.3 * 0.25 / (0.3 * 0.25 + 1))


@pytest.mark.parametrize('seed', range(4))
def test_semantic_equals_slow_computation(seed):
  rng = np.random.default_rng(seed)
  pred = rng.integers(0, 6, (5, 8, 11)).astype(np.uint8)
  target = rng.integers(0, 5, (5, 8, 11)).astype(np.uint8)
  target[0] = 0
  target[1, :3] = IGNORE
  target[2] = IGNORE
  pred[3] = target[3]
  np.testing.assert_allclose(
    metrics.semantic_frame_sums(pred, target, 7), slow_semantic(pred, target, 7), atol=1e-9
  )


def test_perfect_and_empty_semantic_clip():
  silent = np.zeros((2, 4, 4), np.uint8)
  iou_sum, f_sum, count = metrics.semantic_frame_sums(silent, silent, 3)
  np.testing.assert_array_equal(iou_sum, [2, 0, 0])
  np.testing.assert_allclose(f_sum, [2, 0, 0])
  np.testing.assert_array_equal(count, [2, 0, 0])


def test_semantic_summary_fields():
  half = np.zeros((1, 4, 4), np.uint8)
  half[:, :2] = 2
  silent = np.zeros_like(half)
  summary = metrics.summarise_semantic(
    {
      ('v2', 'b'): metrics.semantic_frame_sums(half, half, 4),
      ('v1s', 'z'): metrics.semantic_frame_sums(silent, half, 4),
      ('v1s', 'a'): metrics.semantic_frame_sums(half, half, 4),
    }
  )
  assert [(c['subset'], c['uid']) for c in summary['per_clip']] == [
    ('v1s', 'a'), ('v1s', 'z'), ('v2', 'b')
  ]  # fmt: skip
  # Clip z: background 8/16, class 2 missed; mean over the two classes that occur in it.
  assert [c['miou'] for c in summary['per_clip']] == pytest.approx([1, 0.25, 1])
  # The data set's mean runs over all four classes: (2.5/3 + 0 + 2/3 + 0) / 4.
  assert summary['overall']['miou'] == pytest.approx((2.5 / 3 + 2 / 3) / 4)
  assert summary['overall']['miou_no_background'] == pytest.approx((2 / 3) / 3)
  # Only two of the four occur, and in v2 both are right.
  assert summary['overall']['miou_occurring'] == pytest.approx((2.5 / 3 + 2 / 3) / 2)
  f_background = (2 + 1.3 * 0.5 / (0.3 * 0.5 + 1)) / 3
  assert summary['overall']['fscore_occurring'] == pytest.approx((f_background + 2 / 3) / 2)
  assert summary['subsets']['v2']['miou_occurring'] == pytest.approx(1)
  assert summary['subsets']['v1s']['miou_occurring'] == pytest.approx((1.5 / 2 + 1 / 2) / 2)
  assert summary['subsets']['v1s']['clips'] == 2
  assert summary['subsets']['v2']['miou'] == pytest.approx(0.5)
  assert [row['name'] for row in summary['per_class']] == list(CLASS_NAMES[:4])
  assert [row['frames'] for row in summary['per_class']] == [3, 0, 3, 0]
  assert summary['per_class'][1]['iou'] is None
  assert summary['per_class'][2]['iou'] == pytest.approx(2 / 3)


def test_clip_without_a_pixel_that_counts_scores_0():
  ignored = np.full((2, 4, 4), IGNORE, np.uint8)
  sums = metrics.semantic_frame_sums(np.zeros_like(ignored), ignored, 4)
  summary = metrics.summarise_semantic({('v2', 'a'): sums})
  assert set(summary['overall'].values()) == {0}
  assert summary['per_clip'][0]['miou'] == 0


def test_binary_summary_per_subset():
  summary = metrics.summarise_binary({('v1s', 'a'): (1.0, 0.5), ('v1m', 'a'): (0.5, 0.0)})
  assert summary['overall'] == pytest.approx({'miou': 0.75, 'fscore': 0.25})
  assert list(summary['subsets']) == ['v1s', 'v1m']
  assert summary['subsets']['v1m'] == {'clips': 1, 'miou': 0.5, 'fscore': 0.0}
  assert summary['per_clip'][1] == {'uid': 'a', 'subset': 'v1m', 'miou': 0.5, 'fscore': 0.0}


def test_table_is_aligned_and_complete():
  def result(audio, subsets):
    return {
      'task': 'binary', 'audio': audio, 'prior': None,
      'overall': {'miou': 0.5, 'fscore': 0.625},
      'subsets': {name: {'clips': 1, 'miou': 1.0, 'fscore': 0.0625} for name in subsets},
    }  # fmt: skip

  results = [{**result('true', ['v1s', 'v2']), 'name': 'mine'}, result('silence', ['v2'])]
  lines = metrics.format_table(results).splitlines()
  assert len({len(line) for line in lines}) == 1
  assert lines[0].split() == ['name', 'audio', 'prior', 'all', 'v1s', 'v2']
  assert lines[2].split('  ')[0].strip() == 'mine'
  assert '50.0 / 62.5' in lines[2] and '100.0 / 6.2' in lines[2]
  assert lines[3].split()[:3] == ['binary', 'silence', '-']
  markdown = metrics.format_table(results, markdown=True).splitlines()
  assert all(line.count('|') == 7 for line in markdown)


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
  lines = metrics.format_table([binary, semantic]).splitlines()
  assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 100
  columns = [[part.strip() for part in re.split('  +', line)] for line in lines]
  assert columns[0][3:5] == ['all', 'occurring classes']
  assert columns[2][3:5] == ['87.5 / 93.8', '-']
  assert columns[3][3:5] == ['8.6 / 93.8', '68.4 / 75.0']
