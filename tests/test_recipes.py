"""The published recipes: what each changes of configs/base.py, in one table."""

import importlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from aavs_jax import cli, methods
from aavs_jax import config as config_lib
from aavs_jax.configs import base
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.studies import recipes as recipe_lib
from aavs_jax.training import phases
from aavs_jax.training.state import flat_shapes

ROOT = Path(__file__).parents[1]


def _paper(epochs, phase2_epoch):
  return {
    'optimizer.lr': 1e-4, 'train.epochs': epochs, 'train.phase2_epoch': phase2_epoch,
  }  # fmt: skip


S4 = {'data.subsets': ('v1s',)}
MS3 = {'data.subsets': ('v1m',)}
END_TO_END = {
  'task': 'semantic', 'num_classes': 71, 'data.max_targets': 8, 'model.num_queries': 100,
}  # fmt: skip
STAGE2 = {
  **END_TO_END,
  'use_prior': True,
  'model.adapter_variant': 'after',
  'optimizer.clip_norm': 0.0,
  'train.phase2_epoch': 20,
  'train.trainable': (
    'aavs/queries/positions',
    'aavs/.*adapter/',
    'aavs/decoder/class_predictor/',
    'aavs/decoder/(silent|uncertain|sounding)_key',
    'aavs/audio_projection/',
  ),
}
FROZEN = {'train.phase2_epoch': 60}
ORIGIN_QUERY = {**FROZEN, 'model.adaptive_query': False}
FUSION = {'model.mask_fusion': False}
KEY = {'model.robust_key': False}
ATTENTION = {'model.prior_attention': False}
ROBUST = {'prior.predicted': 0.7, 'prior.none': 0.3, 'train.phase2_epoch': 0}
ORACLE = {'oracle_prior': True}
QUICK = {
  'data.image_size': 96,
  'data.eval_size': 96,
  'data.item_frames': 5,
  'data.batch_items': 4,
  'data.threads': 1,
  'model.num_queries': 10,
  'model.adapter_variant': 'after',
  'model.swin.embed_dim': 32,
  'model.swin.depths': (1, 1, 2, 1),
  'model.swin.heads': (1, 2, 4, 8),
  'model.swin.window': 6,
  'model.swin.mlp_ratio': 2,
  'model.swin.drop_path': 0.0,
  'model.hidden': 64,
  'model.heads': 4,
  'model.encoder_layers': 1,
  'model.encoder_ffn': 128,
  'model.decoder_layers': 3,
  'model.decoder_ffn': 128,
  'model.audio_hidden': 128,
  'model.sampling': 'dense',
  'model.remat': 'none',
  'vggish.conv_widths': (8, 16, 24, 24, 32, 32),
  'vggish.dense_widths': (128,),
  'vggish.embedding': 64,
  'loss.points': 192,
  'optimizer.clip_norm': 1.0,
  'optimizer.warmup_steps': 50,
  'optimizer.schedule': 'cosine',
  'train.steps': 360,
  'train.phase2_epoch': 0,
  'train.trainable': ('.*',),
  'train.eval_every_steps': 120,
  'train.checkpoint_every_steps': 150,
  'train.log_every_steps': 20,
}
PVT_V2 = {
  'kind': 'pvt_v2', 'dims': (64, 128, 320, 512), 'depths': (3, 6, 40, 3),
  'reductions': (8, 4, 2, 1), 'mlp_ratio': 4, 'drop_path': 0.1,
}  # fmt: skip
RESNET50 = {
  'kind': 'resnet', 'stem': 64, 'planes': (64, 128, 256, 512), 'blocks': (3, 4, 6, 3),
}  # fmt: skip
SEMANTIC = {'task': 'semantic', 'num_classes': 71, 'data.max_targets': 8}
OF_MAPS = {
  'data.all_frames': True, 'data.image_size': 224, 'data.item_frames': 5, 'data.batch_items': 4,
  'model.head': (128, 32), 'vggish.final_relu': True, 'optimizer.clip_norm': 0.0,
  'train.phase2_epoch': 0,
}  # fmt: skip
TPAVI = {
  **OF_MAPS, 'method': 'tpavi', 'model.width': 256, 'loss.matching_weight': 0.0,
  'optimizer.lr': 1e-4, 'optimizer.weight_decay': 0.0, 'train.epochs': 15.0,
  'train.trainable': (r'^backbone/(?!spare)', r'^tpavi/(?!path3/unit1/)'),
}  # fmt: skip
AVSEGFORMER = {
  **OF_MAPS, 'method': 'avsegformer', 'data.batch_items': 2, 'data.image_size': 512,
  'data.eval_size': 512, 'model.queries': 300, 'model.encoder_ffn': 2048,
  'model.decoder_layers': 6, 'model.generator_layers': 6, 'model.generator_ffn': 1024,
  'model.mlp_hidden': 2048, 'model.spare_fpn': 256, 'model.dropout': 0.1,
  'loss.mixer_weight': 0.1, 'optimizer.lr': 2e-5, 'optimizer.lr_phase2': 2e-5,
  'optimizer.weight_decay': 0.01, 'train.epochs': 30.0, 'train.phase2_epoch': 5,
  'train.trainable': (r'^backbone/(?!spare)', r'^avsegformer/(?!spare)'),
}  # fmt: skip
AVSS = {**SEMANTIC, 'data.item_frames': 0, 'data.batch_items': 8, 'train.eval_every_epochs': 2.0}
OTHERS = {
  'tpavi_s4': {**TPAVI, **S4},
  'tpavi_ms3': {**TPAVI, **MS3, 'loss.matching_weight': 0.5, 'train.epochs': 30.0},
  'tpavi_avss': {**TPAVI, **AVSS, 'loss.matching_weight': 0.5, 'train.epochs': 60.0},
  'avsegformer_s4': {**AVSEGFORMER, **S4},
  'avsegformer_ms3': {**AVSEGFORMER, **MS3, 'train.epochs': 60.0, 'train.phase2_epoch': 10},
  'avsegformer_avss': {
    **AVSEGFORMER, **AVSS, 'train.phase2_epoch': 0, 'data.image_size': 224, 'data.eval_size': 224,
  },
}  # fmt: skip
for _name in ('tpavi_avss', 'avsegformer_avss'):
  OTHERS[f'{_name}_stage1'] = {k: v for k, v in OTHERS[_name].items() if k not in SEMANTIC}
  OTHERS[f'{_name}_stage2'] = {**OTHERS[_name], 'use_prior': True}


