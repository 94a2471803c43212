"""Another data set, as one adds it: other subsets, lengths, classes and places of its files.

What a fork would write is the part down to `KINDS`: a file of its own in input_pipeline, and a line
in index.py.
"""

import collections
import csv
import dataclasses
import itertools
import os
from collections.abc import Sequence

import numpy as np
import pytest
import soundfile
from etils import epath
from PIL import Image

from aavs_jax import config as config_lib
from aavs_jax.input_pipeline import (
  avsbench,
  check,
  clips,
  index,
  labels,
  masks,
  pipeline,
  prepare,
  prepared,
)
from aavs_jax.input_pipeline.clips import Clip
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.items import Task, load_eval_item
from aavs_jax.scoring import metrics, protocols, tables
from aavs_jax.training import work_folder
from tests import tiny

TOWN = clips.DataSet(
  name='Town',
  tables=('town.csv',),
  subsets={'street': 4, 'indoor': 3},
  label_kind='semantic',
  classes=('nothing', 'tram', 'siren', 'kettle', 'radio'),
  palette=labels.colour_map(5)[[0, 4, 3, 2, 1]],
)


@dataclasses.dataclass(frozen=True)
class TownClip(Clip):
  """ROOT/town.csv has columns place, clip and split; ROOT/PLACE/CLIP/ holds TT.png, TT_ids.png."""

  data_set = TOWN

  @classmethod
  def read(cls, tables: Sequence[str]) -> list[Clip]:
    (table,) = tables
    rows = clips.read_table(table, ('place', 'clip', 'split'))
    found = []
    for line, row in rows:
      where = f'{table}, line {line}'
      subset = clips.check_subset(where, 'place', row['place'], TOWN)
      uid = clips.check_name(where, 'clip', row['clip'])
      split = clips.check_split(where, row['split'])
      found.append(cls(os.path.dirname(table), uid, subset, split, TOWN.subsets[subset]))
    clips.check_unique(found, [line for line, _ in rows])
    return found

  @property
  def skipped_if_silent(self):
    return self.subset == 'street'

  def frame_path(self, t):
    return os.path.join(self.folder, f'{t:02}.png')

  def label_ids_path(self, t):
    return os.path.join(self.folder, f'{t:02}_ids.png')

  def label_rgb_path(self, t):
    return os.path.join(self.folder, f'{t:02}_colours.png')


KINDS = (*index.KINDS, TownClip)

ROWS = [('indoor', 'b', 'train'), ('street', 'a', 'train'), ('indoor', 'a', 'train')]
ROWS += [('indoor', 'x', 'test'), ('street', 'y', 'test'), ('street', 'quiet', 'train')]
SIZE = 32
OPTIONS = {'seed': 0, 'start': 0, 'threads': 1}


def _ids(uid, t):
  ids = np.zeros((40, 48), np.uint8)
  if uid != 'quiet':
    ids[5:25, 4 + t : 20 + t] = 1 + (ord(uid) + t) % 4
  return ids


@pytest.fixture
def root(tmp_path, monkeypatch):
  monkeypatch.setattr(index, 'KINDS', KINDS)
  root = tmp_path / 'town'
  for subset, uid, _ in ROWS:
    folder = root / subset / uid
    folder.mkdir(parents=True)
    for t in range(TOWN.subsets[subset]):
      Image.fromarray(np.full((40, 48, 3), 20 * t, np.uint8)).save(folder / f'{t:02}.png')
      if (uid, t) == ('y', 1):  # as a colour
        colours = TOWN.palette[_ids(uid, t)]
        Image.fromarray(colours).save(folder / f'{t:02}_colours.png')
      else:
        Image.fromarray(_ids(uid, t)).save(folder / f'{t:02}_ids.png')
    noise = np.random.default_rng(ord(uid[0])).normal(0, 0.1, TOWN.subsets[subset] * 16000)
    soundfile.write(folder / 'audio.wav', noise, 16000)
  with open(root / 'town.csv', 'w', newline='') as file:
    csv.writer(file).writerows([('place', 'clip', 'split'), *ROWS])
  return root


def _task(semantic=True):
  return Task(semantic, 5 if semantic else 2, SIZE, SIZE, 5, False, '')


def _refusal(function, *arguments, **options):
  with pytest.raises(UserError) as caught:
    function(*arguments, **options)
  message = str(caught.value)
  assert '\n' not in message
  return message


def test_its_index_tells_subsets_lengths_and_classes(root):
  found = index.read_index(root)
  assert [(clip.subset, clip.uid, clip.split) for clip in found] == ROWS
  assert [clip.num_frames for clip in found] == [3, 4, 3, 3, 4, 4]
  assert {clip.data_set for clip in found} == {TOWN}
  assert [clip.uid for clip in index.read_index(root, 'train', ['street'])] == ['a', 'quiet']
  message = _refusal(index.read_index, root, 'train', ('v1s', 'street'))
  assert "no subset 'v1s'" in message and 'street, indoor' in message and str(root) in message
  (root / 'metadata.csv').write_text('uid,label,split\na,v2,val\n')
  message = _refusal(index.read_index, root)
  assert 'metadata.csv of AVSBench-semantic and town.csv of Town' in message


