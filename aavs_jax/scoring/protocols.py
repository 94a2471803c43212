"""From records of clips to the scores of a split, by the protocols in use.

AVSBench: as published; the mean over the clips (binary task), or over the frames in which a class
occurs and then over the classes (semantic task).

Data set: pixels are counted over the whole split first, as is usual in semantic segmentation, and
IoU and F-measure (beta^2 0.3) come from the totals: of the class "sounding" in the binary task, the
mean over the classes in the semantic one. What others report as F here is that of the predicted map
('fscore'), since no threshold is tuned on the test set; 'fscore_best', binary only, is that of the
best of 255 thresholds, one for the whole split. J&F is the mean of IoU and F.

False positives: the share of silent pixels that are predicted sounding. With any audio but its own,
nothing in a clip sounds.

As released: what the code of TPAVI and AVSegFormer prints. In the binary task it takes mIoU and F,
with its best threshold, of a batch of clips and then means over batches: larger batches give lower
F. In the semantic one clips of five frames are filled up to ten, and the empty frames count as
background that is found; and "without background" it leaves out the last class, not the first.

All but what is kept of single clips and classes has 95 % intervals over clips: percentiles of the
score in 1000 bootstrap samples.
"""

from collections.abc import Callable, Sequence

import numpy as np

from aavs_jax.input_pipeline.clips import Clip
from aavs_jax.scoring.metrics import best_of_curve, f_curve, frame_values, pixel_values

Sums = dict[str, np.ndarray]  # a field of the records -> its sum over clips, [...] or [s ...]
Scores = dict[str, np.ndarray]  # a score's name -> its value, [] or [s]

_RESAMPLES = 1000


def summarise(clips: Sequence[Clip], records: np.ndarray, *, audio: str = 'true') -> dict:
  """The scores of a split, as they stand in an evaluation file.

  Args:
    clips: of one data set, at least one, no clip twice. Their order changes nothing.
    records: the clips' records, [n] of metrics.record_type.
    audio: what they heard; with anything but 'true' all that is predicted sounding is false.

  Returns:
    overall, subsets (with the number of clips): scores by the AVSBench protocol,
      miou, fscore: in the semantic task as published over all c classes, where one that never
        occurs counts as 0, so that a small split scores low;
      miou_no_background, fscore_no_background: the same without class 0 (semantic);
      miou_occurring, fscore_occurring: over the classes that occur, in prediction or target,
        background included (semantic);
      and false_positive_rate; sounding_share, the share of all pixels that is predicted sounding;
      ci95, for each of these its interval [low, high].
    per_class (semantic): iou and fscore of the AVSBench protocol, None if the class never occurs.
    per_clip: miou and fscore; in the semantic task means over the classes that occur in the clip.
    dataset: overall, subsets and per_class of the data-set protocol, with jf, J&F, for each pair of
      miou and fscore; fscore_best (binary); and iou_sounding, the IoU of what sounds, whatever its
      class, in both tasks by the labels of the semantic one. That is miou in the binary task, but
      for a method whose truth is dilated there.
  """
  data_set = clips[0].data_set
  ranks = {subset: rank for rank, subset in enumerate(data_set.subsets)}
  order = sorted(range(len(clips)), key=lambda i: (ranks[clips[i].subset], clips[i].uid))
  clips, records = [clips[i] for i in order], records[order]
  subsets = np.array([clip.subset for clip in clips])
  groups = {name: records[subsets == name] for name in dict.fromkeys(subsets.tolist())}
  counts = {name: {'clips': len(group)} for name, group in groups.items()}
  avsbench, dataset = _group_scores(records, audio)
  by_subset = {name: _group_scores(group, audio) for name, group in groups.items()}
  result = {
    'overall': avsbench,
    'subsets': {name: counts[name] | scores for name, (scores, _) in by_subset.items()},
    'dataset': {
      'overall': dataset,
      'subsets': {name: counts[name] | scores for name, (_, scores) in by_subset.items()},
    },
  }
  if 'scores' in records.dtype.names:
    miou, fscore = records['scores'].T
  else:
    miou, fscore = (_occurring_mean(v) for v in frame_values(records['frames']))
    frames = records['frames'].sum(axis=0)
    result['per_class'] = [
      {**row, 'frames': int(count)}
      for row, count in zip(_class_rows(data_set.classes, *frame_values(frames)), frames[2])
    ]
    iou, f = pixel_values(records['pixels'].sum(axis=0))
    result['dataset']['per_class'] = _class_rows(data_set.classes, iou, f, jf=(iou + f) / 2)
  result['per_clip'] = [
    {'uid': clip.uid, 'subset': clip.subset, 'miou': float(j), 'fscore': float(f)}
    for clip, j, f in zip(clips, miou, fscore)
  ]
  return result