def _in_full(values, backbone):
  """With the backbone, and without what is as in base after all."""
  values = values | {f'model.backbone.{key}': value for key, value in backbone.items()}
  flat = flatten_dict(base.get_config().to_dict(), sep='.')
  return {key: value for key, value in values.items() if key not in flat or flat[key] != value}


TABLE = {
  'base': {},
  'avss_stage1': {},
  'avss_stage1:paper': _paper(30, 15),
  's4': S4,
  's4:paper': {**S4, **_paper(30, 15)},
  'ms3': MS3,
  'ms3:paper': {**MS3, **_paper(50, 25)},
  'avss_end_to_end': END_TO_END,
  'avss_end_to_end:paper': {**END_TO_END, **_paper(30, 15)},
  'avss_stage2': STAGE2,
  'avss_stage2:paper': {**STAGE2, **_paper(30, 10)},
  'frozen_backbone': {**END_TO_END, **FROZEN},
  'frozen_backbone:s4': {**S4, **FROZEN},
  'frozen_backbone:ms3': {**MS3, **FROZEN},
  'origin_query': {**END_TO_END, **ORIGIN_QUERY},
  'origin_query:s4': {**S4, **ORIGIN_QUERY},
  'origin_query:ms3': {**MS3, **ORIGIN_QUERY},
  'without_mask_fusion': {**STAGE2, **FUSION},
  'without_mask_fusion:paper': {**STAGE2, **_paper(30, 10), **FUSION},
  'without_robust_key': {**STAGE2, **KEY},
  'without_robust_key:paper': {**STAGE2, **_paper(30, 10), **KEY},
  'without_both': {**STAGE2, **FUSION, **KEY},
  'without_both:paper': {**STAGE2, **_paper(30, 10), **FUSION, **KEY},
  'origin_attention': {**STAGE2, **FUSION, **KEY, **ATTENTION},
  'origin_attention:paper': {**STAGE2, **_paper(30, 10), **FUSION, **KEY, **ATTENTION},
  'oracle_prior': {**STAGE2, **ORACLE},
  'oracle_prior:paper': {**STAGE2, **_paper(30, 10), **ORACLE},
  'avss_stage2_robust': {**STAGE2, **ROBUST},
  'avss_stage2_robust:paper': {**STAGE2, **_paper(30, 10), **ROBUST},
  'quick_stage1': QUICK,
  'quick_stage2': {
    **QUICK,
    'task': 'semantic',
    'num_classes': 71,
    'use_prior': True,
    'data.max_targets': 4,
    'train.steps': 240,
    'train.eval_every_steps': 240,
  },
}
for _name, _values in OTHERS.items():
  TABLE[_name] = _in_full(_values, PVT_V2)
  if '_stage' not in _name:
    TABLE[f'{_name}:resnet50'] = _in_full(_values, RESNET50)
