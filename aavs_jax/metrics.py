"""IoU and F-measure as the released evaluation computes them (host side, numpy only).

Both tasks are scored at the size of their inputs, published at 224x224. Results are kept per clip,
under the key (subset, uid), so that a clip scored twice (padding of the last batch, several
processes) counts once.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8

from input_pipeline.labels import CLASS_NAMES, IGNORE

ClipKey = tuple[str, str]  # (subset, uid)
FrameSums = tuple[np.ndarray, np.ndarray, np.ndarray]  # iou_sum, f_sum, count, [C] each

_BETA_SQUARED = 0.3
# float32 as in the release: there the last threshold, 1 - 1e-10, rounds to 1.
_THRESHOLDS = np.linspace(0, 1 - 1e-10, 255).astype(np.float32)
_SUBSET_ORDER = ('v1s', 'v1m', 'v2')


def _threshold_rank(probabilities: np.ndarray) -> np.ndarray:
  """How many of the 255 thresholds are <= each value, uint16 of the shape of `probabilities`."""
  # The thresholds are even, so a product finds the rank, off by one at most where it was rounded;
  # several times quicker than a search.
  rank = (probabilities * np.float32(254)).astype(np.uint16)
  rank -= _THRESHOLDS[rank] > probabilities
  rank += np.append(_THRESHOLDS, np.float32(np.inf))[rank + 1] <= probabilities
  return rank + 1


def _f_curve(probabilities: np.ndarray, target: np.ndarray) -> np.ndarray:
  """F-measure of one frame at every threshold, float64 [255]."""
  ranks = _threshold_rank(probabilities.ravel())
  # A pixel of rank r is predicted at the thresholds 0..r-1: counts from the top give the totals.
  histogram = np.bincount(ranks + np.uint16(256) * target.ravel(), minlength=512).reshape(2, 256)
  predicted_on = histogram[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
  true_positive = predicted_on[1].astype(np.float64)
  precision = true_positive / (predicted_on.sum(axis=0) + 1e-20)
  recall = true_positive / (np.count_nonzero(target) + 1e-20)
  return _f_measure(precision, recall)


def _f_measure(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
  """(1 + b) P R / (b P + R) with b = 0.3, and 0 where both are 0."""
  denominator = _BETA_SQUARED * precision + recall
  product = (1 + _BETA_SQUARED) * precision * recall
  return np.divide(product, denominator, out=np.zeros_like(product), where=denominator > 0)


def binary_clip_metrics(
  scores: Float[np.ndarray, 'T 2 H W'], target: Bool[np.ndarray, 'T H W']
) -> tuple[float, float]:
  """Scores one clip of the binary task (stage 1).

  Args:
    scores: float32, the scores of "background" and "sounding" per pixel, before any softmax.
    target: True where a pixel sounds.

  Returns:
    miou: mean over the frames of the IoU of the argmax map (a tie is background). A frame with an
      empty target scores the share of its pixels that are predicted silent.
    fscore: F-measure (beta^2 0.3) of p = sigmoid(2 s1 - s0) at 255 thresholds, averaged over the
      frames with a non-empty target, at its best threshold. 0 if there is no such frame.
  """
  background, sounding = scores[:, 0], scores[:, 1]
  predicted = sounding > background
  frames = len(target)
  intersection = (predicted & target).reshape(frames, -1).sum(axis=1)
  union = (predicted | target).reshape(frames, -1).sum(axis=1)
  sounds = target.reshape(frames, -1).any(axis=1)
  silent_share = 1 - predicted.reshape(frames, -1).mean(axis=1)
  iou = np.where(sounds, intersection / np.maximum(union, 1), silent_share)

  if not sounds.any():
    return float(iou.mean()), 0.0
  with np.errstate(over='ignore'):  # exp of a large number: the probability is 0, as it should be
    probabilities = 1 / (1 + np.exp(background[sounds] - 2 * sounding[sounds]))
  curves = [_f_curve(p, t) for p, t in zip(probabilities, target[sounds])]
  return float(iou.mean()), float(np.mean(curves, axis=0).max())


def semantic_frame_sums(
  pred: UInt8[np.ndarray, 'T H W'], target: UInt8[np.ndarray, 'T H W'], num_classes: int
) -> FrameSums:
  """Per-class sums over the frames of one clip of the semantic task.

  Args:
    pred: class ids below `num_classes`.
    target: class ids below `num_classes`; pixels of value 255 count neither for nor against.
    num_classes: C, background included.

  Returns:
    iou_sum, f_sum, count: float64 [C]. Sums over frames of the IoU and of the F-measure (beta^2
      0.3), and the number of frames in which the class occurs in prediction or target. Add them
      up over clips and give them to `class_values`.
  """
  frames = len(pred)
  # One bin a frame and class, and one more per frame that swallows the ignored pixels.
  bins = num_classes + 1
  offset = (np.arange(frames, dtype=np.int32) * bins)[:, None, None]
  ignored = target == IGNORE
  pred_bins = np.where(ignored, num_classes, pred) + offset
  target_bins = np.where(ignored, num_classes, target) + offset

  def count_bins(values: np.ndarray) -> np.ndarray:
    counts = np.bincount(values.ravel(), minlength=frames * bins).reshape(frames, bins)
    return counts[:, :num_classes].astype(np.float64)

  predicted, true = count_bins(pred_bins), count_bins(target_bins)
  both = count_bins(pred_bins[pred == target])
  union = predicted + true - both
  occurs = union > 0
  iou = both / np.maximum(union, 1)
  f = _f_measure(both / np.maximum(predicted, 1), both / np.maximum(true, 1))
  return iou.sum(axis=0), f.sum(axis=0), occurs.sum(axis=0).astype(np.float64)


def class_values(sums: FrameSums) -> tuple[np.ndarray, np.ndarray]:
  """IoU and F-measure per class, float64 [C] each, NaN for a class that never occurs."""
  iou_sum, f_sum, count = sums
  with np.errstate(invalid='ignore'):
    return iou_sum / count, f_sum / count


def _occurring_mean(values: np.ndarray) -> float:
  """Mean over the classes that occur, that is, are not NaN; 0 if none does."""
  occurring = values[~np.isnan(values)]
  return float(occurring.mean()) if occurring.size else 0.0


def semantic_scores(sums: FrameSums) -> dict[str, float]:
  """The six semantic scores of summed `semantic_frame_sums`.

  The published mean, as in the release, runs over all C classes and one that never occurs counts
  as 0; the scores of a small test set are therefore low. The mean over the classes that occur, in
  prediction or target, tells there how good the model is.

  Returns:
    miou, fscore: published; miou_no_background, fscore_no_background: the same without class 0;
    miou_occurring, fscore_occurring: over the classes that occur, background included.
  """
  values = class_values(sums)
  iou, f = (np.nan_to_num(v) for v in values)
  iou_occurring, f_occurring = (_occurring_mean(v) for v in values)
  return {
    'miou': float(iou.mean()),
    'fscore': float(f.mean()),
    'miou_no_background': float(iou[1:].mean()),
    'fscore_no_background': float(f[1:].mean()),
    'miou_occurring': iou_occurring,
    'fscore_occurring': f_occurring,
  }


def _by_subset(keys: Sequence[ClipKey]) -> dict[str, list[ClipKey]]:
  """Keys per subset, v1s, v1m, v2 first, uids sorted."""

  def order(key: ClipKey) -> tuple:
    subset, uid = key
    known = _SUBSET_ORDER.index(subset) if subset in _SUBSET_ORDER else len(_SUBSET_ORDER)
    return known, subset, uid

  groups = {}
  for key in sorted(keys, key=order):
    groups.setdefault(key[0], []).append(key)
  return groups


def summarise_binary(per_clip: Mapping[ClipKey, tuple[float, float]]) -> dict:
  """The data-set part of a binary evaluation file.

  Args:
    per_clip: (subset, uid) -> (miou, fscore) of `binary_clip_metrics`; at least one.

  Returns:
    overall, subsets (with the number of clips) and per_clip. Every score is the mean over clips.
  """

  def scores(keys: Sequence[ClipKey]) -> dict[str, float]:
    miou, fscore = np.mean([per_clip[key] for key in keys], axis=0)
    return {'miou': float(miou), 'fscore': float(fscore)}

  groups = _by_subset(list(per_clip))
  ordered = [key for keys in groups.values() for key in keys]
  return {
    'overall': scores(ordered),
    'subsets': {name: {'clips': len(keys), **scores(keys)} for name, keys in groups.items()},
    'per_clip': [
      {'uid': uid, 'subset': subset, **scores([(subset, uid)])} for subset, uid in ordered
    ],
  }


def summarise_semantic(per_clip_sums: Mapping[ClipKey, FrameSums]) -> dict:
  """The data-set part of a semantic evaluation file.

  Args:
    per_clip_sums: (subset, uid) -> sums of `semantic_frame_sums`; at least one, C equal in all.

  Returns:
    overall, subsets, per_class and per_clip. overall and subsets are `semantic_scores` of the
    summed frames. per_class gives iou and fscore None for a class that never occurs. A clip's own
    scores are means over the classes that occur in it, in prediction or target.
  """

  def total(keys: Sequence[ClipKey]) -> FrameSums:
    return tuple(np.sum(parts, axis=0) for parts in zip(*(per_clip_sums[key] for key in keys)))

  def clip_scores(key: ClipKey) -> dict[str, float]:
    iou, f = class_values(per_clip_sums[key])
    return {'miou': _occurring_mean(iou), 'fscore': _occurring_mean(f)}

  groups = _by_subset(list(per_clip_sums))
  ordered = [key for keys in groups.values() for key in keys]
  overall = total(ordered)
  iou, f = class_values(overall)
  return {
    'overall': semantic_scores(overall),
    'subsets': {
      name: {'clips': len(keys), **semantic_scores(total(keys))} for name, keys in groups.items()
    },
    'per_class': [
      {
        'id': class_id,
        'name': CLASS_NAMES[class_id],
        'iou': float(iou[class_id]) if count else None,
        'fscore': float(f[class_id]) if count else None,
        'frames': int(count),
      }
      for class_id, count in enumerate(overall[2])
    ],
    'per_clip': [
      {'uid': uid, 'subset': subset, **clip_scores((subset, uid))} for subset, uid in ordered
    ],
  }


def format_table(results: Sequence[Mapping], *, markdown: bool = False) -> str:
  """A plain-text or Markdown table of several evaluation files.

  Args:
    results: evaluation files as dicts; a key "name" names the row, else its task does.
    markdown: pipes between the columns, instead of two blanks.

  Returns:
    Lines joined by newlines. One row a file: name, audio, prior, then mIoU / F in percent over all
    clips and over each subset that occurs in any of the files. With a semantic file among them,
    also mIoU / F over all clips as the mean over the classes that occur.
  """
  subsets = list(_by_subset([(name, '') for result in results for name in result['subsets']]))

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
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

  def line(row: Sequence[str]) -> str:
    # Words to the left, numbers to the right.
    cells = [
      text.ljust(width) if i < 3 else text.rjust(width)
      for i, (text, width) in enumerate(zip(row, widths))
    ]
    return f'| {" | ".join(cells)} |' if markdown else '  '.join(cells)

  rule = [('-' * w if i < 3 else '-' * (w - 1) + ':') if markdown else '-' * w
          for i, w in enumerate(widths)]  # fmt: skip
  return '\n'.join([line(rows[0]), line(rule), *map(line, rows[1:])])
