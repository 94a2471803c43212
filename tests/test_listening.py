"""What an evaluation lets a clip hear."""

import csv
import shutil

import numpy as np
import pytest

from aavs_jax.input_pipeline import audio, listening
from aavs_jax.input_pipeline.avsbench_object import ObjectClip
from aavs_jax.input_pipeline.compose.dataset import compose
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.input_pipeline.reader import load_log_mel


def test_other_sounds_come_from_another_clip_of_the_subset(data_root):
  clips = read_index(data_root, 'train')
  others = listening.other_sounds(clips)
  assert all(o.subset == c.subset and o.uid != c.uid for c, o in zip(clips, others))
  assert sorted(o.uid for o in others) == sorted(c.uid for c in clips)
  with pytest.raises(UserError, match='one clip'):
    listening.other_sounds([clip for clip in clips if clip.subset == 'v2'][:1])


class TestOffscreen:
  @pytest.fixture(scope='class')
  def root(self, tmp_path_factory):
    """Enough clips of enough classes that every clip finds one."""
    root = tmp_path_factory.mktemp('offscreen') / 'set'
    counts = {'v1s': 6, 'v1m': 8, 'v2': 5}
    none = dict.fromkeys(counts, 0)
    clips = {'train': none, 'val': none, 'test': counts}
    compose(root, clips=clips, num_classes=8, size=(48, 36))
    return root

  @pytest.fixture
  def rows(self, root):
    with open(root / 'metadata.csv', newline='') as file:
      return {(row['label'], row['uid']): row for row in csv.DictReader(file)}

  def test_nothing_that_sounds_is_in_the_picture(self, root, rows):
    clips = read_index(root, 'test')
    chosen = listening.offscreen_sounds(clips)
    assert chosen == listening.offscreen_sounds(clips)
    for clip, other in zip(clips, chosen):
      seen = set(rows[clip.subset, clip.uid]['visible'].split('_'))
      heard = set(rows[other.subset, other.uid]['a_obj'].split('_'))
      assert heard and not heard & seen
    assert len({other.uid for other in chosen}) > 5
    same = [clip.subset == other.subset for clip, other in zip(clips, chosen)]
    assert np.mean(same) > 0.8

  def test_what_sounds_stands_for_what_is_seen_where_the_table_has_no_more(
    self, root, rows, tmp_path
  ):
    shutil.copytree(root, tmp_path / 'set')
    _write_table(tmp_path / 'set', rows.values(), without='visible')
    clips = read_index(tmp_path / 'set', 'test')
    chosen = listening.offscreen_sounds(clips)
    sets = [
      [set(rows[c.subset, c.uid]['a_obj'].split('_')) for c in pair] for pair in zip(clips, chosen)
    ]
    assert not any(own & other for own, other in sets)
    assert [c.uid for c in chosen] != [
      c.uid for c in listening.offscreen_sounds(read_index(root, 'test'))
    ]

  def test_a_table_without_the_column_is_refused(self, root, rows, tmp_path):
    _write_table(tmp_path, rows.values(), without='a_obj')
    with pytest.raises(UserError, match=r"metadata\.csv, line 1: no column 'a_obj'"):
      listening.offscreen_sounds(read_index(tmp_path, 'test'))

  def test_where_every_clip_shares_a_class_it_is_refused(self, root, rows, tmp_path):
    _write_table(tmp_path, [row | {'a_obj': 'dog_cat', 'visible': 'dog'} for row in rows.values()])
    with pytest.raises(UserError, match=r'shows dog, and every clip .* no off-screen audio'):
      listening.offscreen_sounds(read_index(tmp_path, 'test'))

  def test_in_s4_the_folder_tells_what_sounds(self):
    clips = [ObjectClip('r', str(i), 'v1s', 'test', 5, name) for i, name in enumerate('aabbb')]
    chosen = listening.offscreen_sounds(clips)
    assert [clip.category for clip in chosen] == list('bbaaa')

  def test_sound_of_a_shorter_clip_is_made_to_fit(self, root):
    long, short = (read_index(root, 'test', [subset])[0] for subset in ('v2', 'v1s'))
    heard = listening.load_sound(long, short)
    own = load_log_mel(short)
    np.testing.assert_array_equal(heard[:5], own)
    np.testing.assert_array_equal(heard[5:], own[4:].repeat(5, axis=0))
    np.testing.assert_array_equal(listening.load_sound(short, long), load_log_mel(long)[:5])


def _write_table(root, rows, without=''):
  rows = [{key: value for key, value in row.items() if key != without} for row in rows]
  with open(root / 'metadata.csv', 'w', newline='') as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)


def test_noise_is_white_of_fixed_power_and_a_clips_own(data_root, monkeypatch):
  clips = read_index(data_root, 'test')
  waveforms = []
  log_mel_examples = audio.log_mel_examples

  def listen(waveform):
    waveforms.append(waveform)
    return log_mel_examples(waveform)

  monkeypatch.setattr(audio, 'log_mel_examples', listen)
  heard = [listening.load_sound(clip, 'noise') for clip in clips]
  again = [listening.load_sound(clip, 'noise') for clip in reversed(clips)][::-1]
  for clip, one, two in zip(clips, heard, again):
    assert one.shape == (clip.num_frames, 96, 64) and one.dtype == np.float32
    np.testing.assert_array_equal(one, two)
  assert len({one[0].tobytes() for one in heard}) == len(clips)
  for waveform in waveforms:
    assert np.sqrt(np.mean(waveform.astype(np.float64) ** 2)) == pytest.approx(0.1, rel=1e-6)
    spectrum = np.abs(np.fft.rfft(waveform)) ** 2
    low, high = np.array_split(spectrum[1:], 2)
    assert low.mean() == pytest.approx(high.mean(), rel=0.1)  # as much of every frequency
    assert np.mean(np.abs(waveform) > 0.2) == pytest.approx(0.0455, abs=0.005)  # two sigma


def test_an_unknown_audio_is_refused(data_root):
  with pytest.raises(UserError, match="the audio 'loud' is unknown: choose one of true, other"):
    listening.choose_sounds(read_index(data_root, 'test'), 'loud')


def test_another_sound_comes_from_the_far_side_of_the_list():
  """Neighbours may be cut from the same video."""
  clips = [ObjectClip('r', str(i), 'v1s', 'test', 5, 'a') for i in range(6)]
  assert [clip.uid for clip in listening.other_sounds(clips)] == list('345012')


def test_objects_are_known_where_labels_tell_classes(data_root):
  found = listening.known_objects(read_index(data_root, 'train'))
  assert all(visible >= sounding for sounding, visible in found) and any(s for s, _ in found)
  s4, ms3 = ObjectClip('r', '0', 'v1s', 'train', 5, 'dog'), ObjectClip('r', '1', 'v1m', 'train', 5)
  assert listening.known_objects([s4, ms3]) == [({'dog'}, {'dog'}), None]
