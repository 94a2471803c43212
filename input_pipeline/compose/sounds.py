"""What the objects of a composed set sound like.

A sound is a function rng -> float32 [9600], 0.6 s at 16 kHz, unit RMS: one second's worth.
"""

import functools
import math
import pathlib
from collections.abc import Callable

import numpy as np

from .. import audio, errors
from ..audio import SAMPLE_RATE

LENGTH = 9600  # samples of a sound
Sound = Callable[[np.random.Generator], np.ndarray]

# In seconds; float32 sines are fast.
_TIME = np.arange(LENGTH, dtype=np.float32) / np.float32(SAMPLE_RATE)
_TOP = 7200  # hertz: the log-mel features end at 7500
_MIN_RMS = 1e-4


def _phase(frequency: np.ndarray) -> np.ndarray:
  """Phase in radians, float32 [LENGTH] in 0..2 pi, of this instantaneous frequency in hertz."""
  turns = np.cumsum(frequency, dtype=np.float64) / SAMPLE_RATE % 1
  return (turns * 2 * math.pi).astype(np.float32)


def _harmonics(pitch, tempo, rng):
  """A steady, string-like stack of partials with a slow vibrato."""
  phase = _phase(pitch * (1 + 0.008 * np.sin(2 * math.pi * 5 * tempo * _TIME)))
  return sum(np.sin(n * phase) / n**0.6 for n in range(1, 13) if n * pitch < _TOP)


def _clicks(pitch, tempo, rng):
  """Sharp knocks, about twelve a second."""
  since = _TIME % (1 / (12 * tempo))
  knock = np.sin(2 * math.pi * pitch * since) + 0.15 * rng.standard_normal(LENGTH, np.float32)
  return knock * np.exp(-since / 0.012)


def _rising(pitch, tempo, rng):
  """Chirps that go up by most of an octave, about four a second."""
  cycle = _TIME * 4 * tempo % 1
  return np.sin(_phase(pitch * 1.85**cycle)) * np.sin(math.pi * cycle) ** 0.5


def _noise(pitch, tempo, rng):
  """A hiss in a band of one octave that swells and fades."""
  spectrum = np.fft.rfft(rng.standard_normal(LENGTH))
  frequency = np.fft.rfftfreq(LENGTH, 1 / SAMPLE_RATE)
  octaves = np.log2(np.maximum(frequency, 1) / (pitch * 1.4))
  hiss = np.fft.irfft(spectrum * np.exp(-((octaves / 0.5) ** 4)), LENGTH)
  return hiss * (0.7 + 0.3 * np.sin(2 * math.pi * 3 * tempo * _TIME))


def _warble(pitch, tempo, rng):
  """A siren: frequency modulation by a third of the pitch, about seven times a second."""
  return np.sin(_phase(pitch * (1 + 0.35 * np.sin(2 * math.pi * 7 * tempo * _TIME))))


def _strikes(pitch, tempo, rng):
  """Bell-like inharmonic partials, struck about four times a second."""
  since = _TIME % (1 / (4 * tempo))
  partials = [(0.5, 0.6), (1, 1.0), (1.59, 0.7), (2.76, 0.5)]
  return sum(
    a * np.sin(2 * math.pi * r * pitch * since) * np.exp(-since * (9 + 6 * r))
    for r, a in partials
    if r * pitch < _TOP
  )


def _falling(pitch, tempo, rng):
  """Chirps that go down by most of an octave, with a second partial, about four a second."""
  cycle = _TIME * 4 * tempo % 1
  phase = _phase(pitch * 1.85 ** (1 - cycle))
  second = np.sin(2 * phase) * (2 * 1.85 * pitch < _TOP)
  return (np.sin(phase) + 0.6 * second) * np.sin(math.pi * cycle) ** 0.5


def _pulses(pitch, tempo, rng):
  """An organ-like tone (odd partials) gated on and off, about nine times a second."""
  phase = _phase(np.full(LENGTH, pitch))
  tone = sum(np.sin(n * phase) / n for n in (1, 3, 5) if n * pitch < _TOP)
  return tone * np.clip(0.5 + 3 * np.sin(2 * math.pi * 9 * tempo * _TIME), 0, 1)


_FAMILIES = (_harmonics, _clicks, _rising, _noise, _warble, _strikes, _falling, _pulses)
_PITCHES = 150 * 1.5 ** np.arange(9)  # hertz; 8 families x 9 pitches: all 70 classes differ
# Of the first class of each family: the three families of gliding tones lie far apart.
_FIRST_PITCH = (0, 5, 7, 4, 3, 6, 1, 8)


def synthetic_sound(kind: int, variant: int) -> Sound:
  """One variant of the sound of class number `kind`, 0..69 in the order of scenes.CLASSES.

  The class fixes the family and its pitch within a fifth; the variant shifts pitch, tempo and
  envelope; each call differs a little more.
  """
  rng = np.random.default_rng([kind, variant, 1])
  family = kind % len(_FAMILIES)
  pitch = _PITCHES[(_FIRST_PITCH[family] + kind // len(_FAMILIES)) % len(_PITCHES)]
  return functools.partial(
    _synthesise,
    _FAMILIES[family],
    float(pitch * 2 ** rng.uniform(-0.12, 0.12)),
    rng.uniform(0.8, 1.25),
    rng.uniform(0.35, 1, 2),
  )


def _synthesise(family, pitch, tempo, envelope, rng):
  wave = family(pitch * rng.uniform(0.98, 1.02), tempo * rng.uniform(0.95, 1.05), rng)
  return _unit_rms(wave * np.linspace(*envelope, LENGTH, dtype=np.float32))


def _unit_rms(wave: np.ndarray) -> np.ndarray:
  return (wave / np.sqrt(np.mean(wave**2))).astype(np.float32)


def load_recording(path: pathlib.Path) -> Sound:
  """The sound in a recording: any of its 0.6 s windows that are not near silence.

  A shorter recording is looped; channels are averaged; another rate is resampled to 16 kHz.

  Raises:
    UserError: the file cannot be read, or is silent.
  """
  wave = audio.resample(*audio.read_wav(path))
  if np.sqrt(np.mean(wave**2)) < _MIN_RMS:
    raise errors.UserError(f'{path} is silent: replace it')
  if len(wave) < LENGTH:
    wave = np.tile(wave, math.ceil(LENGTH / len(wave)))
  windows = [wave[i : i + LENGTH] for i in range(0, len(wave) - LENGTH + 1, LENGTH // 2)]
  levels = np.array([np.sqrt(np.mean(w**2)) for w in windows])
  loud = [w for w, level in zip(windows, levels) if level >= 0.3 * levels.max()]
  return functools.partial(_any_window, [_unit_rms(w) for w in loud])


def _any_window(windows, rng):
  return windows[rng.integers(len(windows))]
