"""What a work folder remembers of how its run began, and what may differ when it goes on."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath
from PIL import Image

from aavs_jax import methods
from aavs_jax.configs import base
from aavs_jax.input_pipeline import masks, prepare
from aavs_jax.input_pipeline.avsbench import SemanticClip
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.training import checkpoint, work_folder
from aavs_jax.training.state import digest, in_groups
from tests import tiny

# The keys in which a run that goes on may differ, each with another value.
FREE = {
  'mesh.fsdp': 2,
  'data.root': '/elsewhere',
  'data.masks': '/elsewhere',  # what it holds is compared
  'data.threads': 9,
  'data.workers': 3,
  'data.on_bad_clip': 'skip',  # the clips that are left are compared
  'data.max_bad_clips': 5,
  'train.init': '/elsewhere',  # what it holds is compared
  'train.checkpoint_every_steps': 7,
  'train.keep_checkpoints': 5,
  'train.log_every_steps': 3,
  'train.stuck_after': 0,
}
METHOD = methods.of(tiny.get_config())
NO_CLIPS = work_folder.Clips([], [], [])
ONE_CLIP = work_folder.Clips([SemanticClip('', 'a', 'v1s', 'train', 5)], [], [])


def _keys(config, prefix=''):
  for key, value in config.items():
    if hasattr(value, 'items'):
      yield from _keys(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def _other(value):
  """Another value of the same type."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, str):
    return f'{value}x'
  return value[1:] if isinstance(value, tuple) else value + 1


@pytest.mark.parametrize('key', dict(_keys(base.get_config())))
def test_a_run_goes_on_with_another_value_of_free_keys_alone(key, tmp_path):
  folder = epath.Path(tmp_path)
  begun, now = tiny.get_config(), tiny.get_config()
  work_folder.claim(folder, begun, ONE_CLIP, None)
  others = {'method': 'tpavi', **FREE}
  now.update_from_flattened_dict({key: others.get(key, _other(dict(_keys(begun))[key]))})
  if key in FREE:
    work_folder.claim(folder, now, ONE_CLIP, 4)
    assert json.loads((folder / 'config.json').read_text()) == json.loads(begun.to_json())
    work_folder.keep_config(folder, now)
    # What reads the folder finds masks and data where they are now.
    saved = json.loads((folder / 'config.json').read_text())
    saved['data']['on_bad_clip'] = now.data.on_bad_clip
    assert saved == json.loads(now.to_json())
  else:
    with pytest.raises(UserError, match=rf'was begun with another config \({key} is '):
      work_folder.claim(folder, now, ONE_CLIP, 4)
  # Before the first checkpoint nothing is settled.
  work_folder.claim(folder, now, ONE_CLIP, None)
  assert json.loads((folder / 'config.json').read_text()) == json.loads(now.to_json())


@pytest.fixture
def stage2(tiny_stage2, tmp_path):
  """A config of stage 2 and its clips of val, with masks of nothing."""
  tiny_stage2.data.masks = str(tmp_path / 'masks')
  clips = read_index(tiny_stage2.data.root, 'val')
  for clip in clips:
    empty = np.zeros((clip.num_frames, 32, 32), np.uint8)
    masks.write_clip_masks(tiny_stage2.data.masks, clip, empty)
  return tiny_stage2, clips


def test_masks_may_move_but_not_change(stage2, tmp_path):
  config, clips = stage2
  folder = epath.Path(tmp_path / 'run')
  work_folder.claim_inputs(folder, config, work_folder.Clips([], clips, []), None, None)
  config.data.masks = str(shutil.move(tmp_path / 'masks', tmp_path / 'moved'))
  work_folder.claim_inputs(folder, config, work_folder.Clips([], clips, []), None, 4)
  changed = np.zeros((clips[-1].num_frames, 32, 32), np.uint8)
  changed[-1, 0, 0] = 255
  masks.write_clip_masks(config.data.masks, clips[-1], changed)
  with pytest.raises(UserError, match=r'begun with another content of config\.data\.masks'):
    work_folder.claim_inputs(folder, config, work_folder.Clips([], clips, []), None, 4)
  config.oracle_prior = True  # masks are not read
  work_folder.claim_inputs(folder, config, work_folder.Clips([], clips, []), None, 4)


