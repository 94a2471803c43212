"""Stage 1's masks of training clips, each by a model that has not been trained on the clip.

Those of the stage 1 that has would be better than any that stage 2 meets in validation and test.
The start of these trainings must not have been trained on the clips' masks, either. That it has
heard their sounds, as one of `aavs start` has, leaves the masks a little better than in the test.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import ml_collections

from aavs_jax import hand_over, methods
from aavs_jax.config import task_of
from aavs_jax.console import say
from aavs_jax.input_pipeline import bad_clips, files, masks, prepared
from aavs_jax.input_pipeline.clips import Clip, fold_of
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.input_pipeline.reader import label_digests
from aavs_jax.train import train
from aavs_jax.training.state import digest
from aavs_jax.training.work_folder import BAD_CLIPS, load_trained, seen_by


def cross_fit(
  config: ml_collections.ConfigDict,
  workdir: str | Path,
  *,
  data: str,
  out: str | Path,
  folds: int = 5,
  soft: bool = False,
) -> int:
  """Trains stage 1 once for each part of the training clips, without it, and has it predict it.

  What is complete is not done again, so the same call goes on where an earlier one has ended. Clips
  that cannot be read get no masks.

  Args:
    config: of stage 1.
    workdir: WORKDIR/fold{k} is the work folder of the training without part k, see clips.fold_of.
    data: the data set.
    out: folder of masks, such as hand_over.write_masks has made, where config.data.masks of stage 2
      will look for them: they go to OUT/cross_fitted.
    folds: parts of the training clips; each is left to a training on the others.
    soft: the probability and not the decision, see masks.of_scores.

  Returns:
    Number of clips whose masks were written now.

  Raises:
    UserError: the config is not of stage 1, or its start was trained on the clips; fewer than two
      folds; `out` is a data set or holds masks of other trainings or kind; faults of config, data
      or folders.
  """
  for path in (workdir, data):
    files.refuse_bucket(path)
  masks.refuse_data_set(out)
  if config.task != 'binary':
    raise UserError("the config is of the semantic task: masks come from stage 1, a 'binary' one")
  if soft:
    methods.require_nonnegative_scores(config)
  if config.data.leave_out != (0, 0):
    raise UserError(
      f'config.data.leave_out is {config.data.leave_out}, but each training here leaves out a part '
      'of its own: leave it at (0, 0)'
    )
  if folds < 2:
    raise UserError(f'{folds} folds leave no clips to train on: use 2 or more')
  clips = read_index(data, 'train', config.data.subsets)
  held_out = {fold_of(clip, folds) for clip in clips}
  if empty := sorted(set(range(folds)) - held_out):
    raise UserError(
      f'{folds} folds of {len(clips)} training clips leave no clip to part {empty[0] + 1}: use '
      'fewer'
    )
  _refuse_seen(config.train.init, clips)
  target = Path(out) / masks.CROSS_FITTED
  begun = masks.read_source(target) or {}
  for key, value in (('folds', folds), ('kind', masks.kind_of(soft))):
    if begun.get(key, value) != value:
      raise UserError(
        f'{target} was begun with {key} {begun[key]}, not {value}: use the same, or another folder'
      )
  trained = [Path(workdir) / f'fold{k}' for k in range(folds)]
  if begun and not all(folder.exists() for folder in trained):
    raise UserError(
      f'{target} holds masks of {begun["checkpoint"]}, not of trainings in {workdir}, which come '
      'first: remove it, or name another folder'
    )
  digests, steps, bad = [], [], set()
  for k, folder in enumerate(trained):
    say(f'stage 1 without part {k + 1} of {folds} of the training clips')
    fold = config.copy_and_resolve_references()
    fold.data.root, fold.data.leave_out = data, (k, folds)
    train(fold, folder)
    _, variables, step = load_trained(folder)
    digests.append(digest(variables))
    steps.append(step)
    listing = files.read_json(folder / BAD_CLIPS, prepared.BAD_CLIPS, 'restore it')
    bad |= {row['clip'] for row in listing}
  # What has been mended since no training has seen, so all may predict it.
  left_out = [clip for clip in clips if clip.key in bad]
  still = bad_clips.find_bad_clips(left_out, task_of(config), config.data.threads)
  bad = {row['clip'] for row in still}
  source = {
    'checkpoint': str(workdir),
    'step': max(steps),
    'digest': hashlib.sha256(' '.join(digests).encode()).hexdigest()[:16],
    'kind': masks.kind_of(soft),
    'folds': folds,
    'labels': label_digests(clips, config.data.image_size, config.data.eval_size),
  }
  hand_over.claim_masks(target, source, clips[0].data_set.subsets)
  written = 0
  for k, folder in enumerate(trained):
    fold, variables, _ = load_trained(folder)
    unseen = [clip for clip in clips if fold_of(clip, folds) == k and clip.key not in bad]
    written += hand_over.write_clips(fold, variables, unseen, out=target, soft=soft)
  return written


def _refuse_seen(init: str, clips: Sequence[Clip]) -> None:
  """UserError for a start that was itself trained on clips that are to be predicted unseen."""
  seen = seen_by(init)
  both = [clip for clip in clips if clip.name in seen]
  if both:
    raise UserError(
      f'config.train.init is {init}, which was trained on {len(both)} of the clips that it is not '
      f'to have seen, such as {both[0].key}, or began with what was: begin with what the first of '
      'these trainings began with'
    )
