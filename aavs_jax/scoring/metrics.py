"""What one clip adds to the scores: the published metrics' terms, and plain counts of pixels.

Host side, numpy only. Both tasks are scored at the size of their inputs, published at 224x224.
A clip becomes one record, a numpy structured value of `record_type`; records of a split are
an array, and all that `protocols.summarise` needs.
"""

import numpy as np
from jaxtyping import Bool, Float, UInt8

from aavs_jax.input_pipeline.clips import IGNORE

_BETA_SQUARED = 0.3
# float32 as in the release: there the last threshold, 1 - 1e-10, rounds to 1.
_THRESHOLDS = np.linspace(0, 1 - 1e-10, 255).astype(np.float32)


def record_type(task: str, num_classes: int) -> np.dtype:
  """What is kept of a clip, all float64.

  Fields:
    pixels [3, c], both tasks: pixels of each class that are predicted and true, predicted, true,
      in all frames of the clip. Ignored pixels are in none of them in the semantic task, and silent
      in the binary one, whose labels are black there in the release.
    scores [2], binary task: mIoU and F-measure of the clip as published.
    ranks [2, 256], binary task: pixels that are silent (0) or sound (1) in truth, by the number
      of thresholds that their probability reaches. `f_curve` makes F-measures of them.
    sounding [3], binary task: pixels predicted to sound that do, all of these, all that sound; by
      the labels of the semantic task, ignored ones left out as there.
    curve [256], binary task: sums over the frames in which something sounds of their F-measure at
      each of 255 thresholds, and the number of these frames.
    frames [3, c], semantic task: sums over the clip's frames of each class's IoU and F-measure, and
      the number of frames in which the class occurs in prediction or target.
  """
  pixels = ('pixels', np.float64, (3, num_classes))
  if task == 'binary':
    scores, ranks = ('scores', np.float64, (2,)), ('ranks', np.float64, (2, 256))
    curve, sounding = ('curve', np.float64, (256,)), ('sounding', np.float64, (3,))
    return np.dtype([pixels, scores, ranks, curve, sounding])
  return np.dtype([pixels, ('frames', np.float64, (3, num_classes))])


def binary_record(
  scores: Float[np.ndarray, 'T 2 H W'],
  target: Bool[np.ndarray, 'T H W'],
  ids: UInt8[np.ndarray, 'T H W'] | None = None,
) -> np.ndarray:
  """The record of one clip of the binary task (stage 1).

  Its published scores are
    mIoU: mean over the frames of the IoU of the argmax map (a tie is background). A frame with an
      empty target scores the share of its pixels that are predicted silent;
    F-measure (beta^2 0.3) of p = sigmoid(2 s1 - s0) at 255 thresholds, averaged over the frames
      with a non-empty target, at its best threshold. 0 if there is no such frame.

  Args:
    scores: float32, the scores of "background" and "sounding" per pixel, before any softmax.
    target: True where a pixel sounds, for all but `sounding`.
    ids: class ids, 0 is silence, 255 neither; for `sounding`. By default what sounds by `target`.

  Returns:
    One value of `record_type`.
  """
  background, sounding = scores[:, 0], scores[:, 1]
  predicted = sounding > background
  frames = len(target)
  intersection = (predicted & target).reshape(frames, -1).sum(axis=1)
  union = (predicted | target).reshape(frames, -1).sum(axis=1)
  sounds = target.reshape(frames, -1).any(axis=1)
  silent_share = 1 - predicted.reshape(frames, -1).mean(axis=1)
  iou = np.where(sounds, intersection / np.maximum(union, 1), silent_share)

  with np.errstate(over='ignore'):  # exp of a large number: the probability is 0, as it should be
    probabilities = 1 / (1 + np.exp(background - 2 * sounding))
  ranks = np.stack([_count_ranks(p, t) for p, t in zip(probabilities, target)])
  curve = np.append(f_curve(ranks[sounds]).sum(axis=0), np.count_nonzero(sounds))
  fscore = best_of_curve(curve)

  silent = ~predicted & ~target
  pixels = [
    [np.count_nonzero(silent), intersection.sum()],
    [np.count_nonzero(~predicted), np.count_nonzero(predicted)],
    [np.count_nonzero(~target), np.count_nonzero(target)],
  ]
  ids = target if ids is None else ids
  found, true = predicted & (ids != IGNORE), (ids > 0) & (ids != IGNORE)
  sounding = [np.count_nonzero(pixels) for pixels in (found & true, found, true)]
  record = (pixels, (iou.mean(), fscore), ranks.sum(axis=0), curve, sounding)
  return np.array(record, record_type('binary', 2))


