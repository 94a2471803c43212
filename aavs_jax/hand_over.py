"""The hand-over: stage 1's masks, the prior of stage 2 in validation and test."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_collections

from aavs_jax import config as config_lib
from aavs_jax import methods
from aavs_jax.console import Progress, counted, say
from aavs_jax.devices import distributed
from aavs_jax.devices.distributed import share
from aavs_jax.input_pipeline import files, items, masks
from aavs_jax.input_pipeline.clips import Clip
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.input_pipeline.reader import label_digests
from aavs_jax.scoring.predictor import Predictor, ahead, predict_clips
from aavs_jax.training.state import digest
from aavs_jax.training.work_folder import load_trained
from aavs_jax.types import Variables


def write_masks(
  workdir: str | Path,
  *,
  data: str,
  out: str | Path,
  splits: Sequence[str] = ('val', 'test'),
  soft: bool = False,
) -> int:
  """The hand-over: stage 1's masks of every clip of the splits, OUT/SUBSET/UID/{0..}.png.

  Clips whose masks are there and sound already are left alone, so a killed run goes on where it
  was; masks of another checkpoint or kind are not mixed in: the folder remembers which one wrote
  it, and whether soft ones. Of several processes, all of which must call this, each writes its
  share of the clips.

  Returns:
    Number of clips written now, by all processes.

  Raises:
    UserError: the model is not of stage 1; `out` is a data set, holds masks of another model or
      kind, or something else in their place; faults of model or data.
  """
  masks.refuse_data_set(out)
  config, variables, step = load_trained(workdir)
  if config.task != 'binary':
    raise UserError(f'{workdir} holds a model of the semantic task: masks come from a stage-1 one')
  if soft:
    methods.require_nonnegative_scores(config)
  clips = [clip for split in splits for clip in read_index(data, split, config.data.subsets)]
  config_lib.require_fit(clips, config)
  source = {
    'checkpoint': str(workdir),
    'step': step,
    'digest': digest(variables),
    'kind': masks.kind_of(soft),
    'labels': label_digests(clips, config.data.image_size, config.data.eval_size),
  }
  distributed.require_same(
    {
      'checkpoint': source['digest'],
      'list of clips': [clip.name for clip in clips],
      'data set': source['labels'],
    }
  )
  claim_masks(Path(out), source, clips[0].data_set.subsets)
  return write_clips(config, variables, clips, out=out, soft=soft)


def write_clips(
  config: ml_collections.ConfigDict,
  variables: Variables,
  clips: Sequence[Clip],
  *,
  out: str | Path,
  soft: bool,
) -> int:
  """The masks of clips by a model of stage 1, in a folder that is claimed; see write_masks."""
  size = config.data.eval_size
  todo = [clip for clip in share(clips) if not masks.is_complete(str(out), clip, size, soft)]
  if kept := len(clips) - sum(distributed.gather(len(todo))):
    say(f'  masks of {counted(kept, "clips")} were there and are kept')
  task, predictor = config_lib.task_of(config), Predictor(methods.of(config))
  batches = predictor.batches(
    config, todo, lambda item: items.load_unlabelled_item(todo[item.clip], item, task)
  )

  def write(clip, scores):
    masks.write_clip_masks(str(out), clip, masks.of_scores(scores, soft))

  threads = config.data.threads
  with (
    Progress('masks of stage 1', len(todo), 'clips') as progress,
    ThreadPoolExecutor(threads) as pool,
  ):
    writes = (
      pool.submit(write, todo[index], scores)
      for index, scores, _ in predict_clips(predictor, variables, progress.waiting_for(batches))
    )
    for future in ahead(writes, threads):
      future.result()
      progress.advance(1)
  # Not before all masks are there: what comes next may read those of any process.
  return sum(distributed.gather(len(todo)))


def claim_masks(folder: Path, source: dict, subsets: Iterable[str]) -> None:
  """Notes in the folder which checkpoint its masks come from, and what tells its data set.

  Raises:
    UserError: they come from another one, or are of other clips of the same names.
  """
  found = masks.read_source(folder)
  if found is not None:
    if found['digest'] != source['digest']:
      raise UserError(
        f'{folder} holds masks of another model ({found["checkpoint"]}, step {found["step"]}): '
        'remove it or name another folder'
      )
    if found['kind'] != source['kind']:
      raise UserError(
        f'{folder} holds {found["kind"]} masks, and these are {source["kind"]}: remove it or name '
        'another folder'
      )
    known = found.get('labels', {})
    for name, labels in source['labels'].items():
      if known.get(name, labels) != labels:
        raise UserError(
          f'{folder} holds masks of another data set, in which {name} has other labels: remove it '
          'or name another folder'
        )
    both = {**found, 'labels': source['labels'] | known}
    if both != found and distributed.is_first():
      files.write_json(folder / masks.SOURCE, both)
    return
  for subset in subsets:
    if (folder / subset).exists():
      raise UserError(
        f'{folder} holds {subset} but no {masks.SOURCE}, so it is unknown which model wrote it: '
        'remove it or name another folder'
      )
  # Every process has looked before the first mask is written.
  distributed.wait_for_all('masks')
  if distributed.is_first():
    files.write_json(folder / masks.SOURCE, source)
