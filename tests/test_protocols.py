"""Scores of a split: against the release, against slow computations, and what must not matter."""

from pathlib import Path

import numpy as np
import pytest

from aavs_jax.input_pipeline.avsbench import CLASSES, SemanticClip
from aavs_jax.input_pipeline.clips import IGNORE
from aavs_jax.pytorch import recordings, selftest
from aavs_jax.scoring import metrics, protocols

GOLDENS = np.load(Path(__file__).parent / 'goldens' / 'metrics.npz')
SUBSETS = ('v1s', 'v1m', 'v2')


def _clip(subset, uid):
  return SemanticClip('', uid, subset, 'test', 10)


def f_measure(hit, predicted, true):
  precision, recall = hit / max(predicted, 1), hit / max(true, 1)
  return 1.3 * precision * recall / (0.3 * precision + recall) if hit else 0.0


def binary_split(clips=6):
  """Scores, targets and records of clips of two subsets; one of them silent, one all wrong."""
  rng = np.random.default_rng(3)
  keys = [_clip(SUBSETS[i % 2], f'uid{i}') for i in range(clips)]
  target = rng.random((clips, 5, 6, 7)) < 0.3
  target[1] = False
  scores = rng.normal(size=(clips, 5, 2, 6, 7)).astype(np.float32)
  scores[:, :, 1] += target
  scores[2, :, 1] -= 9
  records = np.array([metrics.binary_record(s, t) for s, t in zip(scores, target)])
  return keys, scores, target, records


def semantic_split(clips=7, classes=9):
  """Maps, targets and records of clips; classes 7 and 8 never occur, some pixels are ignored."""
  rng = np.random.default_rng(4)
  keys = [_clip(SUBSETS[i % 3], f'uid{i}') for i in range(clips)]
  target = rng.integers(0, 7, (clips, 5, 6, 7)).astype(np.uint8)
  target[0, 0] = target[1, :, 2] = IGNORE
  guess = rng.integers(0, 7, target.shape)
  pred = np.where((rng.random(target.shape) < 0.5) & (target < 9), target, guess).astype(np.uint8)
  records = np.array([metrics.semantic_record(p, t, classes) for p, t in zip(pred, target)])
  return keys, pred, target, records


def test_the_binary_result_of_the_release_is_the_mean_over_clips():
  records = [
    metrics.binary_record(GOLDENS[f'binary/{k}/scores'], GOLDENS[f'binary/{k}/target'].astype(bool))
    for k in range(4)
  ]
  summary = protocols.summarise([_clip('v1m', str(k)) for k in range(4)], np.array(records))
  expected = float(GOLDENS['binary/dataset_miou'])
  assert summary['overall']['miou'] == pytest.approx(expected, abs=1e-6)


def test_the_semantic_scores_of_the_release():
  records = [
    metrics.semantic_record(GOLDENS[f'semantic/{k}/pred'], GOLDENS[f'semantic/{k}/target'], 71)
    for k in range(3)
  ]
  summary = protocols.summarise([_clip('v1s', str(k)) for k in range(3)], np.array(records))
  for name in ('miou', 'miou_no_background', 'fscore', 'fscore_no_background'):
    expected = float(GOLDENS[f'semantic/{name}'])
    assert summary['overall'][name] == pytest.approx(expected, abs=1e-6)


def test_the_data_set_level_of_the_binary_task_counts_the_pixels_of_all_clips():
  keys, scores, target, records = binary_split()
  dataset = protocols.summarise(keys, records)['dataset']
  subsets = np.array([clip.subset for clip in keys])
  for found, chosen in [
    (dataset['overall'], subsets != ''),
    (dataset['subsets']['v1s'], subsets == 'v1s'),
    (dataset['subsets']['v1m'], subsets == 'v1m'),
  ]:
    background, sounding = np.moveaxis(scores[chosen], 2, 0)
    truth, predicted = target[chosen], sounding > background
    hit = (predicted & truth).sum()
    iou, f = hit / (predicted | truth).sum(), f_measure(hit, predicted.sum(), truth.sum())
    probability = 1 / (1 + np.exp(background - 2 * sounding))
    best = 0.0
    for threshold in np.linspace(0, 1 - 1e-10, 255).astype(np.float32):
      above = probability >= threshold
      best = max(best, f_measure((above & truth).sum(), above.sum(), truth.sum()))
    values = {'miou': iou, 'fscore': f, 'jf': (iou + f) / 2, 'fscore_best': best}
    assert {key: found[key] for key in values} == pytest.approx(values)
    assert best > f
  assert dataset['subsets']['v1s']['clips'] == 3