def as_released(clips: Sequence[Clip], records: np.ndarray, batch: int) -> dict[str, float]:
  """miou and fscore as TPAVI's and AVSegFormer's code takes them.

  Args:
    clips: in the order of the data set's table.
    records: the clips' records, [n] of metrics.record_type.
    batch: clips of a batch of the binary task: 4 in TPAVI, 2 in AVSegFormer.

  Returns:
    Of the semantic task also miou_without_last and fscore_without_last.
  """
  if 'scores' in records.dtype.names:
    parts = np.split(records, range(batch, len(records), batch))
    iou = np.mean([part['scores'][:, 0].mean() for part in parts])
    f = np.mean([best_of_curve(part['curve'].sum(axis=0)) for part in parts])
    return {'miou': float(iou), 'fscore': float(f)}
  scores = {}
  sums = padded(clips, records['frames'].sum(axis=0))
  for name, values in zip(('miou', 'fscore'), frame_values(sums)):
    values = np.nan_to_num(values)
    scores[name], scores[f'{name}_without_last'] = float(values.mean()), float(values[:-1].mean())
  return scores


def padded(clips: Sequence[Clip], frames: np.ndarray) -> np.ndarray:
  """The sum of the clips' `frames`, with those that fill clips up, of background that is found."""
  longest = max(clips[0].data_set.subsets.values())
  lacking = sum(longest - clip.num_frames for clip in clips)
  return frames + lacking * (np.arange(frames.shape[-1]) == 0)


def _class_rows(
  names: Sequence[str], iou: np.ndarray, fscore: np.ndarray, **more: np.ndarray
) -> list[dict]:
  values = {'iou': iou, 'fscore': fscore, **more}
  return [
    {'id': i, 'name': names[i]}
    | {name: None if np.isnan(value[i]) else float(value[i]) for name, value in values.items()}
    for i in range(len(iou))
  ]


def _group_scores(records: np.ndarray, audio: str) -> tuple[dict, dict]:
  """Scores of some clips by the AVSBench protocol, false positives included, and by the data set's.

  A score is a function of sums over clips, so the bootstrap samples go through the same lines.
  """
  clips = len(records)
  whole = {name: records[name].sum(axis=0) for name in records.dtype.names}
  samples = _bootstrap(records)

  def with_intervals(score: Callable[[Sums], Scores]) -> dict:
    values, spread = score(whole), score(samples)
    low, high = np.quantile(list(spread.values()), (0.025, 0.975), axis=1).tolist()
    intervals = {name: [a, b] for name, a, b in zip(spread, low, high)}
    return {name: float(value) for name, value in values.items()} | {'ci95': intervals}

  return (
    with_intervals(lambda s: _avsbench(s, whole, clips) | _false_positives(s['pixels'], audio)),
    with_intervals(lambda s: _dataset(s, whole)),
  )