def _count_ranks(probabilities: np.ndarray, target: np.ndarray) -> np.ndarray:
  """int64 [2, 256]: silent and sounding pixels of one frame by how many thresholds they reach."""
  ranks = _threshold_rank(probabilities.ravel())
  return np.bincount(ranks + np.uint16(256) * target.ravel(), minlength=512).reshape(2, 256)


def _threshold_rank(probabilities: np.ndarray) -> np.ndarray:
  """How many of the 255 thresholds are <= each value, uint16 of the shape of `probabilities`."""
  # The thresholds are even, so a product finds the rank, off by one at most where it was rounded;
  # several times quicker than a search.
  rank = (probabilities * np.float32(254)).astype(np.uint16)
  rank -= _THRESHOLDS[rank] > probabilities
  rank += np.append(_THRESHOLDS, np.float32(np.inf))[rank + 1] <= probabilities
  return rank + 1


def best_of_curve(curve: np.ndarray) -> float:
  """F at its best threshold, of `record_type`'s curve or a sum of such; 0 without frames."""
  return curve[:-1].max() / max(curve[-1], 1)


def f_curve(ranks: np.ndarray) -> np.ndarray:
  """F-measure at every threshold, float64 [..., 255], of counts as in `record_type`'s ranks."""
  # A pixel of rank r is predicted at the thresholds 0..r-1: counts from the top give the totals.
  predicted_on = ranks[..., ::-1].cumsum(axis=-1)[..., ::-1][..., 1:]
  true_positive = predicted_on[..., 1, :].astype(np.float64)
  precision = true_positive / (predicted_on.sum(axis=-2) + 1e-20)
  recall = true_positive / (ranks[..., 1, :].sum(axis=-1, keepdims=True) + 1e-20)
  return _f_measure(precision, recall)


def _f_measure(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
  """(1 + b) P R / (b P + R) with b = 0.3, and 0 where both are 0."""
  denominator = _BETA_SQUARED * precision + recall
  product = (1 + _BETA_SQUARED) * precision * recall
  return np.divide(product, denominator, out=np.zeros_like(product), where=denominator > 0)


def semantic_record(
  pred: UInt8[np.ndarray, 'T H W'], target: UInt8[np.ndarray, 'T H W'], num_classes: int
) -> np.ndarray:
  """The record of one clip of the semantic task.

  Args:
    pred: class ids below `num_classes`.
    target: class ids below `num_classes`; pixels of value 255 count neither for nor against.
    num_classes: c, background included.

  Returns:
    One value of `record_type`.

  Raises:
    ValueError: an id is none of these.
  """
  frames = len(pred)
  # One bin a frame and class, and one more per frame that swallows the ignored pixels.
  bins = num_classes + 1
  offset = (np.arange(frames, dtype=np.int32) * bins)[:, None, None]
  ignored = target == IGNORE
  for values in (pred, target[~ignored]):
    if values.size and values.max() >= num_classes:  # would count as a class of the next frame
      raise ValueError(f'class id {values.max()} in a record of {num_classes} classes')
  pred_bins = np.where(ignored, num_classes, pred) + offset
  target_bins = np.where(ignored, num_classes, target) + offset

  def count_bins(values: np.ndarray) -> np.ndarray:
    counts = np.bincount(values.ravel(), minlength=frames * bins).reshape(frames, bins)
    return counts[:, :num_classes].astype(np.float64)

  pixels = np.stack([
    count_bins(pred_bins[pred == target]), count_bins(pred_bins), count_bins(target_bins)
  ])  # fmt: skip
  iou, f = pixel_values(pixels.swapaxes(0, 1))
  per_frame = np.stack([np.nan_to_num(iou), np.nan_to_num(f), ~np.isnan(iou)])
  record = (pixels.sum(axis=1), per_frame.sum(axis=1))
  return np.array(record, record_type('semantic', num_classes))


def frame_values(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """IoU and F-measure per class, the means over the frames in which it occurs, float64 [..., c].

  Args:
    frames: float64 [..., 3, c], sums of `record_type`'s frames.

  Returns:
    NaN for a class that never occurs.
  """
  with np.errstate(invalid='ignore'):
    return frames[..., 0, :] / frames[..., 2, :], frames[..., 1, :] / frames[..., 2, :]


def pixel_values(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """IoU and F-measure per class of all pixels together, float64 [..., c].

  Args:
    pixels: float64 [..., 3, c], sums of `record_type`'s pixels.

  Returns:
    NaN for a class that occurs neither in prediction nor in target.
  """
  both, predicted, true = np.moveaxis(pixels, -2, 0)
  union = predicted + true - both
  iou = both / np.maximum(union, 1)
  f = _f_measure(both / np.maximum(predicted, 1), both / np.maximum(true, 1))
  return np.where(union > 0, iou, np.nan), np.where(union > 0, f, np.nan)
