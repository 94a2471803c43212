"""The paper's table from released checkpoints: the right scores in the right cells, made once."""

import contextlib
import io
import json
import re
import shutil

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image
from safetensors.numpy import save_file

from aavs_jax import cli, evaluate
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.images import load_label_ids
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.pytorch import convert as convert_
from aavs_jax.studies import reproduce as reproduce_
from aavs_jax.studies.reproduce import ROWS, format_table, reproduce
from tests import small_maps, tiny
from tests.released import random_released, random_vggish
from tests.test_maps_convert import released as released_maps

SEEDS = {'s4': 2, 'ms3': 7, 'stage1': 5, 'stage2': 3}  # of many, no scores are zero or alike


@pytest.fixture(scope='module', autouse=True)
def compile_once(tmp_path_factory):
  """Every evaluation compiles its model anew; from the second time on it comes from here."""
  jax.config.update('jax_compilation_cache_dir', str(tmp_path_factory.mktemp('compiled')))
  compilation_cache.reset_cache()
  yield
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.reset_cache()


def _config(stage):
  """Of a released model as small as can be, and a VGGish such as torchvggish's."""
  config = tiny.get_config(stage)
  config.model.adapter_variant = 'after' if config.use_prior else 'replace'
  config.vggish.dense_widths = (16, 16)
  return config


@pytest.fixture(scope='module')
def files(data_root, tmp_path_factory):
  """Arguments of reproduce: five files, four of them in the release's format."""
  clips = read_index(data_root, 'test')
  occurring = np.unique(np.concatenate([np.unique(load_label_ids(c, 0)) for c in clips]))
  folder = tmp_path_factory.mktemp('released')
  result = {'vggish': folder / 'vggish.safetensors'}
  save_file(random_vggish(_config('stage1'), 0), result['vggish'])
  for model, seed in SEEDS.items():
    result[model] = folder / f'{model}.safetensors'
    tensors = random_released(_config('stage2' if model == 'stage2' else 'stage1'), seed)
    if model == 'stage2':  # of 71 classes it would hardly ever say one that is there
      tensors['model.class_predictor.bias'][occurring] += 4
    save_file(tensors, result[model])
  return result


def _stamps(folder):
  return {path: path.stat().st_mtime_ns for path in folder.rglob('*') if path.is_file()}


def _in_table(text):
  """Row name -> its cells, of a printed table."""
  rows = (line.strip('|').split('|') for line in text.splitlines() if line.startswith('|'))
  return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}


@pytest.fixture(scope='module')
def begun(files, data_root, tmp_path_factory):
  """A data set, and a work folder whose run ended after the conversions.

  The sizes of frames and maps are in no checkpoint: they are made small here.
  """
  data = shutil.copytree(data_root, tmp_path_factory.mktemp('data') / 'set')
  workdir = tmp_path_factory.mktemp('work') / 'run'
  clip = read_index(data, 'test')[0]
  frame = data / clip.subset / clip.uid / 'frames' / '0.jpg'
  frame.rename(data / 'away.jpg')
  with pytest.raises(UserError, match=r'frames/0\.jpg'):
    reproduce(workdir, data=data, batch_items=2, **files)
  (data / 'away.jpg').rename(frame)
  assert sorted(p.name for p in workdir.iterdir()) == ['masks', *sorted(SEEDS)]
  for model in SEEDS:
    path = workdir / model / 'config.json'
    config = json.loads(path.read_text())
    assert config['data']['batch_items'] == 2
    config['data']['image_size'] = config['data']['eval_size'] = 32
    path.write_text(json.dumps(config))
  return data, workdir