def test_the_data_set_level_of_the_semantic_task_counts_the_pixels_of_all_clips():
  keys, pred, target, records = semantic_split()
  dataset = protocols.summarise(keys, records)['dataset']
  counted = target != IGNORE
  values = np.full((2, 9), np.nan)
  for c in range(7):
    predicted, truth = (pred == c) & counted, target == c
    hit = (predicted & truth).sum()
    values[:, c] = hit / (predicted | truth).sum(), f_measure(hit, predicted.sum(), truth.sum())
  for c, row in enumerate(dataset['per_class']):
    assert (row['id'], row['name']) == (c, CLASSES[c])
    if c < 7:
      expected = [*values[:, c], values[:, c].mean()]
      assert [row['iou'], row['fscore'], row['jf']] == pytest.approx(expected)
    else:
      assert row['iou'] is row['fscore'] is row['jf'] is None
  overall, known = dataset['overall'], np.nan_to_num(values)
  predicted, truth = (pred > 0) & counted, (target > 0) & counted
  located = (predicted & truth).sum() / (predicted | truth).sum()
  assert overall['iou_sounding'] == pytest.approx(located)
  for name, mean in [('miou', known[0]), ('fscore', known[1]), ('jf', known.mean(axis=0))]:
    assert overall[name] == pytest.approx(mean.sum() / 9)
    assert overall[f'{name}_no_background'] == pytest.approx(mean[1:].sum() / 8)
    assert overall[f'{name}_occurring'] == pytest.approx(mean.sum() / 7)


@pytest.mark.parametrize('split', [binary_split, semantic_split])
def test_the_order_of_the_clips_changes_nothing(split):
  keys, _, _, records = split()
  order = np.random.default_rng(0).permutation(len(keys))
  shuffled = protocols.summarise([keys[i] for i in order], records[order])
  assert shuffled == protocols.summarise(keys, records)


class TestFalsePositives:
  def test_binary(self):
    truth = np.zeros((2, 4, 4), bool)
    truth[0, :2] = True  # 8 of 32 pixels sound
    scores = np.zeros((2, 2, 4, 4), np.float32)
    scores[:, 1, :, 0] = 1  # predicted: a column of both frames, 8 pixels, 6 of them silent
    self._check(metrics.binary_record(scores, truth))

  def test_semantic(self):
    truth, pred = np.zeros((2, 2, 4, 4), np.uint8)
    truth[0, :2] = 3
    pred[:, :, 0] = 1  # the wrong class is no false positive where something sounds
    self._check(metrics.semantic_record(pred, truth, 5))

  def _check(self, record):
    records = np.array([record, np.zeros_like(record)])
    records['pixels'][1, :, 0] = 32  # a second clip without any
    keys = [_clip('v1s', 'a'), _clip('v2', 'b')]
    scores = protocols.summarise(keys, records)
    assert scores['overall']['false_positive_rate'] == 6 / (24 + 32)
    assert scores['subsets']['v1s']['false_positive_rate'] == 6 / 24
    assert scores['subsets']['v2']['false_positive_rate'] == 0
    for audio in ('silence', 'noise', 'other', 'offscreen'):
      scores = protocols.summarise(keys, records, audio=audio)
      assert scores['overall']['false_positive_rate'] == 8 / 64
      assert scores['subsets']['v1s']['false_positive_rate'] == 8 / 32
      assert scores['overall']['sounding_share'] == 8 / 64


class TestIntervals:
  def test_are_percentiles_of_the_scores_of_resampled_clips(self):
    keys, _, _, records = semantic_split()
    order = np.argsort([SUBSETS.index(clip.subset) for clip in keys], kind='stable')
    records = records[order]
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(records), size=(1000, len(records)))
    ious, rates = [], []
    for chosen in drawn:
      both, predicted, true = records['pixels'][chosen].sum(axis=0)
      ious.append((both[:7] / (predicted + true - both)[:7]).sum() / 9)
      rates.append(1 - both[0] / true[0])
    found = protocols.summarise(keys, records[np.argsort(order)])
    expected = np.quantile(ious, (0.025, 0.975))
    assert found['dataset']['overall']['ci95']['miou'] == pytest.approx(list(expected))
    expected = np.quantile(rates, (0.025, 0.975))
    assert found['overall']['ci95']['false_positive_rate'] == pytest.approx(list(expected))

  @pytest.mark.parametrize('split', [binary_split, semantic_split])
  def test_of_every_score_in_every_group(self, split):
    keys, _, _, records = split()
    summary = protocols.summarise(keys, records)
    for part in (summary, summary['dataset']):
      for scores in (part['overall'], *part['subsets'].values()):
        assert set(scores['ci95']) == set(scores) - {'clips', 'ci95'}
        for name, (low, high) in scores['ci95'].items():
          assert low <= scores[name] <= high and low < high

  def test_hold_the_true_value_about_as_often_as_they_say(self):
    rng = np.random.default_rng(5)
    runs, clips = 300, 80
    held = np.zeros(2)
    for _ in range(runs):
      records = np.zeros(clips, metrics.record_type('semantic', 2))
      records['frames'][:, 0, 1] = rng.beta(2, 2, clips)  # IoU, mean 0.5
      records['frames'][:, 2, 1] = 1
      # A ratio of sums: sizes and hits of a clip belong together.
      size = rng.integers(1, 100, clips)
      hit = size * rng.beta(4, 2, clips)
      records['pixels'][:, 0, 1] = hit  # IoU of all pixels: 4 / (4 + 2)
      records['pixels'][:, 1:, 1] = ((size + hit) / 2)[:, None]
      summary = protocols.summarise([_clip('v2', str(i)) for i in range(clips)], records)
      for i, (part, truth) in enumerate([(summary, 1 / 2), (summary['dataset'], 2 / 3)]):
        low, high = part['overall']['ci95']['miou_occurring']
        held[i] += low <= truth <= high
    # 95 % less the little that 80 clips cost; the spread over 300 runs is 1.3 %.
    assert (held / runs > 0.90).all() and (held / runs < 0.985).all(), held / runs

  def test_classes_that_a_sample_misses_do_not_pull_it_down(self):
    # Each clip has a class of its own, so most samples lack a third of them.
    clips = 9
    records = np.zeros(clips, metrics.record_type('semantic', 71))
    for i in range(clips):
      records['pixels'][i, :, i + 1] = 6, 10, 10
      records['frames'][i, :, i + 1] = 2.4, 3, 4
    summary = protocols.summarise([_clip('v2', str(i)) for i in range(clips)], records)
    assert summary['overall']['miou'] == pytest.approx(0.6 * clips / 71)
    assert summary['overall']['ci95']['miou'] == pytest.approx([0.6 * clips / 71] * 2)
    assert summary['dataset']['overall']['ci95']['miou'] == pytest.approx([6 / 14 * clips / 71] * 2)


