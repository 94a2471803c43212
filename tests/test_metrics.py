"""Metrics against the release's numbers, and against slow computations of its formulas."""

from pathlib import Path

import numpy as np
import pytest

from aavs_jax.input_pipeline.clips import IGNORE
from aavs_jax.scoring import metrics

GOLDENS = np.load(Path(__file__).parent / 'goldens' / 'metrics.npz')


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
  """The published sums over frames, and counts of pixels in all of them."""
  sums, pixels = np.zeros((2, 3, num_classes))
  for p, t in zip(pred, target):
    p, t = p[t != IGNORE], t[t != IGNORE]
    for c in range(num_classes):
      hit, predicted, true = ((p == c) & (t == c)).sum(), (p == c).sum(), (t == c).sum()
      if predicted + true:
        precision, recall = hit / max(predicted, 1), hit / max(true, 1)
        f = 1.3 * precision * recall / (0.3 * precision + recall) if hit else 0.0
        sums[:, c] += hit / (predicted + true - hit), f, 1
        pixels[:, c] += hit, predicted, true
  return sums, pixels


@pytest.mark.parametrize('k', range(4))
def test_binary_clip_equals_release(k):
  record = metrics.binary_record(
    GOLDENS[f'binary/{k}/scores'], GOLDENS[f'binary/{k}/target'].astype(bool)
  )
  expected = [float(GOLDENS[f'binary/{k}/{name}']) for name in ('miou', 'fscore')]
  np.testing.assert_allclose(record['scores'], expected, atol=1e-6)


def test_what_sounds_is_counted_by_the_ids_and_without_ignored_pixels():
  scores = np.zeros((1, 2, 2, 3), np.float32)
  scores[0, 1, 0] = 1  # the first row is predicted to sound
  ids = np.array([[[5, 0, 255], [0, 7, 255]]], np.uint8)
  record = metrics.binary_record(scores, np.ones((1, 2, 3), bool), ids)
  assert record['sounding'].tolist() == [1, 2, 2]
  assert record['pixels'][:, 1].tolist() == [3, 3, 6]


@pytest.mark.parametrize('k', range(3))
def test_semantic_clip_sums_equal_release(k):
  pred, target = GOLDENS[f'semantic/{k}/pred'], GOLDENS[f'semantic/{k}/target']
  found = metrics.semantic_record(pred, target, 71)['frames']
  for name, values in zip(('iou_sum', 'f_sum', 'count'), found):
    np.testing.assert_allclose(values, GOLDENS[f'semantic/{k}/{name}'], atol=1e-6)


@pytest.mark.parametrize('seed', range(6))
def test_binary_equals_slow_computation(seed):
  rng = np.random.default_rng(seed)
  scores = rng.normal(scale=3, size=(4, 2, 9, 7)).astype(np.float32)
  target = rng.random((4, 9, 7)) < (0.3 if seed else 0)  # seed 0: silent throughout
  target[1] = False
  scores[2, 1] = -20  # nothing predicted
  scores[3] = np.round(scores[3])  # ties of the two scores, and equal probabilities
  record = metrics.binary_record(scores, target)
  np.testing.assert_allclose(record['scores'], slow_binary(scores, target), atol=1e-6)
  predicted = (scores[:, 1] > scores[:, 0]).astype(np.uint8)
  _, pixels = slow_semantic(predicted, target.astype(np.uint8), 2)
  np.testing.assert_array_equal(record['pixels'], pixels)
  probability = 1 / (1 + np.exp(scores[:, 0] - 2 * scores[:, 1]))
  reached = (probability[..., None] >= metrics._THRESHOLDS).sum(axis=-1)
  for truth in (False, True):
    counts = np.bincount(reached[target == truth], minlength=256)
    np.testing.assert_array_equal(record['ranks'][int(truth)], counts)


def test_threshold_rank_at_and_beside_every_threshold():
  thresholds = metrics._THRESHOLDS
  beside = [np.nextafter(thresholds, np.float32(end)) for end in (-1, 2)]
  values = np.clip(np.concatenate([thresholds, *beside]), 0, 1)
  expected = (values[:, None] >= thresholds).sum(axis=1)
  np.testing.assert_array_equal(metrics._threshold_rank(values), expected)


def test_extreme_scores_are_scored_without_warning():
  scores = np.stack([np.full((1, 4, 4), 1e4), np.full((1, 4, 4), -1e4)], axis=1)
  with np.errstate(all='raise'):
    record = metrics.binary_record(scores.astype(np.float32), np.eye(4, dtype=bool)[None])
  # Nothing is predicted, but the threshold 0 lets every pixel through.
  np.testing.assert_allclose(record['scores'], [0, 1.3 * 0.25 / (0.3 * 0.25 + 1)])


@pytest.mark.parametrize('seed', range(4))
def test_semantic_equals_slow_computation(seed):
  rng = np.random.default_rng(seed)
  pred = rng.integers(0, 6, (5, 8, 11)).astype(np.uint8)
  target = rng.integers(0, 5, (5, 8, 11)).astype(np.uint8)
  target[0] = 0
  target[1, :3] = IGNORE
  target[2] = IGNORE
  pred[3] = target[3]
  record = metrics.semantic_record(pred, target, 7)
  frames, pixels = slow_semantic(pred, target, 7)
  np.testing.assert_allclose(record['frames'], frames, atol=1e-9)
  np.testing.assert_array_equal(record['pixels'], pixels)


@pytest.mark.parametrize('argument', [0, 1])
def test_a_class_that_the_record_lacks_counts_into_no_other_frame(argument):
  maps = np.zeros((2, 2, 4, 4), np.uint8)
  maps[argument, 0, 0, 0] = 4
  with pytest.raises(ValueError, match='class id 4 in a record of 3 classes'):
    metrics.semantic_record(*maps, 3)


def test_perfect_and_empty_semantic_clip():
  silent = np.zeros((2, 4, 4), np.uint8)
  record = metrics.semantic_record(silent, silent, 3)
  np.testing.assert_allclose(record['frames'], [[2, 0, 0]] * 3)
  iou, f = metrics.pixel_values(record['pixels'])
  np.testing.assert_array_equal([iou, f], [[1, np.nan, np.nan]] * 2)