@pytest.fixture(scope='module')
def finished(files, begun):
  """The same run taken to its end by the command, and what it printed."""
  data, workdir = begun
  before = {path: stamp for path, stamp in _stamps(workdir).items() if 'masks' not in path.parts}
  flags = [part for name, path in files.items() for part in (f'--{name}', str(path))]
  command = ['reproduce', '--data', str(data), '--workdir', str(workdir), '--batch', '2', *flags]
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    assert cli.main(command) == 0
  assert before.items() <= _stamps(workdir).items()  # no conversion was made again
  return printed.getvalue()


@pytest.mark.slow
def test_the_cells_are_what_evaluate_says_of_the_converted_folders(begun, finished, tmp_path):
  data, workdir = begun
  calls = {
    'S4': ('s4', {'subsets': ('v1s',)}, '83.2 / 91.3'),
    'MS3': ('ms3', {'subsets': ('v1m',)}, '67.3 / 77.6'),
    'AVSS': ('stage2', {'mask_folder': str(workdir / 'masks')}, '48.5 / 53.2'),
    'AVSS, ground-truth masks': ('stage2', {'oracle': True}, '64.9 / 67.0'),
  }
  rows, scores = _in_table(finished), set()
  assert (workdir / 'table.md').read_text().strip() in finished
  kept = {row['name']: row for row in json.loads((workdir / 'table.json').read_text()).values()}
  assert list(kept) == list(calls)
  for name, (model, options, paper) in calls.items():
    direct = evaluate.evaluate(workdir / model, data=str(data), out=tmp_path / 'e.json', **options)
    ours = [100 * direct['overall'][score] for score in ('miou', 'fscore')]
    difference = [x - float(y) for x, y in zip(ours, paper.split(' / '))]
    assert list(kept[name]['ours'].values()) == pytest.approx(ours)
    assert list(kept[name]['difference'].values()) == pytest.approx(difference)
    assert rows[name] == [
      paper,
      ' / '.join(f'{x:.1f}' for x in ours),
      ' / '.join(f'{x:+.1f}' for x in difference),
    ]
    scores.add(tuple(ours))
  assert len(scores) == 4  # so no cell can stand for another
  clips = {key: json.loads((workdir / 'eval' / f'{key}.json').read_text())['clips'] for key in ROWS}
  assert clips == {'s4': 2, 'ms3': 2, 'avss': 5, 'avss_oracle': 5}
  assert len(list((workdir / 'masks').glob('v*/*/*.png'))) == 30  # of the test split alone


@pytest.mark.slow
def test_what_is_there_is_not_made_again(files, begun, finished):
  data, workdir = begun
  tables = {workdir / 'table.json', workdir / 'table.md'}
  before, result = _stamps(workdir), json.loads((workdir / 'table.json').read_text())
  assert reproduce(workdir, data=data, batch_items=2, **files) == result
  changed = {path for path, stamp in _stamps(workdir).items() if stamp != before.get(path)}
  assert changed <= tables

  damaged = workdir / 'eval' / 'ms3.json'
  damaged.write_text(damaged.read_text()[:-40])
  before = _stamps(workdir)
  without_s4 = {name: path for name, path in files.items() if name != 's4'}
  result['s4'].update(ours=None, difference=None)
  assert reproduce(workdir, data=data, batch_items=2, **without_s4) == result
  changed = {path for path, stamp in _stamps(workdir).items() if stamp != before.get(path)}
  assert changed - tables == {damaged, damaged.with_suffix('.md')}
  assert _in_table(format_table(result))['S4'] == ['83.2 / 91.3', '-', '-']


