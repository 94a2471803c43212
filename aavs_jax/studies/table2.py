"""The paper's Table 2 on any method: one stage, and two with masks of three kinds.

The paper says that the strategy helps methods of others, TPAVI and AVSegFormer. Nothing of that was
released, so where the mask enters these is our own definition (see models/tpavi.py and
models/avsegformer.py): it is added to every channel of the last features.
"""

from collections.abc import Sequence
from pathlib import Path

from etils import epath

from aavs_jax import config as config_lib
from aavs_jax import configs, methods
from aavs_jax.console import say
from aavs_jax.input_pipeline import files, listening
from aavs_jax.input_pipeline import masks as mask_files
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.stepping_stones import Evaluation, scores, stepping_stones
from aavs_jax.studies.reproduce import OTHERS, beside, claim_masks, format_table
from aavs_jax.train import train
from aavs_jax.training.start import require_fit, require_same_meaning

# Config files of a method: one stage, stage 1, stage 2.
CONFIGS = {
  'aavs': ('avss_end_to_end', 'avss_stage1', 'avss_stage2'),
  'tpavi': ('tpavi_avss', 'tpavi_avss_stage1', 'tpavi_avss_stage2'),
  'avsegformer': ('avsegformer_avss', 'avsegformer_avss_stage1', 'avsegformer_avss_stage2'),
}
ROWS = {  # as Table 2 calls them -> what they are here
  'origin': 'one stage',
  'low': 'two stages, masks of its own stage 1',
  'high': 'two stages, masks given',
  'oracle': 'two stages, true masks',
}
PAPER = {  # mIoU and F in percent, of TPAVI and AVSegFormer on PVT-v2; AAVS's are of Table 1 and of
  # the ablation without the strategy
  'aavs': {'origin': (37.1, 41.7), 'low': (48.5, 53.2), 'oracle': (64.9, 67.0)},
  'tpavi': {
    'origin': (29.77, 35.2), 'low': (27.29, 29.85), 'high': (31.48, 34.89), 'oracle': (36.35, 39.01)
  },
  'avsegformer': {
    'origin': (36.66, 42.0), 'low': (35.43, 39.04), 'high': (39.44, 42.49), 'oracle': (46.27, 48.04)
  },
}  # fmt: skip


def table2(
  method: str, workdir: str | Path, *, data: str, masks: str = '', overrides: Sequence[str] = ()
) -> dict[str, dict]:
  """Trains a method in one stage and in two, and scores both beside the paper's Table 2.

  Called again it goes on where it was. WORKDIR has origin/, stage1/, masks/, stage2/ and eval/, and
  the table in table.json and table.md.

  Args:
    method: a key of CONFIGS; its ResNet-50 as 'tpavi:resnet50'.
    workdir: where everything goes.
    data: AVSBench-semantic.
    masks: of another stage 1, as AAVS's by `aavs masks`, for the row 'high'; it is empty without.
    overrides: of the configs of all three trainings, as '--config.train.init=runs/pvt'. Without a
      start stage 2 begins with what stage 1 has learnt, which AAVS's cannot: it needs one.

  Returns:
    By key of ROWS what reproduce.beside gives.

  Raises:
    UserError: no such method; AAVS without a start, or one that does not fit all three; a mask is
      missing; faults of configs, data or the folder.
  """
  name, _, variant = method.partition(':')
  if name not in CONFIGS:
    raise UserError(
      f'--method is {method!r}: use {", ".join(CONFIGS)}, or one on ResNet-50 as tpavi:resnet50'
    )
  for path in (workdir, data):
    files.refuse_bucket(path)
  workdir, data = Path(workdir).resolve(), str(Path(data).resolve())
  folder, variant = Path(configs.__path__[0]), variant and f':{variant}'
  origin, stage1, stage2 = (
    config_lib.load(f'{folder / file}.py{variant}', overrides) for file in CONFIGS[name]
  )
  config_lib.require_no_data(stage2)
  if not stage2.train.init:
    try:
      require_same_meaning(stage2, stage1, 'stage 1', methods.of(stage2).must_match)
    except UserError as error:
      raise UserError(
        f'stage 2 of {method} cannot begin with what its stage 1 has learnt: name a start of both '
        'with --config.train.init'
      ) from error
  elif epath.Path(stage2.train.init).exists():  # which runs that have begun can do without
    for config in (origin, stage1, stage2):
      require_fit(config, methods.of(config))
  say('[1] the data set')  # what is wrong with it shows now, and not in days
  config_lib.require_fit(read_index(data, 'train', stage2.data.subsets), stage2)
  clips = read_index(data, 'test', stage2.data.subsets)
  if masks:
    mask_files.require_kind(masks, stage2.prior.soft)
    claim_masks(workdir, masks, clips, stage2.data.eval_size, stage2.prior.soft)
  listening.other_sounds(clips)  # which stage 1 is evaluated with
  say('[2] one stage')
  origin.data.root = data
  train(origin, workdir / 'origin')
  found = stepping_stones(stage1, stage2, workdir, data=data, seed=stage1.seed)
  found = {'low': found['stage2_masks'], 'oracle': found['stage2_oracle']}
  found |= scores({'origin': Evaluation('origin')}, workdir, data=data, masks='')
  if masks:
    high = {'high': Evaluation('stage2', prior='masks')}
    found |= scores(high, workdir, data=data, masks=masks)
  paper = {'origin': OTHERS[name, 'resnet']['avss']} if variant == ':resnet50' else PAPER[name]
  result = {
    row: beside(f'{row}: {text}', paper.get(row), found.get(row)) for row, text in ROWS.items()
  }
  files.write_json(workdir / 'table.json', result)
  files.write_text(workdir / 'table.md', format_table(result) + '\n')
  return result