def _bootstrap(records: np.ndarray) -> Sums:
  """Sums of 1000 samples [1000 ...], each of as many clips as there are, drawn with replacement.

  The draws are the same for the same number of clips.
  """
  clips = len(records)
  draws = np.random.default_rng(0).integers(clips, size=(_RESAMPLES, clips))
  # How often each sample holds each clip: then a product with the clips' values gives the sums.
  draws += np.arange(_RESAMPLES)[:, None] * clips
  times = np.bincount(draws.ravel(), minlength=draws.size).reshape(draws.shape).astype(np.float64)
  return {
    name: (times @ records[name].reshape(clips, -1)).reshape(-1, *records[name].shape[1:])
    for name in records.dtype.names
  }


def _avsbench(sums: Sums, whole: Sums, clips: int) -> Scores:
  if 'scores' in sums:
    miou, fscore = np.moveaxis(sums['scores'] / clips, -1, 0)
    return {'miou': miou, 'fscore': fscore}
  return _class_means(*_class_values(frame_values, 'frames', sums, whole))


def _dataset(sums: Sums, whole: Sums) -> Scores:
  iou, f = _class_values(pixel_values, 'pixels', sums, whole)
  if 'ranks' in sums:
    sounding = {'miou': np.nan_to_num(iou[..., 1]), 'fscore': np.nan_to_num(f[..., 1])}
    best = f_curve(sums['ranks']).max(axis=-1)
    jf = (sounding['miou'] + sounding['fscore']) / 2
    located = _iou(*np.moveaxis(sums['sounding'], -1, 0))
    return sounding | {'jf': jf, 'fscore_best': best, 'iou_sounding': located}
  means = _class_means(iou, f)
  for kind in ('', '_no_background', '_occurring'):
    means[f'jf{kind}'] = (means[f'miou{kind}'] + means[f'fscore{kind}']) / 2
  both, predicted, true = (sums['pixels'][..., i, :] for i in range(3))
  everything = predicted.sum(axis=-1)
  found, there = everything - predicted[..., 0], everything - true[..., 0]
  shared = everything - predicted[..., 0] - true[..., 0] + both[..., 0]
  return means | {'iou_sounding': _iou(shared, found, there)}


def _iou(both: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
  return both / np.maximum(predicted + true - both, 1)


def _class_values(values: Callable, field: str, sums: Sums, whole: Sums) -> list[np.ndarray]:
  """IoU and F per class, NaN where it never occurs in the whole.

  A class that a bootstrap sample happens to miss keeps its value in the whole: which classes a
  split has is not a matter of chance, and counted as 0 they would all pull the samples down.
  """
  pairs = zip(values(sums[field]), values(whole[field]))
  return [np.where(np.isnan(value), in_whole, value) for value, in_whole in pairs]


def _class_means(iou: np.ndarray, fscore: np.ndarray) -> Scores:
  """Means over classes of values [..., c] that are NaN for a class that does not occur."""
  means = {}
  for name, values in (('miou', iou), ('fscore', fscore)):
    filled = np.nan_to_num(values)
    means[name] = filled.mean(axis=-1)
    means[f'{name}_no_background'] = filled[..., 1:].mean(axis=-1)
    means[f'{name}_occurring'] = _occurring_mean(values)
  return means


def _occurring_mean(values: np.ndarray) -> np.ndarray:
  """Mean over the last axis of what is not NaN; 0 if nothing is."""
  occurs = ~np.isnan(values)
  return np.nan_to_num(values).sum(axis=-1) / np.maximum(np.count_nonzero(occurs, axis=-1), 1)


def _false_positives(pixels: np.ndarray, audio: str) -> Scores:
  """Of pixels [..., 3, c], class 0 being silence."""
  both, predicted, true = np.moveaxis(pixels, -2, 0)
  everything = np.maximum(predicted.sum(axis=-1), 1)
  share = predicted[..., 1:].sum(axis=-1) / everything
  rate = (true[..., 0] - both[..., 0]) / np.maximum(true[..., 0], 1) if audio == 'true' else share
  return {'false_positive_rate': rate, 'sounding_share': share}