def test_the_start_may_move_but_not_change(tiny_stage1, tmp_path):
  folder = epath.Path(tmp_path / 'run')
  tiny_stage1.train.init = str(tmp_path / 'init')
  start = {'a': np.arange(3.0), 'b': np.ones(2)}
  work_folder.claim_inputs(folder, tiny_stage1, NO_CLIPS, start, None)
  tiny_stage1.train.init = '/moved'
  work_folder.claim_inputs(folder, tiny_stage1, NO_CLIPS, start, 4)
  for other in ({**start, 'a': np.zeros(3)}, None):
    tiny_stage1.train.init = '/other' if other else ''
    with pytest.raises(UserError, match=r'begun with another content of config\.train\.init'):
      work_folder.claim_inputs(folder, tiny_stage1, NO_CLIPS, other, 4)
  # Gone, it is missed only by a run that has a second phase before it.
  tiny_stage1.train.init = str(tmp_path / 'gone')
  assert work_folder.load_start(tiny_stage1, METHOD, needed=False) is None
  work_folder.claim_inputs(folder, tiny_stage1, NO_CLIPS, None, 4)
  with pytest.raises(UserError, match='gone holds no checkpoint'):
    work_folder.load_start(tiny_stage1, METHOD, needed=True)


def test_other_versions_of_libraries_are_said(tiny_stage1, tmp_path, monkeypatch, capsys):
  folder, now = epath.Path(tmp_path), work_folder._versions(tiny_stage1)
  monkeypatch.setattr(work_folder, '_versions', lambda _: now | {'grain': '0.1'})
  work_folder.claim_inputs(folder, tiny_stage1, NO_CLIPS, None, None)
  monkeypatch.setattr(work_folder, '_versions', lambda _: now)
  for _ in range(2):  # every time
    work_folder.claim_inputs(folder, tiny_stage1, NO_CLIPS, None, 4)
    said = capsys.readouterr().out
    assert f'begun with grain 0.1 and goes on with {now["grain"]}' in said
    assert said.count('WARNING') == 1
  work_folder.claim_inputs(folder, tiny_stage1, NO_CLIPS, None, 4, goes_on=False)
  assert 'WARNING' not in capsys.readouterr().out
  # Of what earlier versions did not note nothing is said.
  saved = json.loads((folder / 'inputs.json').read_text())
  del saved['versions']['grain'], saved['versions']['aavs_jax']
  (folder / 'inputs.json').write_text(json.dumps(saved))
  work_folder.claim_inputs(folder, tiny_stage1, NO_CLIPS, None, 4)
  assert 'WARNING' not in capsys.readouterr().out
  assert json.loads((folder / 'inputs.json').read_text())['versions'] == now


@pytest.mark.parametrize('edited', ['training/loss.py', 'own_method.py'])
def test_code_has_a_version_of_its_own(edited, tiny_stage1, tmp_path, monkeypatch):
  code, method = tmp_path / 'aavs_jax', tmp_path / 'own_method.py'
  (code / 'training').mkdir(parents=True)
  for path in (code / 'training' / 'work_folder.py', code / 'training' / 'loss.py', method):
    path.write_text('')
  monkeypatch.setattr(work_folder, '__file__', str(code / 'training' / 'work_folder.py'))
  monkeypatch.setattr(work_folder.methods, 'module_of', lambda _: SimpleNamespace(__file__=method))
  before = work_folder._versions(tiny_stage1)
  assert work_folder._versions(tiny_stage1) == before
  (tmp_path if edited == method.name else code).joinpath(edited).write_text('x = 1')
  after = work_folder._versions(tiny_stage1)
  assert after['aavs_jax'] != before['aavs_jax'] and after['jax'] == before['jax']


def test_frames_may_be_prepared_but_not_lossy(tiny_stage1, tmp_path):
  clips = read_index(tiny_stage1.data.root, 'train')
  prepare.prepare(
    tiny_stage1.data.root, tmp_path / 'shards', image_size=32, eval_size=32, workers=1, jpeg=30
  )
  prepare.prepare(tiny_stage1.data.root, tmp_path / 'same', image_size=32, eval_size=32, workers=1)

  def claim(clips, latest):
    folder = epath.Path(tmp_path / 'run')
    work_folder.claim_inputs(folder, tiny_stage1, work_folder.Clips(clips, [], []), None, latest)

  claim(clips, None)
  claim(read_index(tmp_path / 'same', 'train'), 4)
  with pytest.raises(UserError, match=r'begun with another content of config\.data\.root'):
    claim(read_index(tmp_path / 'shards', 'train'), 4)


def test_other_labels_of_the_same_clips_are_another_data_set(tiny_stage1, tmp_path):
  root = shutil.copytree(tiny_stage1.data.root, tmp_path / 'data')
  folder = epath.Path(tmp_path / 'run')

  def claim(latest):
    clips = work_folder.Clips(read_index(root, 'train'), read_index(root, 'val'), [])
    work_folder.claim_inputs(folder, tiny_stage1, clips, None, latest)
    return clips

  clips = claim(None)
  claim(4)
  for clip in (clips.train[0], clips.val[-1]):
    path = Path(clip.label_ids_path(0))
    before = path.read_bytes()
    Image.fromarray(np.full((40, 60), 7, np.uint8)).save(path)
    with pytest.raises(UserError, match=r'begun with another content of config\.data\.root/labels'):
      claim(4)
    path.write_bytes(b'')  # one that cannot be read may be mended
    claim(4)
    path.write_bytes(before)
  claim(4)