@pytest.mark.slow
def test_masks_take_the_place_of_stage_1(files, begun, finished, tmp_path):
  data, workdir = begun
  table = json.loads((workdir / 'table.json').read_text())
  given = {name: path for name, path in files.items() if name != 'stage1'}
  masks = shutil.copytree(workdir / 'masks', tmp_path / 'masks')
  (masks / 'source.json').unlink()  # which those of the release do not have
  before = _stamps(workdir / 'masks')
  result = reproduce(workdir, data=data, masks=masks, batch_items=2, **given)
  assert result['avss'] == table['avss'] and result['avss']['ours']
  assert _stamps(workdir / 'masks') == before and not (masks / 'source.json').exists()
  evaluation = json.loads((workdir / 'eval' / 'avss.json').read_text())
  assert evaluation['prior'] == 'stage1' and evaluation['masks_digest'] is None

  one, _ = sorted(masks.glob('v1m/*/0.png'))
  content = one.read_bytes()
  one.write_bytes(255 - np.frombuffer(content, np.uint8))
  with pytest.raises(UserError, match=re.escape(f'{one} is not a readable PNG')):
    reproduce(workdir, data=data, masks=masks, batch_items=2, **given)
  Image.fromarray(np.eye(32, dtype=np.uint8) * 255).save(one)
  with pytest.raises(UserError, match=re.escape(f'other masks than those of {masks}')):
    reproduce(workdir, data=data, masks=masks, batch_items=2, **given)
  one.unlink()
  with pytest.raises(UserError, match=re.escape(f'{one} is missing')):
    reproduce(workdir, data=data, masks=masks, batch_items=2, **given)


def test_stage_1_is_given_once(files, data_root, tmp_path):
  given = {name: path for name, path in files.items() if name != 'stage1'}
  for prior in ({}, {'stage1': files['stage1'], 'masks': tmp_path}):
    with pytest.raises(UserError, match=r'--stage1 .* and --masks .*: give one of them'):
      reproduce(tmp_path / 'run', data=data_root, **given, **prior)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('flag', 'file', 'words'),
  [
    (
      'stage1',
      'stage2',
      'a checkpoint of stage 2: give the checkpoint of stage 1 .* or with --masks the folder',
    ),
    ('s4', 'stage2', 'a checkpoint of stage 2: give the checkpoint of S4'),
    ('ms3', 'stage2', 'a checkpoint of stage 2: give the checkpoint of MS3 .*one and the same'),
    (
      'stage2',
      'ms3',
      "of stage 1, S4 or MS3: give .* stage 2 .*linked MS3's and AVSS's to one and the same file",
    ),
    ('vggish', 'stage1', 'not the audio network'),
  ],
)
def test_a_checkpoint_of_another_kind_is_refused(files, data_root, tmp_path, flag, file, words):
  given = {**files, flag: files[file]}
  for other in {'s4', 'ms3'} - {flag}:
    given.pop(other)
  with pytest.raises(UserError, match=words) as refusal:
    reproduce(tmp_path / 'run', data=data_root, **given)
  assert str(files[file]) in str(refusal.value)
  # Nothing of it is left that a later run could take for the right one.
  assert not (tmp_path / 'run' / flag).exists()
  assert not list((tmp_path / 'run').glob('.*'))


@pytest.mark.slow
def test_other_files_need_another_folder(files, begun, finished, data_root):
  data, workdir = begun
  before = _stamps(workdir)
  with pytest.raises(UserError, match=r'ms3 was not made of .*s4\.safetensors'):
    reproduce(workdir, data=data, **{**files, 'ms3': files['s4']})
  with pytest.raises(UserError, match=r'was not made of .* and the data set given'):
    reproduce(workdir, data=data_root, **files)
  with pytest.raises(UserError, match=r'nothing\.pth cannot be read'):
    reproduce(workdir, data=data, **{**files, 'stage1': 'nothing.pth'})
  after = _stamps(workdir)
  changed = {path.name for path, stamp in after.items() if stamp != before.get(path)}
  assert changed <= {'config.json'}  # whose batch is the default again


def test_nothing_is_shown_as_minus_zero():
  row = {'name': 'S4', 'paper': {'miou': 83.2, 'fscore': 91.3},
         'ours': {'miou': 83.18, 'fscore': 91.33},
         'difference': {'miou': -0.02, 'fscore': 0.03}}  # fmt: skip
  assert _in_table(format_table({'s4': row}))['S4'][1:] == ['83.2 / 91.3', '+0.0 / +0.0']


