"""Scores of a trained stage on a split, as a file."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from etils import epath

from aavs_jax import config as config_lib
from aavs_jax import methods
from aavs_jax.console import say
from aavs_jax.devices import distributed
from aavs_jax.input_pipeline import files, masks, prepared
from aavs_jax.input_pipeline.clips import Clip, DataSet
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.input_pipeline.reader import label_digest
from aavs_jax.scoring import tables
from aavs_jax.scoring.predictor import Predictor
from aavs_jax.scoring.score import score
from aavs_jax.training.state import digest
from aavs_jax.training.work_folder import class_names, load_trained

PROTOCOL = 2  # to be raised where scores come out otherwise, so that older files are not reused
SHAPE = {  # of an evaluation as it is written, see files.read_json
  'split': str,
  'clips': int,
  'frames': int,
  'overall': {'miou': float, 'fscore': float, ...: object},
  'per_clip': [{'subset': str, 'uid': str, ...: object}],
  ...: object,
}


def evaluate(
  workdir: str | Path,
  *,
  data: str,
  out: str | Path,
  split: str = 'test',
  audio: str = 'true',
  oracle: bool = False,
  no_prior: bool = False,
  mask_folder: str = '',
  maps: str | Path | None = None,
  subsets: Sequence[str] | None = None,
) -> dict:
  """Scores the best checkpoint of a work folder; writes the result as JSON and as Markdown.

  Of several processes, all of which must call this, the first writes the result, and each the maps
  of the clips that it scored.

  Args:
    workdir: folder of `aavs train`.
    data: the data set.
    out: JSON file to write; beside it the tables of it, under the same name with the suffix .md.
    split: train, val or test.
    audio: what the model hears, see listening.choose_sounds.
    oracle: ground truth as the prior of stage 2, as with config.oracle_prior.
    no_prior: stage 2 does without a prior, see prior.UNKNOWN.
    mask_folder: stage 1's masks, if not those of the config.
    maps: folder for the predicted class ids as PNG, MAPS/SUBSET/UID/T.png.
    subsets: which to score, if not those of the config.

  Returns:
    What was written.

  Raises:
    UserError: a prior for a model without one, or two of them; a data set as `maps`; `out` with the
      suffix .md; an unknown audio or subset; faults of model, masks or data.
  """
  tables_file = epath.Path(out).with_suffix('.md')
  if tables_file == epath.Path(out):
    raise UserError(f'--out {out} is where the tables go, beside the JSON: name it .json')
  given = ['--oracle'] * oracle + ['--no-prior'] * no_prior
  given += [f'--masks {mask_folder}'] if mask_folder else []
  if len(given) > 1:
    raise UserError(f'{given[0]} and {given[1]} are two priors: give one of them')
  if maps is not None:
    masks.refuse_data_set(maps)
  if distributed.is_first():
    files.require_place(out)
    files.require_place(tables_file)
  config, variables, step = load_trained(workdir)
  if given and not config.use_prior:
    raise UserError(f'{given[0]} is given, but the model of {workdir} takes no prior: leave it out')
  config.oracle_prior = oracle or (config.oracle_prior and not mask_folder)
  if mask_folder:
    config.data.masks = str(mask_folder)
  clips = read_index(data, split, subsets or config.data.subsets)
  config_lib.require_fit(clips, config)
  if left_out := prepared.left_out(data, split):
    say(f'  WARNING: {left_out} clips of {split} are not in {data}, and so not in the scores')
  if config.task == 'semantic':
    _require_same_classes(class_names(workdir), clips[0].data_set, workdir)
  own_digest = digest(variables)
  labels = label_digest(clips, config.data.image_size, config.data.eval_size)
  distributed.require_same(
    {
      'checkpoint': own_digest,
      'list of clips': [clip.name for clip in clips],
      'data set': labels,
    }
  )
  on_clip = None
  if maps is not None:

    def on_clip(clip, ids):
      masks.write_clip_masks(str(maps), clip, ids)

  name = config_lib.stage_of(config)
  prior = 'none' if no_prior else 'oracle' if config.oracle_prior else 'stage1'
  prior = prior if config.use_prior else None
  predictor = Predictor(methods.of(config))
  summary = score(
    config,
    predictor,
    variables,
    clips,
    audio=audio,
    no_prior=no_prior,
    on_clip=on_clip,
    title=tables.title(name, split, audio, prior),
  )
  result = {
    'name': name,
    'task': config.task,
    'split': split,
    'audio': audio,
    'prior': prior,
    'checkpoint_step': step,
    'checkpoint_digest': own_digest,
    'masks_digest': masks.source_digest(config.data.masks) if prior == 'stage1' else None,
    'labels_digest': labels,
    'protocol': PROTOCOL,
    'clips': len(clips),
    'frames': sum(len(clip.labelled_frames) for clip in clips),
    **summary,
  }
  if distributed.is_first():
    files.write_text(tables_file, tables.format_evaluation(result, markdown=True))
    files.write_json(out, result)  # the last, as where it lies all is done
  return result


def _require_same_classes(names: Sequence[str], data_set: DataSet, workdir: str | Path) -> None:
  for i, (name, other) in enumerate(zip(names, data_set.classes)):
    if name != other:
      raise UserError(
        f'class {i} is {name!r} for the model of {workdir}, but {other!r} in {data_set.name}: '
        'evaluate it on the data set that it was trained on'
      )


def reusable(path: Path, origin: Mapping, clips: Collection[Clip]) -> dict | None:
  """The evaluation in a file; None if it is missing, damaged or of another origin or other clips.

  That frames of these clips have changed since is not seen, and that labels have in a sample.
  """
  origin = {**origin, 'protocol': PROTOCOL}
  try:
    result = files.read_json(path, {**SHAPE, 'dataset': dict}, 'evaluate again')
  except UserError:
    return None
  scored = {(row['subset'], row['uid']) for row in result['per_clip']}
  same = scored == {(clip.subset, clip.uid) for clip in clips}
  return result if same and all(result.get(key) == origin[key] for key in origin) else None
