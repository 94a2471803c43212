"""A study: whose folders it takes, and (slow) both stages end to end, run twice."""

import json
import os
import pathlib
import shutil

import pytest
from etils import epath

from aavs_jax import config as config_lib
from aavs_jax import configs, cross_fit, evaluate, stepping_stones
from aavs_jax.configs import compose_bench, methods_study, quickstart
from aavs_jax.input_pipeline import files
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.studies import comparison, reproduce, study, table2
from aavs_jax.training.lock import lock
from tests import small_maps, tiny

EVALUATIONS = ('stage1_true', 'stage1_other', 'stage1_silence', 'stage2_masks', 'stage2_oracle')


def _contents(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_a_study_goes_on_with_the_same_settings_alone(tmp_path):
  now = {'data': '', 'config': {'seeds': [0], 'stage1': {'train': {'steps': 4, 'stuck_after': 9}}}}
  begun = json.loads(json.dumps(now))
  del begun['config']['stage1']['train']['stuck_after']  # by a version without this key
  study._claim(tmp_path, begun)
  study._claim(tmp_path, now)
  now['config']['stage1']['train']['steps'] = 5
  with pytest.raises(UserError, match=r'other settings \(config\.stage1\.train\.steps, see'):
    study._claim(tmp_path, now)
  now['config']['stage1'] = None
  with pytest.raises(UserError, match=r'other settings \(config\.stage1, see'):
    study._claim(tmp_path, now)


@pytest.mark.parametrize('fresh', [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path, fresh):
  folder = tmp_path / 'photos'
  folder.mkdir()
  (folder / 'cat.jpg').write_bytes(b'miaow')
  with pytest.raises(UserError, match=r'photos holds files but no study\.json'):
    study.run_study(quickstart.get_config(), folder, fresh=fresh)
  assert _contents(tmp_path) == {'photos/cat.jpg': b'miaow'}


def test_fresh_does_not_delete_the_data_it_was_given(tmp_path, monkeypatch):
  workdir = tmp_path / 'run'
  (workdir / 'data').mkdir(parents=True)
  (workdir / 'data' / 'metadata.csv').write_text('uid,label,split\n')
  (workdir / 'study.json').write_text('{}')
  before = _contents(tmp_path)
  monkeypatch.chdir(workdir)
  for data in (str(workdir / 'data'), 'data', '../run/data', str(workdir)):
    with pytest.raises(UserError, match='which --fresh deletes'):
      study.run_study(quickstart.get_config(), '.', data=data, fresh=True)
  assert _contents(tmp_path) == before


@pytest.mark.parametrize('change', ['data.batch_items=8', 'train.steps=0'])
def test_one_stage_needs_stages_whose_frames_add_up(change):
  path = f'{configs.__path__[0]}/quickstart.py'
  overrides = [f'--config.stage2.{change}', '--config.end_to_end=False']
  config_lib.load_study(path, overrides)
  with pytest.raises(UserError, match=r"\(5, 4, 'steps'\) in stage1 and \(5, .*'\) in stage2"):
    config_lib.load_study(path, [*overrides, '--config.end_to_end=True'])


@pytest.mark.parametrize('change', ['seed=9', 'data.root=data', 'data.masks=masks'])
def test_what_a_study_sets_itself_is_not_set(change):
  path = f'{configs.__path__[0]}/quickstart.py'
  with pytest.raises(UserError, match=rf'config\.stage2\.{change.split("=")[0]} is '):
    config_lib.load_study(path, [f'--config.stage2.{change}'])


def test_a_study_that_was_killed_before_its_first_file_goes_on(tmp_path):
  """It leaves what keeps others out, and what was half written."""
  for name in ('run.lock', 'run.lease', 'study.json.writing'):
    (tmp_path / name).touch()
  study._refuse_foreign(tmp_path)


def test_fresh_leaves_nothing_of_the_old_study(tmp_path):
  workdir = tmp_path / 'run'
  (workdir / 'stage1').mkdir(parents=True)
  (workdir / 'study.json').write_text('{"data": "elsewhere"}')
  (workdir / 'stage1' / 'config.json').write_text('{}')
  empty = tmp_path / 'empty'
  empty.mkdir()
  # The new study stops at its data set, after it has claimed the folder.
  with pytest.raises(UserError, match='empty is no folder of a data set'):
    study.run_study(quickstart.get_config(), workdir, data=str(empty), fresh=True)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['empty', 'run']
  assert sorted(p.name for p in workdir.iterdir()) == ['run.lock', 'study.json']
  with pytest.raises(UserError, match='holds a study with other settings'):
    study.run_study(quickstart.get_config(), workdir)


@pytest.mark.parametrize('fresh', [False, True])
def test_a_study_that_goes_on_is_left_alone(tmp_path, fresh):
  settings = {'data': '', 'config': json.loads(quickstart.get_config().to_json_best_effort())}
  (tmp_path / 'study.json').write_text(json.dumps(settings))
  (tmp_path / 'stage1').mkdir()
  with lock(epath.Path(tmp_path)), pytest.raises(BlockingIOError, match=str(os.getpid())):
    study.run_study(quickstart.get_config(), tmp_path, fresh=fresh)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['run.lock', 'stage1', 'study.json']


@pytest.mark.parametrize(
  'text',
  [None, '', '{"checkpoint_step": 4', '[]', '{"checkpoint_step": 4, "masks_digest": null}',
   '{"checkpoint_step": 5, "checkpoint_digest": "a", "masks_digest": null}',
   '{"checkpoint_step": 4, "checkpoint_digest": "b", "masks_digest": null}',
   '{"checkpoint_step": 4, "checkpoint_digest": "a", "masks_digest": "c"}'],
)  # fmt: skip
def test_only_evaluations_of_the_same_model_masks_and_clips_are_reused(data_root, tmp_path, text):
  origin = {'checkpoint_step': 4, 'checkpoint_digest': 'a', 'masks_digest': None}
  clips = read_index(data_root, 'test', ('v1s',))
  path = tmp_path / 'e.json'
  if text is not None:
    path.write_text(text)
  assert evaluate.reusable(path, origin, clips) is None
  path.write_text(json.dumps({**origin, 'overall': {'miou': 0.5}}))
  assert evaluate.reusable(path, origin, clips) is None
  result = {
    **origin, 'split': 'test', 'clips': 2, 'frames': 10, 'dataset': {},
    'protocol': evaluate.PROTOCOL,
    'overall': {'miou': 0.5, 'fscore': 1, 'clips': 2},
    'per_clip': [{'subset': clip.subset, 'uid': clip.uid} for clip in clips],
  }  # fmt: skip
  path.write_text(json.dumps(result))
  assert evaluate.reusable(path, origin, clips) == result
  assert evaluate.reusable(path, origin, clips[1:]) is None
  assert evaluate.reusable(path, {**origin, 'split': 'val'}, clips) is None
  path.write_text(json.dumps({**result, 'protocol': evaluate.PROTOCOL - 1}))
  assert evaluate.reusable(path, origin, clips) is None


def test_an_evaluation_of_what_the_model_heard_otherwise_is_made_anew(
  data_root, monkeypatch, tmp_path
):
  (tmp_path / 'stage1').mkdir()
  (tmp_path / 'stage1' / 'config.json').write_text(tiny.get_config('stage1').to_json())
  monkeypatch.setattr(stepping_stones.checkpoint, 'load_flat', lambda _: ({}, 4))
  monkeypatch.setattr(stepping_stones, 'digest', lambda _: 'a')
  made, labels = [], ['of these clips']
  monkeypatch.setattr(stepping_stones, 'label_digest', lambda *_: labels[0])

  def make(folder, *, data, out, audio, subsets, **_):
    result = {
      'checkpoint_step': 4, 'checkpoint_digest': 'a', 'masks_digest': None, 'split': 'test',
      'audio': audio, 'prior': None, 'clips': 2, 'frames': 10, 'dataset': {},
      'protocol': evaluate.PROTOCOL, 'labels_digest': labels[0],
      'overall': {'miou': 0.5, 'fscore': 1},
      'per_clip': [
        {'subset': clip.subset, 'uid': clip.uid}
        for clip in read_index(data, 'test', subsets or tiny.get_config('stage1').data.subsets)
      ],
    }  # fmt: skip
    files.write_json(out, result)
    made.append(audio)
    return result

  monkeypatch.setattr(stepping_stones.evaluate, 'evaluate', make)
  for audio, subsets in [('true', None)] * 2 + [('silence', None)] * 2 + [('silence', ('v1s',))]:
    asked = {'one': stepping_stones.Evaluation('stage1', audio=audio, subsets=subsets)}
    found = stepping_stones.scores(asked, tmp_path, data=data_root, masks='')
    assert found['one']['audio'] == audio
  assert made == ['true', 'silence', 'silence']
  labels[0] = 'of others of the same names'
  stepping_stones.scores(asked, tmp_path, data=data_root, masks='')
  assert made == ['true', 'silence', 'silence', 'silence']


@pytest.mark.parametrize('change, message', [
  ('seeds=(-1,)', r'config.seeds is \(-1,\)'),
  ('stage1.task=semantic', 'are end to end and stage 2'),
  ('stage2.use_prior=False', 'are stage 1 and end to end'),
  ('stage1.data.eval_size=64', 'data.eval_size is 64 in stage1 and 96 in stage2'),
  ("stage1.data.subsets=('v1m',)", 'data.subsets of stage2 has v1s, v2'),
])  # fmt: skip
def test_stages_that_cannot_follow_each_other_are_refused(change, message):
  overrides = [f'--config.{change}']
  if 'task' in change:
    overrides.append('--config.stage1.num_classes=9')
  with pytest.raises(UserError, match=message):
    config_lib.load_study(f'{configs.__path__[0]}/quickstart.py', overrides)


def test_what_stage_2_begins_with_fits_it(tmp_path):
  config = quickstart.get_config()
  config.stage2.model.adapter_variant = 'replace'
  with pytest.raises(UserError, match="'replace', but stage 1, with which stage 2 begins, was"):
    study.run_study(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_fresh_does_not_delete_a_start(tmp_path):
  (tmp_path / 'start').mkdir()
  (tmp_path / 'study.json').write_text('{}')
  config = quickstart.get_config()
  config.stage2.train.init = str(tmp_path / 'start')
  with pytest.raises(UserError, match=r'config\.stage2\.train\.init .*start is inside'):
    study.run_study(config, tmp_path, fresh=True)
  assert (tmp_path / 'start').is_dir()


def test_one_stage_takes_no_prior_of_any_kind():
  config = quickstart.get_config()
  config.stage2.oracle_prior = True
  single = study._end_to_end(config.stage1, config.stage2)
  single.train.init = ''
  config_lib.check(single)


def test_one_stage_is_chosen_among_as_many_as_the_stages_are():
  config = quickstart.get_config()
  assert study._end_to_end(config.stage1, config.stage2).train.eval_every_steps == 240
  config.stage1.train.eval_every_steps = config.stage1.train.steps  # at the end alone, as stage 2
  single = study._end_to_end(config.stage1, config.stage2)
  assert single.train.eval_every_steps == single.train.steps == 600


@pytest.mark.parametrize('of', ['workdir', 'data'])
def test_studies_are_not_in_buckets(of, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  given = {'workdir': str(tmp_path / 'run'), 'data': str(tmp_path)} | {of: 'gs://bucket/x'}
  workdir, data = given['workdir'], given['data']
  for call in (
    lambda: study.run_study(quickstart.get_config(), workdir, data=data),
    lambda: table2.table2('tpavi', workdir, data=data),
    lambda: reproduce.reproduce(workdir, data=data),
    lambda: cross_fit.cross_fit(tiny.get_config('stage1'), workdir, data=data, out='masks'),
  ):
    with pytest.raises(UserError, match='gs://bucket/x is in a bucket'):
      call()
  assert not list(tmp_path.iterdir())


def test_soft_masks_of_methods_without_are_refused_before_training(data_root, tmp_path):
  config = small_maps.get_config('tpavi')
  with pytest.raises(UserError, match="is 'tpavi', whose scores may be below 0"):
    cross_fit.cross_fit(config, tmp_path / 'w', data=data_root, out=tmp_path / 'm', soft=True)


@pytest.mark.slow
def test_a_study_runs_end_to_end_and_is_not_repeated(tmp_path):
  config = quickstart.get_config()
  few = {'v1s': 2, 'v1m': 2, 'v2': 2}
  config.clips = dict(train={'v1s': 4, 'v1m': 4, 'v2': 2}, val=few, test=few)
  config.num_classes = 4
  config.image = (96, 72)
  config.stage1, config.stage2 = tiny.get_config('stage1'), tiny.get_config('stage2')
  workdir = tmp_path / 'run'
  report = study.run_study(config, workdir)
  assert report == workdir / 'report.html' and '<svg' in report.read_text()
  paths = {name: workdir / 'eval' / f'{name}.json' for name in EVALUATIONS}
  results = {name: json.loads(path.read_text()) for name, path in paths.items()}
  assert {name: (r['audio'], r['prior']) for name, r in results.items()} == {
    'stage1_true': ('true', None),
    'stage1_other': ('other', None),
    'stage1_silence': ('silence', None),
    'stage2_masks': ('true', 'stage1'),
    'stage2_oracle': ('true', 'oracle'),
  }
  assert all(r['clips'] == 6 and r['frames'] == 40 for r in results.values())
  assert len(list(workdir.glob('masks/v*/*/*.png'))) == 80
  assert len(list(workdir.glob('eval/stage2_masks/v*/*/*.png'))) == 40

  def stamps():
    kept = [*paths.values(), *workdir.glob('stage*/metrics.jsonl'), *workdir.glob('masks/*/*/*')]
    return {path: path.stat().st_mtime_ns for path in kept}

  before = stamps()
  # The same folder by another name.
  study.run_study(config, pathlib.Path(os.path.relpath(workdir)))
  assert stamps() == before

  paths['stage1_other'].write_text(paths['stage1_other'].read_text()[:-40])
  stale = {**results['stage2_masks'], 'masks_digest': 'another'}
  paths['stage2_masks'].write_text(json.dumps(stale))
  before = stamps()
  study.run_study(config, workdir)
  changed = {path for path, stamp in stamps().items() if stamp != before[path]}
  assert changed == {paths['stage1_other'], paths['stage2_masks']}
  assert json.loads(paths['stage2_masks'].read_text()) == results['stage2_masks']


@pytest.mark.slow
def test_a_study_for_numbers_of_classes_trains_in_each_way(tmp_path):
  config = compose_bench.get_config()
  few = {'v1s': 2, 'v1m': 2, 'v2': 2}
  config.clips = dict(train={'v1s': 4, 'v1m': 4, 'v2': 2}, val=few, test=few)
  with config.ignore_type():
    config.num_classes = (3,)
  config.image = (96, 72)
  config.stage1, config.stage2 = tiny.get_config('stage1'), tiny.get_config('stage2')
  config.looks = tiny.get_config('stage2')
  config.looks.use_prior = False
  config.robust = tiny.get_config('stage2')
  config.robust.prior.predicted = config.robust.prior.none = 0.5
  workdir = tmp_path / 'run'
  page = study.run_study(config, workdir)
  assert page == workdir / 'comparison.html' and 'one stage' in page.read_text()
  tables = json.loads((workdir / 'comparison.json').read_text())
  assert list(tables) == ['3']
  looks = json.loads((workdir / 'classes3' / 'looks' / 'config.json').read_text())
  assert looks['train']['init'].endswith('/start')
  begin = dict.fromkeys(('stage1', 'stage2', 'end_to_end', 'cross_fit/fold1'), '/looks')
  for stage, begins in {**begin, 'robust': '/end_to_end'}.items():
    stage = json.loads((workdir / 'classes3' / stage / 'config.json').read_text())
    assert stage['train']['init'].endswith(begins)
  priors = {'robust_masks': 'stage1', 'robust_oracle': 'oracle', 'robust_none': 'none'}
  for name, prior in priors.items():
    assert json.loads((workdir / f'classes3/eval/{name}.json').read_text())['prior'] == prior
    assert len(tables['3'][name]['iou_sounding']) == 1
  with pytest.raises(UserError, match='classes and looks of its own'):
    study.run_study(config, tmp_path / 'other', data=str(workdir / 'classes3' / 'data'))


@pytest.mark.slow
def test_a_study_of_several_methods(tmp_path):
  config = methods_study.get_config()
  few = {'v1s': 2, 'v1m': 2, 'v2': 2}
  config.clips = dict(train={'v1s': 4, 'v1m': 4, 'v2': 2}, val=few, test=few)
  config.num_classes = 3
  config.image = (96, 72)
  config.stage1, config.stage2 = tiny.get_config('stage1'), tiny.get_config('stage2')
  config.others = {
    'tpavi': {stage: small_maps.get_config(f'tpavi_{stage}') for stage in ('stage1', 'stage2')}
  }
  workdir = tmp_path / 'run'
  page = study.run_study(config, workdir)
  assert page == workdir / 'comparison.html' and '<h2>tpavi' in page.read_text()
  tables = json.loads((workdir / 'comparison.json').read_text())
  assert list(tables) == ['aavs', 'tpavi']
  for name in tables:
    assert {'stage2_masks', 'stage2_oracle', 'end_to_end'} < tables[name].keys()
    single = json.loads((workdir / name / 'end_to_end' / 'config.json').read_text())
    assert single['method'] == name and single['train']['init'].endswith(f'{name}/start')
    assert single['data']['root'] == str(workdir / 'data')
  assert 'aavs train' not in (workdir / 'tpavi' / 'report.html').read_text()


def test_methods_are_studied_on_the_same_clips(tmp_path, monkeypatch):
  made, ran = [], []

  def run_one(config, workdir, data):
    ran.append((config.stage1.method, workdir.name, data, config.end_to_end))
    table = {'end_to_end': {key: [0.5] for key in comparison._SCORES}, 'stage1': {}}
    files.write_json(workdir / 'comparison.json', {str(config.num_classes): table})
    return [workdir / 'report.html']

  monkeypatch.setattr(study, '_make_clips', lambda config, root: made.append(root))
  monkeypatch.setattr(study, '_run_one', run_one)
  page = study.run_study(methods_study.get_config(), tmp_path / 'run')
  data = str(tmp_path / 'run' / 'data')
  assert made == [data]
  assert ran == [(name, name, data, True) for name in ('aavs', 'avsegformer', 'tpavi')]
  assert list(json.loads((tmp_path / 'run' / 'comparison.json').read_text())) == [r[0] for r in ran]
  assert '<h2>avsegformer</h2>' in page.read_text()


@pytest.mark.parametrize(('given', 'counted'), [(False, '8'), (True, '2')])
def test_classes_are_those_of_the_data(given, counted, tmp_path, data_root, monkeypatch):
  config = quickstart.get_config()
  rows = [{'id': i, 'frames': frames} for i, frames in enumerate((9, 4, 0, 7))]
  results = {name: {'per_class': rows} for name in (*EVALUATIONS, 'end_to_end')}
  table = {'end_to_end': {key: [0.5] for key in comparison._SCORES}, 'stage1': {}}
  monkeypatch.setattr(study, '_make_clips', lambda config, root: shutil.copytree(data_root, root))
  monkeypatch.setattr(study, '_run_seed', lambda *_: results)
  monkeypatch.setattr(study, 'write_report', lambda *_: tmp_path / 'report.html')
  monkeypatch.setattr(comparison, 'compare', lambda _: table)
  monkeypatch.setattr(study.listening, 'other_sounds', lambda _: None)  # of a lone clip
  study.run_study(config, tmp_path / 'run', data=data_root if given else '')
  assert list(json.loads((tmp_path / 'run' / 'comparison.json').read_text())) == [counted]


def test_what_cannot_be_evaluated_is_found_before_training(data_root, tmp_path, monkeypatch):
  monkeypatch.setattr(study, '_run_seed', None)
  with pytest.raises(UserError, match='subset v2 has one clip'):
    study.run_study(quickstart.get_config(), tmp_path / 'run', data=data_root)


def test_methods_are_compared_in_their_own_way():
  path = f'{configs.__path__[0]}/methods_study.py'
  assert set(config_lib.load_study(path).others) == {'tpavi', 'avsegformer'}
  with pytest.raises(UserError, match=r'config\.others is .* compared with .* end_to_end'):
    config_lib.load_study(path, ['--config.end_to_end=False'])


def test_a_comparison_says_what_each_way_scored(tmp_path):
  def evaluation(miou, located):
    row = {'miou_occurring': miou, 'fscore_occurring': miou / 2}
    return {'overall': row, 'dataset': {'overall': {'iou_sounding': located, 'miou': located}}}

  def seed(shift):
    return {
      'stage1_true': evaluation(0, 0.7),
      'stage2_masks': evaluation(0.5 + shift, 0.6),
      'end_to_end': evaluation(0.25, 0.5),
    }

  table = comparison.compare([seed(0.125), seed(-0.125)])
  assert table['stage2_masks']['miou_occurring'] == [0.625, 0.375]
  assert table['stage1'] == {'iou_sounding': [0.7, 0.7]}
  assert 'stage2_oracle' not in table
  comparison.write(tmp_path, {8: table, 70: table})
  page = (tmp_path / 'comparison.html').read_text()
  assert page.count('50.0 (37.5 to 62.5)') == 2 and '<svg' in page
  assert json.loads((tmp_path / 'comparison.json').read_text())['70'] == table


def test_both_stages_have_the_seed_the_data_and_the_masks(monkeypatch, tmp_path):
  trained = []
  monkeypatch.setattr(
    stepping_stones, 'train', lambda config, folder: trained.append((folder.name, config))
  )
  monkeypatch.setattr(stepping_stones.hand_over, 'write_masks', lambda *_, **__: 1)
  monkeypatch.setattr(stepping_stones, 'scores', lambda *_, **__: {})
  first, second = tiny.get_config('stage1'), tiny.get_config('stage2')
  for second.train.init in ('', 'start'):
    stepping_stones.stepping_stones(first, second, tmp_path, data='clips', seed=7)
    stages = dict(trained)
    assert list(stages) == ['stage1', 'stage2']
    assert all((c.seed, c.data.root) == (7, 'clips') for c in stages.values())
    assert stages['stage2'].data.masks == str(tmp_path / 'masks')
    assert stages['stage2'].train.init == (second.train.init or str(tmp_path / 'stage1'))


def test_all_that_a_study_trains_has_its_seed(monkeypatch, tmp_path):
  trained = {}

  def note(config, folder, *_, **__):
    trained[folder.name] = config

  for name in ('hear', 'train', 'cross_fit'):
    monkeypatch.setattr(study, name, note)
  monkeypatch.setattr(
    study, 'stepping_stones', lambda *_, seed, **__: trained.update(seeds=seed) or {}
  )
  monkeypatch.setattr(study, 'scores', lambda *_, **__: {})
  monkeypatch.setattr(study, '_make_clips', lambda *_, **__: None)
  monkeypatch.setattr(study.tables, 'format_table', lambda _: '')
  study._run_seed(compose_bench.get_config(), tmp_path, 'clips', 7)
  assert trained.pop('seeds') == 7
  assert set(trained) == {'start', 'looks', 'end_to_end', 'cross_fit', 'robust'}
  assert {config.seed for config in trained.values()} == {7}


def test_a_comparison_takes_the_means_of_avsbench_and_what_sounds_of_the_data_set():
  row = {'miou_occurring': 0.5, 'fscore_occurring': 0.25, 'miou': 0.1}
  other = {'miou_occurring': 0.75, 'fscore_occurring': 0.875, 'miou': 0.7, 'iou_sounding': 0.625}
  result = {'overall': row, 'dataset': {'overall': other}}
  table = comparison.compare([dict.fromkeys(('stage1_true', *comparison.WAYS), result)])
  assert table.keys() == {*comparison.WAYS, 'stage1'}
  assert table['stage2_oracle'] == {
    'miou_occurring': [0.5], 'fscore_occurring': [0.25], 'iou_sounding': [0.625]
  }  # fmt: skip
  assert table['stage1'] == {'iou_sounding': [0.625]}


def test_one_stage_trains_what_stage_1_does_for_the_epochs_of_both():
  config = quickstart.get_config()
  for stage, epochs in ((config.stage1, 3.0), (config.stage2, 4.0)):
    stage.train.update(steps=0, epochs=epochs)
  config.stage2.train.trainable = ('aavs/decoder/silent_key',)
  single = study._end_to_end(config.stage1, config.stage2)
  assert single.train.epochs == 7 and single.train.steps == 0
  assert single.train.trainable == config.stage1.train.trainable != ('aavs/decoder/silent_key',)


def test_what_a_killed_study_has_begun_to_write_is_nothing_of_others(tmp_path):
  (tmp_path / f'.study.json{files.UNFINISHED}').write_text('{')
  study._refuse_foreign(tmp_path)
