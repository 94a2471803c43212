"""The audio front end against recorded numbers of the released code, and against broken files."""

import logging
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from aavs_jax.input_pipeline import audio
from aavs_jax.input_pipeline.errors import UserError

GOLDENS = pathlib.Path(__file__).parent / 'goldens' / 'audio.npz'


@pytest.fixture(scope='module')
def goldens():
  with np.load(GOLDENS) as file:
    return dict(file)


def noise(samples, channels=1):
  draws = np.random.default_rng(0).normal(0, 3000, (samples, channels))
  return draws.clip(-32768, 32767).astype(np.int16)


def write(path, samples, rate=16000, subtype='PCM_16'):
  soundfile.write(path, samples, rate, subtype=subtype)
  return path


@pytest.mark.parametrize('name', ['mono16k_5s', 'stereo16k_3s'])
def test_log_mel_equals_release_at_16_khz(goldens, tmp_path, name):
  path = write(tmp_path / 'a.wav', goldens[f'{name}/pcm'])
  want = goldens[f'{name}/log_mel']
  np.testing.assert_allclose(audio.clip_log_mel(path, len(want)), want, rtol=0, atol=1e-5)


def test_log_mel_close_to_release_at_44_khz(goldens, tmp_path):
  # The release resamples with another library; the difference is that of the two low-pass filters.
  path = write(tmp_path / 'a.wav', goldens['mono44k_2s/pcm'], int(goldens['mono44k_2s/rate']))
  want = goldens['mono44k_2s/log_mel']
  got = audio.clip_log_mel(path, len(want))
  assert got.dtype == np.float32
  assert np.abs(got - want).mean() < 0.02


def test_resample_keeps_a_tone_and_its_length():
  t = np.arange(44100) / 44100
  got = audio.resample(np.sin(2 * np.pi * 1000 * t).astype(np.float32), 44100)
  assert got.shape == (16000,)
  assert got.dtype == np.float32
  want = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
  np.testing.assert_allclose(got[800:-800], want[800:-800], atol=1e-3)


def test_a_16_khz_clip_needs_no_resampler(tmp_path):
  # librosa takes seconds to import, in every loader process.
  path = write(tmp_path / 'a.wav', noise(80000))
  code = (
    'import sys; from aavs_jax.input_pipeline import audio; audio.clip_log_mel(sys.argv[1], 5); '
    'assert not {"librosa", "scipy", "jax"} & set(sys.modules)'
  )
  subprocess.run([sys.executable, '-c', code, str(path)], check=True)


@pytest.mark.parametrize(
  'samples, examples',
  [(0, 0), (399, 0), (15599, 0), (15600, 1), (30959, 1), (30960, 2), (80000, 5), (160000, 10)],
)
def test_number_of_examples(samples, examples):
  got = audio.log_mel_examples(np.zeros(samples, np.float32))
  assert got.shape == (examples, 96, 64)
  assert got.dtype == np.float32
  if examples:
    assert audio.samples_needed(examples) <= samples < audio.samples_needed(examples + 1)


def test_silence_is_the_logarithm_of_the_offset():
  np.testing.assert_allclose(audio.log_mel_examples(np.zeros(16000, np.float32)), np.log(0.01))


def test_a_tone_peaks_in_its_mel_band():
  for hertz in (200, 1000, 6000):
    waveform = np.sin(2 * np.pi * hertz * np.arange(16000) / 16000).astype(np.float32)
    low, high, tone = (1127 * np.log(1 + f / 700) for f in (125, 7500, hertz))
    band = (tone - low) / (high - low) * 65 - 1  # centres of the bands are 0, 1, ... on this scale
    peak = audio.log_mel_examples(waveform)[0].mean(axis=0).argmax()
    assert abs(peak - band) < 1.5


def test_fit_cuts_or_repeats_the_last():
  examples = np.arange(3, dtype=np.float32)[:, None, None] * np.ones((96, 64), np.float32)
  for frames, values, missing in ((2, [0, 1], 0), (3, [0, 1, 2], 0), (5, [0, 1, 2, 2, 2], 2)):
    got, count = audio.fit_examples(examples, frames)
    assert got[:, 0, 0].tolist() == values
    assert got.shape == (frames, 96, 64)
    assert got.dtype == np.float32
    assert count == missing


def test_short_clip_repeats_and_says_so_once(tmp_path, caplog):
  path = write(tmp_path / 'short.wav', noise(3 * 16000))
  with caplog.at_level(logging.WARNING):
    got = audio.clip_log_mel(path, 5)
    audio.clip_log_mel(path, 5)
  assert (got[2:] == got[2]).all()
  assert not (got[1] == got[2]).any()
  messages = [record.getMessage() for record in caplog.records]
  assert len(messages) == 1
  assert str(path) in messages[0] and '3 of 5' in messages[0]