def test_training_reads_items_that_divide_its_clips(root):
  train = index.read_index(root, 'train')
  for sizes in (dict(item_frames=0, batch_items=1), dict(item_frames=1, batch_items=2)):
    batches = pipeline.training_batches(train, _task(), **sizes, **OPTIONS)
    seen = collections.Counter()
    for batch in itertools.islice(batches, int(pipeline.epoch_size(train, **sizes)[0])):
      seen.update(batch['clip'].tolist())
      for ids, classes in zip(batch['labels'], batch['target_classes']):
        assert set(classes) - {-1} == set(np.unique(ids))
    assert seen == {i: clip.num_frames for i, clip in enumerate(train)}
  for sizes, words in (
    (dict(item_frames=5, batch_items=1), 'config.data.item_frames is 5'),
    (dict(item_frames=0, batch_items=2), 'slots of 5 frames'),
  ):
    assert words in _refusal(pipeline.training_batches, train, _task(), **sizes, **OPTIONS)
    assert words in _refusal(pipeline.epoch_size, train, **sizes)


def test_a_silent_clip_counts_where_the_data_set_says_so(root):
  train = index.read_index(root, 'train', ['street'])
  options = dict(item_frames=0, batch_items=1)
  batches = pipeline.training_batches(train, _task(semantic=False), **options, **OPTIONS)
  weights = {b['clip'][0].item(): set(b['weight'].tolist()) for b in itertools.islice(batches, 2)}
  assert weights == {0: {1}, 1: {0}} and train[1].uid == 'quiet'


def test_its_scores_bear_its_names_in_its_order(root):
  test, task = index.read_index(root, 'test'), _task()
  batches = pipeline.eval_batches(
    test,
    lambda item: load_eval_item(test[item.clip], test[item.clip], item, task),
    batch_items=2,
    threads=1,
  )
  (batch,) = batches
  records = []
  for place, clip in enumerate(test):
    mine = (batch['clip'] == place) & (batch['weight'] > 0)
    assert batch['frame'][mine].tolist() == list(range(clip.num_frames))
    target = batch['target'][mine]
    for t, ids in enumerate(target):
      np.testing.assert_array_equal(ids, labels.resize_ids(_ids(clip.uid, t), SIZE))
    records.append(metrics.semantic_record(target, target, 5))
  assert len(batch['weight']) == 10  # five frames an item, however short its clip

  summary = protocols.summarise(test, np.array(records))
  assert list(summary['subsets']) == list(summary['dataset']['subsets']) == ['street', 'indoor']
  assert [row['name'] for row in summary['per_class']] == list(TOWN.classes)
  assert [row['uid'] for row in summary['per_clip']] == ['y', 'x']
  result = {'task': 'semantic', 'audio': 'true', 'prior': None, **summary}
  assert tables.format_table([result]).split('\n')[0].split()[-2:] == ['street', 'indoor']


def test_check_data_counts_by_its_subsets_and_classes(root):
  report = check.check_data(root)
  assert report['ok'] and report['layout'] == 'Town' and report['notes'] == []
  rows = [(row['subset'], row['split'], row['clips'], row['frames']) for row in report['counts']]
  assert rows == [
    ('street', 'train', 2, 8), ('street', 'val', 0, 0), ('street', 'test', 1, 4),
    ('indoor', 'train', 2, 6), ('indoor', 'val', 0, 0), ('indoor', 'test', 1, 3),
  ]  # fmt: skip
  assert [row['name'] for row in report['classes']] == list(TOWN.classes)
  check.format_check(report)
  Image.fromarray(np.full((40, 48), 5, np.uint8)).save(root / 'indoor' / 'a' / '00_ids.png')
  (problem,) = check.check_data(root)['problems']
  assert 'class id 5' in problem['text'] and '0 to 4' in problem['text']


def test_it_can_be_prepared(root, tmp_path):
  prepare.prepare(root, tmp_path / 'shards', image_size=SIZE, eval_size=SIZE, workers=1)
  raw, ready = (index.read_index(place) for place in (root, tmp_path / 'shards'))
  assert {type(clip) for clip in ready} == {prepared.PreparedClip}
  assert {clip.data_set for clip in ready} == {TOWN}
  assert [clip.skipped_if_silent for clip in ready] == [c.subset == 'street' for c in raw]
  train = [[clip for clip in found if clip.split == 'train'] for found in (raw, ready)]
  streams = [
    pipeline.training_batches(found, _task(), item_frames=1, batch_items=7, **OPTIONS)
    for found in train
  ]
  for _ in range(2):
    a, b = map(next, streams)
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def test_a_config_is_refused_that_has_more_classes(root):
  found = index.read_index(root)
  config = tiny.get_config('stage2')
  config.num_classes = 5
  config_lib.require_fit(found, config)
  config.num_classes = 6
  message = _refusal(config_lib.require_fit, found, config)
  assert 'config.num_classes is 6' in message and 'Town has 5' in message


def test_a_work_folder_keeps_its_class_names_for_predict(root, tmp_path):
  found = work_folder.Clips(index.read_index(root, 'train'), [], [])
  config = tiny.get_config('stage2')
  with pytest.raises(UserError, match='71 classes, of which 5 have names'):
    work_folder.claim(epath.Path(tmp_path, 'run'), config, found, None)
    work_folder.class_names(tmp_path / 'run')
  config.num_classes = 5
  work_folder.claim(epath.Path(tmp_path, 'run'), config, found, None)
  assert work_folder.class_names(tmp_path / 'run') == list(TOWN.classes)
  (tmp_path / 'run' / 'classes.json').unlink()  # as in a converted model's folder
  assert work_folder.class_names(tmp_path / 'run') == list(avsbench.CLASSES[:5])


def test_maps_do_not_replace_its_clips(root):
  assert 'town.csv' in _refusal(masks.refuse_data_set, root)
