"""The report: complete, self-contained, well-formed, worst clips first, at ease with half a run."""

import base64
import csv
import dataclasses
import html
import io
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aavs_jax import config as config_lib
from aavs_jax import configs
from aavs_jax.configs import compose_bench, quickstart
from aavs_jax.input_pipeline.avsbench import CLASSES, PALETTE
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.input_pipeline.labels import ids_to_colours
from aavs_jax.studies.report import _card, _legend, write_report
from tests import tiny

FRAMES = {'v1s': 5, 'v1m': 5, 'v2': 10}
VOID = {'meta', 'img', 'br', 'hr', 'link', 'input'}


def make_data(root, clips):
  """A data set of `clips` [(subset, uid)]: a disc of class 8 moving over noise."""
  root.mkdir(parents=True)
  with open(root / 'metadata.csv', 'w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(['uid', 'label', 'split'])
    writer.writerows([uid, subset, 'test'] for subset, uid in clips)
  rng = np.random.default_rng(0)
  rows, columns = np.mgrid[:96, :128]
  for subset, uid in clips:
    folders = [root / subset / uid / name for name in ('frames', 'labels_rgb', 'labels_semantic')]
    for folder in folders:
      folder.mkdir(parents=True)
    for t in range(FRAMES[subset]):
      disc = (rows - 48) ** 2 + (columns - 30 - 7 * t) ** 2 < 20**2
      image = rng.integers(40, 120, (96, 128, 3)).astype(np.uint8)
      image[disc] = (90, 140, 190)
      ids = np.where(disc & (t != 3), 8, 0).astype(np.uint8)
      Image.fromarray(image).save(folders[0] / f'{t}.jpg')
      Image.fromarray(ids_to_colours(ids, PALETTE)).save(folders[1] / f'{t}.png')
      Image.fromarray(ids).save(folders[2] / f'{t}.png')


def make_evaluation(task, clips, level, **more):
  def scores(value):
    if task == 'binary':
      return {'miou': value, 'fscore': value}
    # Half the classes occur.
    means = {'': value / 2, '_no_background': value / 3, '_occurring': value}
    return {name + suffix: v for suffix, v in means.items() for name in ('miou', 'fscore')}

  there = {subset for subset, _ in clips}
  subsets = [subset for subset in FRAMES if subset in there]
  result = {
    'task': task, 'split': 'test', 'audio': 'true', 'prior': None,
    'clips': len(clips), 'frames': sum(FRAMES[s] for s, _ in clips), 'overall': scores(level),
    'subsets': {s: {'clips': 1, **scores(level * (0.9 if s == 'v1m' else 1))} for s in subsets},
    # Clip i scores i hundredths: the first clips are the worst.
    'per_clip': [
      {'uid': uid, 'subset': subset, 'miou': i / 100, 'fscore': i / 100}
      for i, (subset, uid) in enumerate(clips)
    ],
    **more,
  }  # fmt: skip
  if task == 'semantic':
    result['per_class'] = [
      {'id': i, 'name': name, 'iou': i / 71 if i % 3 == 0 else None,
       'fscore': i / 71 if i % 3 == 0 else None, 'frames': i if i % 3 == 0 else 0}
      for i, name in enumerate(CLASSES)
    ]  # fmt: skip
  return result


def make_run(workdir, clips):
  """Every artefact of a finished run, with made-up numbers."""
  (workdir / 'eval').mkdir(parents=True)
  for name, level, more in (
    ('stage1_true', 0.71, {}),
    ('stage1_other', 0.32, {'audio': 'other'}),
    ('stage1_silence', 0.25, {'audio': 'silence'}),
    ('stage2_masks', 0.48, {'prior': 'stage1'}),
    ('stage2_oracle', 0.63, {'prior': 'oracle'}),
  ):
    task = 'binary' if name.startswith('stage1') else 'semantic'
    result = make_evaluation(task, clips, level, **more)
    (workdir / 'eval' / f'{name}.json').write_text(json.dumps(result))
  for stage in ('stage1', 'stage2'):
    (workdir / stage).mkdir()
    (workdir / stage / 'config.json').write_text('{"note": "<b>bold & free</b>", "seed": 3}')
    lines = []
    for step in range(0, 200, 5):
      epoch, phase = step / 20, 1 + (step >= 100)
      loss = 30 * np.exp(-epoch / 4) + 3
      lines.append({'kind': 'train', 'step': step, 'epoch': epoch, 'phase': phase, 'loss': loss})
      if step % 20 == 0:
        score = 0.7 - 0.6 * np.exp(-epoch / 3)
        lines.append({
          'kind': 'val', 'step': step, 'epoch': epoch, 'phase': phase, 'miou': score,
          'fscore': score + 0.08,
        })  # fmt: skip
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    (workdir / stage / 'metrics.jsonl').write_text(text + '{"kind": "tra')  # being written
  rows, columns = np.mgrid[:112, :112]
  for subset, uid in clips:
    for t in range(FRAMES[subset]):
      disc = (rows - 56) ** 2 + (columns - 30 - 6 * t) ** 2 < 22**2
      for path, values in (
        (workdir / 'masks' / subset / uid / f'{t}.png', 255 * disc),
        (workdir / 'eval' / 'stage2_masks' / subset / uid / f'{t}.png', (8 + 9 * (t == 2)) * disc),
      ):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.astype(np.uint8)).save(path)