def test_semantic_summary_fields():
  half = np.zeros((1, 4, 4), np.uint8)
  half[:, :2] = 2
  silent = np.zeros_like(half)
  records = [
    metrics.semantic_record(pred, half, 4) for pred in (half, silent, half)
  ]  # fmt: skip
  summary = protocols.summarise(
    [_clip('v2', 'b'), _clip('v1s', 'z'), _clip('v1s', 'a')], np.array(records)
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
  assert [row['name'] for row in summary['per_class']] == list(CLASSES[:4])
  assert [row['frames'] for row in summary['per_class']] == [3, 0, 3, 0]
  assert summary['per_class'][1]['iou'] is None
  assert summary['per_class'][2]['iou'] == pytest.approx(2 / 3)


def test_clip_without_a_pixel_that_counts_scores_0():
  ignored = np.full((2, 4, 4), IGNORE, np.uint8)
  record = metrics.semantic_record(np.zeros_like(ignored), ignored, 4)
  summary = protocols.summarise([_clip('v2', 'a')], np.array([record]))
  for scores in (summary['overall'], summary['dataset']['overall']):
    intervals = scores.pop('ci95')
    assert set(scores.values()) == {0}
    assert list(intervals.values()) == [[0, 0]] * len(scores)
  assert summary['per_clip'][0]['miou'] == 0


def test_binary_summary_per_subset():
  records = np.zeros(2, metrics.record_type('binary', 2))
  records['scores'] = [(0.5, 0.0), (1.0, 0.5)]
  records['sounding'] = [(1, 3, 2), (3, 4, 3)]
  summary = protocols.summarise([_clip('v1m', 'a'), _clip('v1s', 'a')], records)
  assert (summary['overall']['miou'], summary['overall']['fscore']) == (0.75, 0.25)
  assert list(summary['subsets']) == ['v1s', 'v1m']
  v1m = summary['subsets']['v1m']
  assert (v1m['clips'], v1m['miou'], v1m['fscore']) == (1, 0.5, 0.0)
  located = [summary['dataset']['subsets'][name]['iou_sounding'] for name in ('v1m', 'v1s')]
  assert [*located, summary['dataset']['overall']['iou_sounding']] == [1 / 4, 3 / 4, 4 / 8]
  assert summary['per_clip'][1] == {'uid': 'a', 'subset': 'v1m', 'miou': 0.5, 'fscore': 0.0}


def test_as_the_code_of_other_methods_takes_them():
  """On recorded predictions: batches of 4, 2 and 1 clips, and clips filled up to ten frames."""
  arrays = recordings.read(selftest.GOLDENS / 'methods' / 'other_data.npz')
  (table,) = selftest.recognise(arrays)()
  (row,) = table.rows
  assert row.error < 1e-6, row.where


def test_larger_batches_have_a_lower_f_and_the_same_iou():
  rng = np.random.default_rng(0)
  records = np.stack([
    metrics.binary_record(rng.random((5, 2, 8, 8), np.float32), rng.random((5, 8, 8)) > 0.5)
    for _ in range(4)
  ])  # fmt: skip
  one, two, four = (protocols.as_released([], records, batch) for batch in (1, 2, 4))
  assert one['fscore'] > two['fscore'] > four['fscore']
  assert one['miou'] == pytest.approx(four['miou'])
  assert one['fscore'] == pytest.approx(records['scores'][:, 1].mean())