@pytest.fixture(scope='module')
def others(tmp_path_factory):
  """Released checkpoints of other methods by task, and VGGish."""
  folder = tmp_path_factory.mktemp('others')
  binary, semantic = small_maps.get_config('tpavi'), small_maps.get_config('avsegformer_stage1')
  semantic.task, semantic.num_classes = 'semantic', 71
  save_file(released_maps(binary), folder / 'binary.safetensors')
  save_file(released_maps(semantic), folder / 'semantic.safetensors')
  save_file(random_vggish(binary, 0), folder / 'vggish.safetensors')
  return folder


@pytest.mark.slow
def test_other_methods_have_rows_by_their_own_metric(others, data_root, tmp_path, monkeypatch):
  def convert(*arguments):
    note = convert_.convert(*arguments)
    path = arguments[1] / 'config.json'
    config = json.loads(path.read_text())
    config['data'] |= {'image_size': 32, 'eval_size': 32}  # which no tensor tells
    path.write_text(json.dumps(config))
    return note

  monkeypatch.setattr(reproduce_, 'convert', convert)
  flags = ['--other', f's4={others}/binary.safetensors', '--vggish', f'{others}/vggish.safetensors',
           '--other', f'avss={others}/semantic.safetensors', '--data', data_root]  # fmt: skip
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    assert cli.main(['reproduce', '--workdir', str(tmp_path / 'run'), *flags]) == 0
  table = json.loads((tmp_path / 'run' / 'table.json').read_text())
  assert list(table) == ['s4_binary', 'avss_semantic']
  published = {'s4_binary': (78.74, 87.9), 'avss_semantic': (37.31, 42.8)}
  for key, subsets in (('s4_binary', ('v1s',)), ('avss_semantic', None)):
    row, out = table[key], tmp_path / f'{key}.json'
    direct = evaluate.evaluate(tmp_path / 'run' / key, data=data_root, out=out, subsets=subsets)
    for kind, name in (('ours', 'released'), ('corrected', 'overall')):
      assert row[kind] == pytest.approx({k: 100 * direct[name][k] for k in ('miou', 'fscore')})
    assert tuple(row['paper'].values()) == published[key]
  rows = _in_table(printed.getvalue())
  assert (
    rows['TPAVI, PVT-v2, S4'][0] == '78.7 / 87.9' and len(rows['AVSegFormer, PVT-v2, AVSS']) == 4
  )


@pytest.mark.parametrize(
  ('given', 'words'),
  [
    ({}, 'no checkpoint is given'),
    ({'others': [('s5', 'binary')]}, '--other s5=...: write it as TASK=FILE'),
    ({'others': [('s4', '')]}, '--other s4 names no file'),
    ({'others': [('s4', 'binary'), ('s4', 'a/binary')]}, 'the same task and name'),
    ({'others': [('avss', 'binary')]}, 'TPAVI .* of the binary task: give one .* of AVSS'),
    ({'others': [('ms3', 'semantic')]}, 'AVSegFormer of the semantic task: give one .* of MS3'),
    ({'others': [('s4', 'vggish')]}, 'VGGish of torchvggish: give one of TPAVI'),
    ({'masks': 'binary'}, 'is the prior of stage 2: name its checkpoint with --stage2'),
  ],
)
def test_other_methods_that_do_not_fit_are_refused(given, words, others, data_root, tmp_path):
  paths = [
    (task, name and others / f'{name}.safetensors') for task, name in given.get('others', ())
  ]
  vggish = '' if ('s4', 'vggish') in given.get('others', ()) else others / 'vggish.safetensors'
  with pytest.raises(UserError, match=words):
    reproduce(tmp_path / 'run', data=data_root, vggish=vggish, **{**given, 'others': paths})
  assert not list((tmp_path / 'run').glob('*'))
