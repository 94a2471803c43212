"""The strategy, in order: stage 1, its masks, stage 2, what both score.

Stage 1 learns where the sound comes from. Stage 2 learns what it is, and is given where: the prior.
While stage 2 trains, the prior is the TRUTH, its labels without their classes
(items.load_training_item). Stage 1's masks take its place in validation and test alone
(items.load_eval_item), so they are written of these splits and of no other. Where
config.prior.predicted says otherwise, training meets such masks as well, see cross_fit.py.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_collections
from etils import epath

from aavs_jax import config as config_lib
from aavs_jax import evaluate, hand_over
from aavs_jax.console import say
from aavs_jax.cross_fit import cross_fit
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.input_pipeline.masks import source_digest
from aavs_jax.input_pipeline.reader import label_digest
from aavs_jax.train import train
from aavs_jax.training import checkpoint
from aavs_jax.training.state import digest, unflatten


class Evaluation(NamedTuple):
  """What is scored on the test split, and how; see the arguments of evaluate.evaluate."""

  stage: str  # the folder of its model, below that of the run
  audio: str = 'true'
  prior: str = ''  # of stage 2: 'masks', those of stage 1, 'oracle', the truth, or 'none'
  maps: bool = False  # keep what is predicted, in eval/NAME
  subsets: Sequence[str] | None = None


FOLDS = 2  # of the training clips, where stage 2 is trained on stage 1's masks of them

EVALUATIONS = {
  'stage1_true': Evaluation('stage1'),
  'stage1_other': Evaluation('stage1', audio='other'),
  'stage1_silence': Evaluation('stage1', audio='silence'),
  'stage2_masks': Evaluation('stage2', prior='masks', maps=True),
  'stage2_oracle': Evaluation('stage2', prior='oracle'),
}


def stepping_stones(
  stage1: ml_collections.ConfigDict,
  stage2: ml_collections.ConfigDict,
  folder: Path,
  *,
  data: str,
  seed: int,
) -> dict[str, dict]:
  """Trains and scores both stages; what an earlier call has completed is not done again.

  Args:
    stage1: config of stage 1.
    stage2: config of stage 2; its masks are those of stage 1. If it names no start, it begins with
      what stage 1 has learnt, while the published stages both begin with one and the same start.
    folder: of the run; stage1/, masks/, stage2/ and eval/ appear in it.
    data: the data set.
    seed: of both stages.

  Returns:
    What `scores` says of EVALUATIONS.
  """
  stage1, stage2 = (stage.copy_and_resolve_references() for stage in (stage1, stage2))
  stage1.seed = stage2.seed = seed
  stage1.data.root = stage2.data.root = data

  say(f'[3] stage 1: where the sound comes from (seed {seed})')
  train(stage1, folder / 'stage1')

  say("[4] stage 1's masks of val and test, the stepping stones of stage 2")
  out, soft = folder / 'masks', stage2.prior.soft
  hand_over.write_masks(folder / 'stage1', data=data, out=out, soft=soft)
  if stage2.prior.predicted:
    say('    and those of the training clips, by models that have not been trained on them')
    cross_fit(stage1, folder / 'cross_fit', data=data, out=out, folds=FOLDS, soft=soft)

  say('[5] stage 2: what it is')
  stage2.train.init = stage2.train.init or str(folder / 'stage1')
  stage2.data.masks = str(out)
  train(stage2, folder / 'stage2')

  say('[6] evaluation on the test split')
  return scores(EVALUATIONS, folder, data=data, masks=out)


def scores(
  evaluations: Mapping[str, Evaluation], folder: Path, *, data: str, masks: str | Path
) -> dict[str, dict]:
  """Evaluates what FOLDER/eval/NAME.json does not hold yet of the same model, masks and clips.

  Args:
    evaluations: by name.
    folder: of the run.
    data: the data set.
    masks: folder of stage 1's masks, where they are the prior.

  Returns:
    By the same names what evaluate.evaluate returns.
  """

  @functools.cache
  def model(stage):
    flat, step = checkpoint.load_flat(folder / stage)
    config = config_lib.from_json(epath.Path(folder / stage / 'config.json'))
    of = {'checkpoint_step': step, 'checkpoint_digest': digest(unflatten(flat)), 'split': 'test'}
    return of, config.data

  results = {}
  for name, (stage, audio, prior, maps, subsets) in evaluations.items():
    out = folder / 'eval' / f'{name}.json'
    of_masks = source_digest(masks) if prior == 'masks' else None
    of, usual = model(stage)
    given = {'masks': 'stage1', '': None}.get(prior, prior)
    clips = read_index(data, 'test', subsets or usual.subsets)
    labels = label_digest(clips, usual.image_size, usual.eval_size)
    origin = {
      **of, 'masks_digest': of_masks, 'audio': audio, 'prior': given, 'labels_digest': labels,
    }  # fmt: skip
    results[name] = evaluate.reusable(out, origin, clips) or evaluate.evaluate(
      folder / stage,
      data=data,
      out=out,
      audio=audio,
      oracle=prior == 'oracle',
      no_prior=prior == 'none',
      mask_folder=str(masks) if prior == 'masks' else '',
      maps=out.with_suffix('') if maps else None,
      subsets=subsets,
    )
  return results