OTHER_METHODS = {name for name in TABLE if name.startswith(('tpavi', 'avsegformer'))}


def _load(name):
  """A config by its name in the table, through the loader of the command line; it is checked."""
  file, *variant = name.split(':')
  return config_lib.load(':'.join([f'{ROOT}/configs/{file}.py', *variant]))


@pytest.mark.parametrize('name', TABLE)
def test_a_recipe_differs_from_base_as_the_table_says(name):
  config = _load(name)
  assert recipe_lib.changes(config) == TABLE[name]
  lines = config_lib.differences(base.get_config(), config)
  keys = {line.split(' ')[0] for line in lines}
  without = flatten_dict(base.get_config().to_dict(), sep='.').keys() - flatten_dict(
    config.to_dict(), sep='.'
  )
  assert keys - without == set(TABLE[name])
  assert not without or name in OTHER_METHODS


def test_no_config_is_missing_in_the_table():
  names = set()
  for path in (ROOT / 'configs').glob('[!_]*.py'):
    module = importlib.import_module(f'aavs_jax.configs.{path.stem}')
    own = module.get_config()
    if 'task' not in own:  # a study, whose stages have files of their own
      continue
    names.add(path.stem)
    for variant in getattr(module, 'VARIANTS', ()):
      if module.get_config(variant) != own:
        names.add(f'{path.stem}:{variant}')
  assert names == set(TABLE)
  assert set(recipe_lib.published()) == names - {'base', 'quick_stage1', 'quick_stage2'}


@pytest.fixture(scope='module')
def parameters():
  """Shapes of the parameters of a config's model, of each kind of layer one."""
  kept = {}

  def shapes(config):
    small = config.copy_and_resolve_references()
    small.data.image_size = small.data.eval_size = 32
    if small.method == 'aavs':
      small.model.swin.depths = (1, 1, 1, 1)
      small.model.encoder_layers = small.model.decoder_layers = 1
    elif small.model.backbone.kind == 'pvt_v2':
      small.model.backbone.depths = (1, 1, 1, 1)
    key = repr((small.method, small.model, small.num_classes, small.use_prior))
    if key not in kept:
      kept[key] = flat_shapes(methods.of(small))
    return kept[key]

  return shapes


@pytest.mark.parametrize('name', TABLE)
def test_every_pattern_of_what_trains_matches(name, parameters):
  config = _load(name)
  for phase in (1, 2):
    assert phases.trainable_paths(config, methods.of(config), parameters(config), phase)