def test_a_folder_without_digests_goes_on_and_has_them_from_then_on(tiny_stage1, tmp_path):
  folder = epath.Path(tmp_path)
  tiny_stage1.train.init = '/start'
  work_folder.claim_inputs(folder, tiny_stage1, NO_CLIPS, {'a': np.ones(2)}, 4)
  with pytest.raises(UserError, match='another content'):
    work_folder.claim_inputs(folder, tiny_stage1, NO_CLIPS, {'a': np.zeros(2)}, 4)


def test_bad_clips_are_those_of_the_data_it_began_with(tiny_stage1, tmp_path, monkeypatch, capsys):
  clips = read_index(tiny_stage1.data.root, 'train')
  tiny_stage1.data.on_bad_clip = 'skip'
  tiny_stage1.data.max_bad_clips = 1
  folder = epath.Path(tmp_path)
  bad = iter(range(3))

  def find(*_):
    clip = clips[next(bad)]
    return [{'clip': f'{clip.subset}/{clip.uid}', 'text': 'cut short'}]

  monkeypatch.setattr(work_folder.bad_clips, 'find_bad_clips', find)
  for i in range(2):  # in another data set the second time, and no checkpoint yet
    found = work_folder.read_clips(tiny_stage1, folder)
    assert found.train == [clip for clip in clips if clip != clips[i]]
    work_folder.claim(folder, tiny_stage1, found, None)
  monkeypatch.setattr(checkpoint, 'latest_step', lambda folder: 4)
  assert work_folder.read_clips(tiny_stage1, folder) == found
  # Nothing was left out of a run that began without looking.
  tiny_stage1.data.on_bad_clip = 'error'
  work_folder.claim(folder, tiny_stage1, work_folder.read_clips(tiny_stage1, folder), None)
  tiny_stage1.data.on_bad_clip = 'skip'
  found = work_folder.read_clips(tiny_stage1, folder)
  assert found.train == clips and found.bad == []
  assert 'all clips stay in' in capsys.readouterr().out


def test_what_a_start_lacks_is_named_by_its_largest_parts():
  lacking = ['aavs/queries/positions', 'aavs/queries/features', 'aavs/block0/fc/kernel']
  lacking += ['aavs/block1/fc/kernel', 'vggish/conv0/kernel']
  others = ['aavs/block0/norm', 'aavs/block1/norm', 'aavs/decoder/layer0/kernel']
  assert in_groups(lacking, others) == 'aavs/queries, aavs/block*/fc, vggish'


@pytest.mark.parametrize('here', [{'start': 1}, {}])
def test_what_one_process_lacks_is_refused_on_all(here, monkeypatch):
  monkeypatch.setattr(work_folder.distributed, 'gather', lambda found: [{'start': 'digest'}, {}])
  with pytest.raises(UserError, match='process 1 finds another start than process 0'):
    work_folder.distributed.require_same(here)


def test_a_run_goes_on_with_the_same_clips_alone(tmp_path):
  folder, config = epath.Path(tmp_path), tiny.get_config()
  one, two, three = (SemanticClip('', uid, 'v1s', 'train', 5) for uid in 'abc')
  begun = work_folder.Clips([one], [two], [])
  for latest in (None, 4):
    work_folder.claim(folder, config, begun, latest)
  for other in (begun._replace(train=[three]), begun._replace(val=[three])):
    with pytest.raises(UserError, match='was begun with other clips than those of'):
      work_folder.claim(folder, config, other, 4)


def test_what_was_done_with_bad_clips_stays_in_the_kept_config(tmp_path):
  folder, begun = epath.Path(tmp_path), tiny.get_config()
  work_folder.claim(
    folder, begun, work_folder.Clips([SemanticClip('', 'a', 'v1s', 'train', 5)], [], []), None
  )
  now = begun.copy_and_resolve_references()
  now.data.on_bad_clip = 'skip'
  work_folder.keep_config(folder, now)
  saved = json.loads((folder / 'config.json').read_text())
  assert saved['data']['on_bad_clip'] == begun.data.on_bad_clip == 'error'


def test_a_digest_tells_any_other_numbers():
  numbers = np.arange(100, dtype=np.float32)
  one_more = np.append(numbers[:-1], numbers[-1] + 1)
  models = [{'a': values, 'b': numbers} for values in (numbers, numbers[::-1], one_more)]
  models.append({'a': numbers, 'b': one_more})
  assert len({digest(model) for model in models}) == 4 and digest(models[0]) == digest(models[0])
