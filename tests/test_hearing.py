"""The start that hears: what it is taught, and how training begins from it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aavs_jax import hearing, methods
from aavs_jax.evaluate import evaluate
from aavs_jax.input_pipeline import audio
from aavs_jax.input_pipeline.compose.dataset import compose
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.training.start import fill, load_start, start_lacks
from aavs_jax.training.state import flatten
from tests import small_maps, tiny


@pytest.fixture(scope='module')
def start(data_root, tmp_path_factory):
  """A start of few steps, and the share of seconds of val that it tags right."""
  folder = tmp_path_factory.mktemp('start') / 'start'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(hearing, 'STEPS', 6)
    return folder, hearing.hear(tiny.get_config('stage1'), folder, data_root)


def test_training_begins_with_what_hears_and_the_rest_anew(start):
  config = tiny.get_config('stage1')
  config.train.init = str(start[0])
  method = methods.of(config)
  fresh = jax.jit(lambda key: flatten(method.init(key)))(jax.random.key(config.seed))
  first, lacking = fill(
    fresh, load_start(config, method), method.stage_specific, start_lacks(config)
  )
  hears = {path for path in fresh if path.startswith('vggish/')}
  assert hears and set(lacking) == fresh.keys() - hears
  assert any((first[path] != fresh[path]).any() for path in hears)
  assert 0 <= start[1] <= 1
  heard = json.loads((start[0] / hearing.HEARD).read_text())
  assert heard['right'] == start[1] and heard['seconds'] > heard['classes'] > 1


def test_its_network_serves_every_stage_and_method(start):
  configs = tiny.get_config('stage1'), small_maps.get_config('tpavi_stage1')
  configs[0].model.adapter_variant = 'replace'  # than that of the config that it was made for
  for config in configs:
    config.train.init = str(start[0])
    config.vggish.final_relu = False
    assert any(path.startswith('vggish/') for path in load_start(config, methods.of(config)))
    config.vggish.final_relu = True
    with pytest.raises(UserError, match=r'config\.vggish\.final_relu is'):
      load_start(config, methods.of(config))


def test_it_is_no_model_of_its_own(start, data_root, tmp_path):
  with pytest.raises(UserError, match=r'holds no audio-visual model .*--config\.train\.init'):
    evaluate(start[0], data=data_root, out=tmp_path / 'r.json')


def test_it_learns_to_tell_sounds(monkeypatch):
  """Two sounds in two bands; of their mixtures, both."""
  monkeypatch.setattr(hearing, 'STEPS', 60)
  config = tiny.get_config('stage1')
  config.vggish.conv_widths = (4,) * 6
  rng = np.random.default_rng(0)
  sounding = np.eye(2, dtype=bool)[rng.integers(0, 2, 200)]
  bands = np.repeat(sounding, 32, axis=1)[:, None] * np.ones((1, 96, 1))
  log_mel = audio.log_magnitudes(bands * rng.uniform(0.5, 2, (200, 96, 64))).astype(np.float32)
  _, tags = hearing._train(config, log_mel, sounding, rng)
  assert np.mean(tags(log_mel) == sounding) > 0.95
  both = audio.log_magnitudes(rng.uniform(0.5, 2, (50, 96, 64))).astype(np.float32)
  assert np.mean(tags(both)) > 0.8


def test_in_a_mixture_magnitudes_add_up_and_either_sounds(monkeypatch):
  monkeypatch.setattr(hearing, '_LOUDNESS', 0.0)
  magnitudes = np.array([1.0, 10.0])[:, None, None] * np.ones((1, 96, 64))
  log_mel = audio.log_magnitudes(magnitudes).astype(np.float32)
  mixed, heard = hearing._batch(log_mel, np.eye(2, dtype=bool), np.random.default_rng(0))
  found = {(round(float(audio.magnitudes(x).mean())), *map(bool, y)) for x, y in zip(mixed, heard)}
  assert found == {(1, 1, 0), (2, 1, 0), (10, 0, 1), (20, 0, 1), (11, 1, 1)}
  assert mixed.dtype == np.float32 and jnp.isfinite(mixed).all()


def test_labels_without_classes_are_refused(tmp_path):
  few = {'v1s': 1, 'v1m': 1, 'v2': 0}
  compose(
    tmp_path / 'data', clips=dict(train=few, val=few, test=few), size=(64, 48), layout='object'
  )
  with pytest.raises(UserError, match='not as what'):
    hearing.hear(tiny.get_config('stage1'), tmp_path / 'start', str(tmp_path / 'data'))
  assert not (tmp_path / 'start').exists()


@pytest.mark.parametrize('out', ['gs://bucket/start', ''])
def test_where_it_cannot_be_written_is_said_before_it_learns(out, data_root, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(hearing, '_train', None)
  (tmp_path / 'mine').touch()
  with pytest.raises(UserError, match='in a bucket' if out else 'is not empty'):
    hearing.hear(tiny.get_config('stage1'), out or tmp_path, data_root)
  assert [path.name for path in tmp_path.iterdir()] == ['mine']


def test_clips_of_which_none_can_be_read_are_said_in_one_sentence(data_root, tmp_path):
  root = shutil.copytree(data_root, tmp_path / 'data')
  for sound in root.glob('v*/*/audio.wav'):
    sound.write_bytes(b'')
  config = tiny.get_config('stage1')
  with pytest.raises(UserError, match=r'audio\.wav'):
    hearing.hear(config, tmp_path / 'start', str(root))
  config.data.on_bad_clip = 'skip'
  with pytest.raises(UserError, match='no clip of train can be read'):
    hearing.hear(config, tmp_path / 'start', str(root))


def test_a_class_that_was_not_taught_is_not_told_right(data_root, tmp_path, monkeypatch):
  """Of three seconds the two of classes that were taught are."""
  classes = np.eye(3, dtype=bool)
  examples = iter([(np.zeros((2, 96, 64)), classes[:2]), (np.zeros((3, 96, 64)), classes)])
  trained = ({'a': np.zeros(1)}, lambda _: np.eye(3, 2) > 0)
  monkeypatch.setattr(hearing, '_examples', lambda *_: next(examples))
  monkeypatch.setattr(hearing, '_train', lambda *_: trained)
  right = hearing.hear(tiny.get_config('stage1'), tmp_path / 'start', data_root)
  assert right == pytest.approx(2 / 3)