class Checker(HTMLParser):
  """Collects text, headings and pictures, and fails on tags that do not balance."""

  def __init__(self):
    super().__init__()
    self.open, self.ids, self.images, self.links = [], [], 0, []

  def handle_starttag(self, tag, attrs):
    self.record(tag, dict(attrs))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.record(tag, dict(attrs))

  def handle_endtag(self, tag):
    assert self.open and self.open[-1] == tag, f'</{tag}> closes {self.open[-3:]}'
    self.open.pop()

  def record(self, tag, attrs):
    assert tag not in ('script', 'link', 'iframe')
    self.ids += [attrs['id']] if 'id' in attrs else []
    self.images += tag == 'img'
    self.links += [attrs[k] for k in ('src', 'href', 'xlink:href') if k in attrs]


def check(page):
  checker = Checker()
  checker.feed(page)
  checker.close()
  assert not checker.open
  assert all(link.startswith(('data:image/', '#')) for link in checker.links)
  words = re.sub(r'base64,[^"]*', '', page)
  assert 'http' not in words and '@import' not in words and 'url(' not in words.split('<body>')[0]
  return checker


@pytest.fixture(scope='module')
def clips():
  subsets = ['v1s', 'v1m', 'v2', 'v1m']
  return [(subsets[i % 4], f'-clip{i:02d}_{1000 * i}_{1000 * i + 5000}') for i in range(16)]


@pytest.fixture(scope='module')
def run(tmp_path_factory, clips):
  folder = tmp_path_factory.mktemp('report')
  make_data(folder / 'data', clips)
  make_run(folder / 'run', clips)
  return folder / 'run', folder / 'data'


@pytest.fixture(scope='module')
def page(run):
  path = write_report(*run)
  assert path == run[0] / 'report.html'
  return path.read_text(encoding='utf-8')


def test_page_is_well_formed_and_self_contained(page):
  checker = check(page)
  assert checker.images == 12 * 4 * 5 + 1
  assert page.count('<svg') == 2
  assert len(page) < 6e6


@pytest.mark.parametrize(('frames', 'shown'), [(3, 3), (5, 5), (10, 5)])
def test_rows_of_a_clip_have_a_column_for_each_picture(frames, shown, run):
  clip = read_index(run[1], subsets=['v2'])[0]
  card = _card(run[0], dataclasses.replace(clip, num_frames=frames), {})
  assert f'--shown:{shown}"' in card and card.count('alt="frame') == shown


def test_it_says_how_well_the_start_hears(run, page, tmp_path):
  assert 'held-out seconds' not in page
  (tmp_path / 'start').mkdir()
  heard = {'classes': 8, 'seconds': 300, 'right': 0.9866}
  (tmp_path / 'start' / 'hearing.json').write_text(json.dumps(heard))
  text = write_report(tmp_path, run[1]).read_text()
  assert 'which of 8 classes sound: in 98.7 % of 300 held-out seconds' in text


def test_a_folder_of_something_else_gets_no_report(tmp_path, data_root):
  (tmp_path / 'holiday.mp4').write_bytes(b'')
  with pytest.raises(UserError, match='holds none of eval, stage1, stage2, start, study'):
    write_report(tmp_path, data_root)
  (tmp_path / 'stage1').mkdir()
  with pytest.raises(UserError, match='nowhere'):
    write_report(tmp_path, tmp_path / 'nowhere')
  assert not (tmp_path / 'report.html').exists()


def test_every_clip_is_listed_and_twelve_are_shown(page, clips):
  shown = re.findall(r'<article><header><code>(.*?)</code>', page)
  uids = [uid for _, uid in clips]
  # Six worst, three around the median of 16, three best.
  assert shown == uids[:6] + uids[7:10] + uids[13:]
  listed = re.findall(r'<th scope="row">(-clip.*?)</th>', page)
  assert listed == uids
  places = [page.index(h) for h in ('Worst clips by stage 2', 'Around the median', 'Best clips')]
  assert places == sorted(places)