@pytest.mark.parametrize(
  ('name', 'known'),
  [('s4', 'release or paper'), ('without_both', 'release or paper'),
   ('frozen_backbone', 's4 or ms3 or avss'), ('origin_query', 's4 or ms3 or avss')],
)  # fmt: skip
def test_a_variant_that_does_not_exist_is_refused_in_one_sentence(name, known):
  with pytest.raises(UserError) as refusal:
    _load(f'{name}:nonsense')
  text = str(refusal.value)
  assert f'configs/{name}.py:nonsense' in text
  assert text.endswith(f"there is no variant 'nonsense': use {known}")
  assert '\n' not in text and 'Traceback' not in text


def test_an_oracle_prior_needs_a_prior():
  config = _load('avss_end_to_end')
  config.oracle_prior = True
  with pytest.raises(UserError, match=r'config\.oracle_prior is True.*config\.use_prior'):
    config_lib.check(config)


@pytest.mark.parametrize('name', [name for name in TABLE if FROZEN.items() <= TABLE[name].items()])
def test_a_frozen_backbone_never_changes(name):
  config = _load(name)
  total = round(config.train.epochs * 7.5)
  plan = phases.Plan(7.5, total, 1, round(config.train.phase2_epoch * 7.5))
  assert {plan.phase_at(step) for step in range(total)} == {1}
  adapters = [f'aavs/backbone/stage0_block0/{part}adapter/up/kernel' for part in ('attention/', '')]
  others = [
    'aavs/pixel_decoder/layer0/attention/output/adapter/up/kernel',
    'aavs/queries/features',
    'aavs/decoder/class_predictor/linear/kernel',
    'aavs/audio_projection/up/linear/kernel',
  ]
  params = {path: jnp.ones(2) for path in (*adapters, *others, 'aavs/backbone/patch_embed/kernel')}
  method = methods.of(config)
  assert phases.trainable_paths(config, method, params, 1) == others
  begin = phases.flat_of_phase(config, method, 1, params, None)
  assert {path for path, value in begin.items() if not np.any(value)} == set(adapters)


def _rows(text):
  """name -> (nearest, keys changed) of a printed table."""
  rows = {}
  for line in text.splitlines()[2:]:
    if not line.startswith(' '):
      name, nearest, *words = line.split()
      rows[name] = nearest, []
    else:
      words = line.split()
    rows[name][1].extend(word.split('=')[0] for word in words if '=' in word)
  return rows


def test_the_printed_table_is_complete_and_fits_a_terminal():
  recipes = recipe_lib.published()
  text = recipe_lib.format_recipes(recipes)
  assert max(map(len, text.splitlines())) <= 100
  rows = _rows(text)
  assert list(rows) == list(recipes)
  for name, (nearest, keys) in rows.items():
    origin = recipes.get(nearest)  # None is base
    assert sorted(keys) == sorted(recipe_lib.changes(recipes[name], origin))
  assert {name: rows[name][0] for name in ('avss_stage1', 's4', 'ms3:paper', 'avss_stage2')} == {
    'avss_stage1': 'base', 's4': 'avss_stage1', 'ms3:paper': 'ms3',
    'avss_stage2': 'avss_end_to_end',
  }  # fmt: skip
  assert rows['without_both:paper'] == ('without_mask_fusion:paper', ['model.robust_key'])
  assert rows['origin_query:s4'] == ('frozen_backbone:s4', ['model.adaptive_query'])


def test_the_command_prints_one_recipe_or_all(capsys):
  path = f'{ROOT}/configs/s4.py:paper'
  assert cli.main(['recipe', path]) == 0
  assert capsys.readouterr().out.splitlines() == [
    f'{path} is configs/base.py with',
    'data.subsets        v1s instead of v1s v1m v2',
    'optimizer.lr        0.0001 instead of 0.001',
    'train.epochs        30 instead of 60',
    'train.phase2_epoch  15 instead of 30',
  ]
  assert cli.main(['recipe']) == 0
  printed = capsys.readouterr().out
  assert recipe_lib.format_recipes(recipe_lib.published()) in printed
  assert cli.main(['recipe', f'{ROOT}/configs/avss_stage1.py']) == 0
  assert capsys.readouterr().out.strip().endswith('is configs/base.py itself')
  assert cli.main(['recipe', f'{path}s']) == 2
  assert capsys.readouterr().err.count('\n') == 1