def test_long_clip_is_cut_without_a_word(tmp_path, caplog):
  samples = noise(10 * 16000)
  got = audio.clip_log_mel(write(tmp_path / 'a.wav', samples), 5)
  whole = audio.log_mel_examples(samples[:, 0] / np.float32(32768))
  np.testing.assert_array_equal(got, whole[:5])
  assert not caplog.records


def test_read_wav_scales_and_averages(tmp_path):
  pcm = np.array([[-32768, 0], [32767, 32767], [1, 3]], np.int16)
  waveform, rate = audio.read_wav(write(tmp_path / 'a.wav', pcm, 22050))
  assert rate == 22050
  assert waveform.dtype == np.float32
  assert waveform.tolist() == [-0.5, 32767 / 32768, 2 / 32768]


@pytest.mark.parametrize('subtype', ['PCM_U8', 'PCM_24', 'PCM_32', 'FLOAT', 'DOUBLE'])
def test_read_wav_other_subtypes(tmp_path, subtype):
  want = np.array([0.5, -0.25, 0.0, 0.125])
  waveform, _ = audio.read_wav(write(tmp_path / 'a.wav', want, subtype=subtype))
  np.testing.assert_allclose(waveform, want, atol=1e-7)


def test_read_wav_joins_its_blocks(tmp_path, monkeypatch):
  monkeypatch.setattr(audio, '_BLOCK_SAMPLES', 1000)
  pcm = noise(12345, channels=2)
  waveform, _ = audio.read_wav(write(tmp_path / 'a.wav', pcm))
  np.testing.assert_allclose(waveform, pcm.mean(axis=1) / 32768, atol=1e-7)


def error_of(path, *found):
  with pytest.raises(UserError) as caught:
    audio.clip_log_mel(path, 5)
  message = str(caught.value)
  for part in (str(path), *found):
    assert part in message, message
  assert '\n' not in message


def test_missing_file(tmp_path):
  error_of(tmp_path / 'none.wav', 'No such file')


def test_zero_bytes(tmp_path):
  (tmp_path / 'a.wav').write_bytes(b'')
  error_of(tmp_path / 'a.wav', '0 bytes')


def test_the_same_fault_is_told_in_the_same_words(tmp_path):
  """A library's sentence may hold an address in memory, and reports are compared."""
  path = tmp_path / 'audio.wav'
  path.write_bytes(b'RIFF' + bytes(60))
  with pytest.raises(UserError, match='not a readable sound file') as failure:
    audio.read_wav(path)
  assert ' at 0x' not in str(failure.value)


def test_not_a_sound_file(tmp_path):
  (tmp_path / 'a.wav').write_bytes(b'<html>not found</html>' * 10)
  error_of(tmp_path / 'a.wav', 'not a readable sound file')


def test_no_samples(tmp_path):
  error_of(write(tmp_path / 'a.wav', np.zeros(0, np.int16)), '0 samples')


def test_too_short_for_an_example(tmp_path):
  error_of(write(tmp_path / 'a.wav', noise(8000)), '0.5000 s', '0.975 s')


@pytest.mark.parametrize('value, text', [(np.nan, 'nan'), (-np.inf, '-inf'), (20000.0, '20000')])
def test_samples_that_are_no_sound(tmp_path, value, text):
  samples = np.zeros((16000, 2), np.float32)
  samples[123, 1] = value
  error_of(write(tmp_path / 'a.wav', samples, subtype='FLOAT'), f'sample 123 is {text},')


@pytest.mark.parametrize('rate', [1, 2_000_000_000])
def test_absurd_rate(tmp_path, rate):
  path = write(tmp_path / 'a.wav', noise(16000))
  data = bytearray(path.read_bytes())
  data[24:28] = struct.pack('<I', rate)
  path.write_bytes(data)
  error_of(path, f'{rate} Hz')


def test_too_long(tmp_path):
  error_of(write(tmp_path / 'a.wav', np.zeros(3_600_001, np.int16), rate=1000), '3600 s')


def test_lying_length_reads_what_is_there(tmp_path):
  # A FLAC header with the largest possible length, 2**36 - 1 samples: 256 GB of float32.
  path = tmp_path / 'a.flac'
  write(path, noise(16000))
  data = bytearray(path.read_bytes())
  assert data[:4] == b'fLaC'
  data[21] |= 0x0F
  data[22:26] = b'\xff' * 4
  path.write_bytes(data)
  assert soundfile.info(path).frames > 1 << 35
  try:
    waveform, _ = audio.read_wav(path)
    assert len(waveform) == 16000
  except UserError as error:  # libsndfile may find that the frames end early
    assert str(path) in str(error)


def test_exactly_the_longest_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(audio, '_MAX_SECONDS', 1)
  path = tmp_path / 'a.wav'
  soundfile.write(path, np.zeros(16000), 16000)
  assert len(audio.read_wav(path)[0]) == 16000