def test_the_median_clip_moves(page, clips):
  section = page[page.index('The median clip, in motion') :].split('</section>')[0]
  assert clips[8][1] in section
  data = base64.b64decode(re.search(r'data:image/webp;base64,([^"]*)', section)[1])
  assert len(data) < 200_000
  with Image.open(io.BytesIO(data)) as image:
    assert image.n_frames == FRAMES[clips[8][0]] and image.size == (640, 320)
    seen = []
    for t in range(image.n_frames):
      image.seek(t)
      seen.append(np.asarray(image.convert('RGB')).astype(int))
  assert np.abs(seen[1] - seen[0]).mean() > 1
  left, right = seen[0][:, :320], seen[0][:, 320:]
  moved = np.abs(left - right).max(-1) > 60  # where the disc is
  assert 0.05 < moved.mean() < 0.3


def test_numbers_of_the_learning_table(page):
  table = page[page.index('Does it listen?') : page.index('Does it name')]
  rows = dict(re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', table))
  numbers = {label: re.findall(r'>([^<>]+)</td>', cells) for label, cells in rows.items()}
  assert numbers['true sound'] == ['71.0', '71.0', '71.0', '71.0', '63.9', '63.9', '71.0', '71.0']
  assert numbers['silence'][:2] == ['25.0', '25.0']
  difference = next(
    cells for label, cells in rows.items() if 'another' in label and 'true' in label
  )
  assert re.findall(r'class="mark">([^<]*)<', difference) == ['+35.1', '+35.1']
  assert re.findall(r'<th colspan="2">(\w+)</th>', table) == ['all', 'v1s', 'v1m', 'v2']


def test_naming_leads_with_the_classes_that_occur(page):
  lead = page[: page.index('<h2>')]
  assert '<b>48.0</b><span>stage 2: mIoU over the classes that occur (24.0 over all 71' in lead
  assert 'of 48.0 (24.0 over all 71, as published), and of 63.0 given the true masks' in lead
  section = page[page.index('Does it name') :].split('</section>')[0]
  tables = section.split('<table')[1:]
  assert 'Over all 71 classes, as published' in tables[0].split('</table>')[1]
  firsts = [re.search(r'masks of stage 1</th><td>([^<]*)<', table)[1] for table in tables]
  assert firsts == ['48.0', '24.0', '16.0']


def test_clips_left_out_of_training_are_listed_with_their_faults(run):
  folder, data = run
  listing = folder / 'stage2' / 'bad_clips.json'
  listing.write_text(json.dumps([{'clip': 'v2/-a_0_10000', 'text': 'audio.wav: 0 bytes & <none>'}]))
  page = write_report(folder, data, folder / 'other.html').read_text(encoding='utf-8')
  listing.unlink()
  check(page)
  assert 'Bad clips left out of training: 1' in page
  assert '<li>v2/-a_0_10000: audio.wav: 0 bytes &amp; &lt;none&gt;</li>' in page


def test_text_is_escaped(page):
  assert '<b>bold' not in page
  assert '&lt;b&gt;bold &amp; free' in page


def test_legend_tells_what_was_missed_or_invented(page):
  first = page[page.index('class="legend"') :].split('</p>')[0]
  assert '>boat<' in first
  assert 'dog (not there)' in first


def test_classes_that_never_occur_are_left_out(page):
  section = page[page.index('<h2>Classes</h2>') :].split('</section>')[0]
  assert '47 further classes never occur' in section
  assert '<span>woman</span>' not in section and '<span>wolf</span>' in section


def test_run_without_stage_2(run, clips, tmp_path):
  workdir = tmp_path / 'half'
  make_run(workdir, clips)
  for name in ('stage2_masks.json', 'stage2_oracle.json'):
    (workdir / 'eval' / name).unlink()
  for path in (workdir / 'stage2').iterdir():
    path.unlink()
  page = write_report(workdir, run[1], out=tmp_path / 'sub' / 'x.html').read_text(encoding='utf-8')
  check(page)
  assert 'Worst clips by stage 1' in page
  assert 'Not there yet: eval/stage2_oracle' in page
  assert 'Not there yet: stage2' in page


def test_missing_mask_leaves_a_gap(run, clips, tmp_path):
  workdir = tmp_path / 'gap'
  make_run(workdir, clips)
  subset, uid = clips[0]
  (workdir / 'masks' / subset / uid / '1.png').unlink()
  (workdir / 'masks' / subset / uid / '2.png').write_bytes(b'cut off')
  (workdir / 'masks' / subset / uid / '3.png').write_bytes(b'')
  page = write_report(workdir, run[1]).read_text(encoding='utf-8')
  assert check(page).images == 12 * 4 * 5 - 3 + 1
  assert page.count('class="absent"') == 3


def test_empty_workdir_says_what_to_run(run, tmp_path):
  page = write_report(tmp_path, run[1]).read_text(encoding='utf-8')
  check(page)
  assert page.count('<code>aavs ') >= 8
  assert f'aavs masks --workdir {tmp_path}/stage1 ' in page


@pytest.mark.parametrize('seeds', [(4,), (0, 4)])
def test_commands_are_those_of_the_study(run, tmp_path, seeds):
  study = compose_bench.get_config()
  study.seeds = seeds
  study.looks = study.robust = None
  study.stage1, study.stage2 = tiny.get_config('stage1'), tiny.get_config('stage2')
  study.stage1.data.subsets = ('v1s',)
  study.stage2.model.robust_key = False
  study.stage2.train.trainable = (r'aavs/(queries|decoder)/', "it's")
  settings = {'data': '', 'config': json.loads(study.to_json_best_effort())}
  (tmp_path / 'study.json').write_text(json.dumps(settings))
  workdir = tmp_path if len(seeds) == 1 else tmp_path / 'seed4'
  workdir.mkdir(exist_ok=True)
  page = write_report(workdir, run[1]).read_text(encoding='utf-8')
  texts = dict.fromkeys(
    re.findall('<code>(aavs train .*?)</code>', page)
  )  # each stands there twice
  commands = [shlex.split(html.unescape(text)) for text in texts]
  study.stage1.train.init = str(workdir / 'start')
  study.stage2.data.masks = str(workdir / 'masks')
  study.stage2.train.init = str(workdir / 'stage1')
  for name, (_, _, _, path, *given) in zip(('stage1', 'stage2'), commands, strict=True):
    assert given[:4] == ['--data', str(run[1]), '--workdir', str(workdir / name)]
    study[name].seed = 4
    found = config_lib.load(str(Path(configs.__path__[0]).parent / path), given[4:])
    assert config_lib.differences(found, study[name]) == []


def test_a_study_of_more_parts_is_gone_on_with_by_its_own_command(run, tmp_path):
  settings = {'data': '', 'config': json.loads(compose_bench.get_config().to_json_best_effort())}
  (tmp_path / 'study.json').write_text(json.dumps(settings))
  page = write_report(tmp_path, run[1]).read_text(encoding='utf-8')
  assert '<code>aavs' not in page and 'The command of the study makes it' in page


@pytest.mark.parametrize('key, given', [('soft', ' --soft</code>'), ('predicted', None)])
def test_commands_make_the_masks_that_stage_2_wants(key, given, run, tmp_path):
  study = quickstart.get_config()
  study.stage2.prior[key] = 1.0 if key == 'predicted' else True
  settings = {'data': '', 'config': json.loads(study.to_json_best_effort())}
  (tmp_path / 'study.json').write_text(json.dumps(settings))
  page = write_report(tmp_path, run[1]).read_text(encoding='utf-8')
  assert (given in page) if given else ('<code>aavs' not in page)


def test_few_clips_are_shown_once_each(tmp_path):
  few = [('v1s', f'_c{i}') for i in range(8)]
  make_data(tmp_path / 'data', few)
  make_run(tmp_path / 'run', few)
  page = write_report(tmp_path / 'run', tmp_path / 'data').read_text(encoding='utf-8')
  assert re.findall(r'<article><header><code>(.*?)</code>', page) == [uid for _, uid in few]


def test_errors_name_the_file(run, clips, tmp_path):
  workdir, data = run
  with pytest.raises(UserError, match='is no folder'):
    write_report(workdir / 'nowhere', data)
  make_run(tmp_path / 'a', [*clips, ('v2', 'unknown')][::-1])
  with pytest.raises(UserError, match='no test clip unknown in v2'):
    write_report(tmp_path / 'a', data)
  log = tmp_path / 'a' / 'stage1' / 'metrics.jsonl'
  log.write_text('{"kind": "train", "step": 1}\nbroken\n')
  with pytest.raises(UserError, match=r'metrics\.jsonl, line 2'):
    write_report(tmp_path / 'a', data)
  (tmp_path / 'a' / 'eval' / 'stage1_true.json').write_text('{"split": "test"}')
  with pytest.raises(UserError, match=r'stage1_true\.json lacks clips'):
    write_report(tmp_path / 'a', data)
  (tmp_path / 'a' / 'eval' / 'stage1_true.json').write_text('{')
  with pytest.raises(UserError, match=r'stage1_true\.json'):
    write_report(tmp_path / 'a', data)


def test_classes_are_shown_best_first(page):
  section = page[page.index('<h2>Classes</h2>') :].split('</section>')[0]
  widths = [float(width) for width in re.findall(r'width:([\d.]+)%', section)]
  assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]


def test_without_an_answer_nothing_is_missed():
  labels = [np.array([[0, 1]], np.uint8)]
  assert '(missed)' not in _legend(labels, [None], ['background', 'dog'])
  assert '(missed)' in _legend(labels, [0 * labels[0]], ['background', 'dog'])
