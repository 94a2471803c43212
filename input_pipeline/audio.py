"""Sound to VGGish log-mel examples: 0.96 s each, 96 steps of 10 ms by 64 mel bands."""

import functools
import io
import logging
import os

import numpy as np

from . import files
from .errors import UserError

SAMPLE_RATE = 16000  # Hz
EXAMPLE_FRAMES = 96  # STFT frames in an example, 0.96 s; examples do not overlap
MEL_BANDS = 64

_WINDOW_LENGTH = 400  # samples, 25 ms
_HOP = 160  # samples, 10 ms
_FFT_LENGTH = 512
_MEL_RANGE = (125.0, 7500.0)  # Hz
_LOG_OFFSET = 0.01
# What a header may claim, and what a clip may last, before the file is taken for a broken one: each
# bounds the memory that reading and resampling can ask for.
_RATES = (1000, 768000)  # Hz
_MAX_SECONDS = 3600
_MAX_BYTES = 2_000_000_000
_MAX_AMPLITUDE = 100.0  # float files overshoot 1 a little; integers stored as floats by thousands
_BLOCK_SAMPLES = 1 << 20  # samples of all channels read at once

_logger = logging.getLogger(__name__)


def parameters() -> dict[str, object]:
  """The numbers of `log_mel_examples`, for those who compute it elsewhere."""
  return {
    'sample_rate': SAMPLE_RATE,
    'window': _WINDOW_LENGTH,
    'hop': _HOP,
    'fft': _FFT_LENGTH,
    'mel_bands': MEL_BANDS,
    'mel_range': _MEL_RANGE,
    'log_offset': _LOG_OFFSET,
    'example_frames': EXAMPLE_FRAMES,
    'example_samples': samples_needed(1),
  }


def samples_needed(examples: int) -> int:
  """The fewest samples at 16 kHz that give this many examples (one or more)."""
  return (examples * EXAMPLE_FRAMES - 1) * _HOP + _WINDOW_LENGTH


def read_wav(path: str | os.PathLike) -> tuple[np.ndarray, int]:
  """Reads a sound file and averages its channels.

  Integer samples are divided by their full scale (16-bit PCM by 32768); float samples are taken as
  stored. What is read is what the file holds, whatever length its header claims.

  Returns:
    waveform float32 [n] in [-1, 1], n > 0, and its rate in Hz.

  Raises:
    UserError: the file is missing, empty, unreadable, without samples, has samples that are not
      finite or far outside [-1, 1], a rate outside 1 to 768 kHz, or lasts more than an hour.
  """
  import soundfile  # benchmarks of the models do without

  path = os.fspath(path)
  # Not by libsndfile, which does not tell a disk that fails from a broken file.
  data = files.read_file(
    path, _MAX_BYTES, 'the sound file', 'check the path, or extract it from the video again'
  )
  if not data:
    raise UserError(f'{path} has 0 bytes: extract the sound from the video again')
  try:
    blocks = []
    with soundfile.SoundFile(io.BytesIO(data)) as file:
      rate = file.samplerate
      if not _RATES[0] <= rate <= _RATES[1]:
        raise UserError(
          f'{path} has a header with a rate of {rate} Hz, outside {_RATES[0]} to {_RATES[1]}: '
          'write the file anew'
        )
      length = 0
      while True:
        # Block by block: the length in a header is a claim, and may be terabytes.
        block = file.read(_BLOCK_SAMPLES // file.channels, dtype='float32', always_2d=True)
        if len(block) == 0:
          break
        _check_samples(path, block, length)
        blocks.append(block.mean(axis=1))
        length += len(block)
        if length > _MAX_SECONDS * rate:
          raise UserError(f'{path} lasts more than {_MAX_SECONDS} s: cut it into clips')
  except soundfile.SoundFileRuntimeError as error:
    # The error itself tells an address in memory, so that reports could not be compared.
    reason = getattr(error, 'error_string', error)
    raise UserError(
      f'{path} is not a readable sound file ({reason}): extract it from the video again as 16-bit '
      'WAV'
    ) from error
  if length == 0:
    raise UserError(f'{path} holds 0 samples: extract the sound from the video again')
  return np.concatenate(blocks), rate


def _check_samples(path: str, block: np.ndarray, first: int) -> None:
  # Written so that NaN, for which every comparison is false, fails too.
  good = np.abs(block) <= _MAX_AMPLITUDE
  if not good.all():
    row, channel = np.argwhere(~good)[0]
    raise UserError(
      f'{path}: sample {first + row} is {block[row, channel]:g}, not a value in [-1, 1]: write the '
      'file anew, as 16-bit WAV for example'
    )


def resample(waveform: np.ndarray, rate: int) -> np.ndarray:
  """Resamples float32 [n] at `rate` Hz to float32 [ceil(n * 16000 / rate)] at 16 kHz.

  The release uses resampy's kaiser_best; this is soxr's high quality, whose log-mel differs by less
  than 0.02 on average.
  """
  if rate == SAMPLE_RATE:
    return waveform
  import librosa  # takes seconds, in each loader process, and most clips are at 16 kHz already

  return librosa.resample(waveform, orig_sr=rate, target_sr=SAMPLE_RATE, res_type='soxr_hq')


def _mel_filters() -> np.ndarray:
  # Triangles linear in mel; librosa's are linear in hertz between mel-spaced edges.
  def mel(hertz):
    return 1127.0 * np.log1p(hertz / 700.0)

  bins = mel(np.linspace(0.0, SAMPLE_RATE / 2, _FFT_LENGTH // 2 + 1))[:, None]
  edges = np.linspace(mel(_MEL_RANGE[0]), mel(_MEL_RANGE[1]), MEL_BANDS + 2)
  lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
  rise = (bins - lower) / (centre - lower)
  fall = (upper - bins) / (upper - centre)
  filters = np.maximum(0.0, np.minimum(rise, fall))
  filters[0] = 0.0  # the DC bin
  return filters


MEL_FILTERS = _mel_filters()  # float64 [257, 64]
# The periodic Hann window: numpy's own is the symmetric one.
WINDOW = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW_LENGTH) / _WINDOW_LENGTH)


def log_mel_examples(waveform: np.ndarray) -> np.ndarray:
  """VGGish's log-mel examples of a waveform at 16 kHz.

  ln(mel + 0.01) of magnitude spectra (Hann window of 25 ms every 10 ms), cut into runs of 96 with
  what is left over dropped. Computed in float64, which makes it equal to the released code's.

  Args:
    waveform: float32 [n] at 16 kHz.

  Returns:
    float32 [E, 96, 64]; E is 0 under 0.975 s, 5 for 5 s, 10 for 10 s.
  """
  stft_frames = max(0, (len(waveform) - _WINDOW_LENGTH) // _HOP + 1)
  examples = np.empty((stft_frames // EXAMPLE_FRAMES, EXAMPLE_FRAMES, MEL_BANDS), np.float32)
  for i, example in enumerate(examples):
    start = i * EXAMPLE_FRAMES * _HOP
    stretch = waveform[start : start + samples_needed(1)]
    frames = np.lib.stride_tricks.sliding_window_view(stretch, _WINDOW_LENGTH)[::_HOP]
    magnitude = np.abs(np.fft.rfft(frames * WINDOW, _FFT_LENGTH))
    example[:] = log_magnitudes(magnitude @ MEL_FILTERS)
  return examples


def log_magnitudes(magnitudes: np.ndarray) -> np.ndarray:
  """Log-mel of mel magnitudes."""
  return np.log(magnitudes + _LOG_OFFSET)


def magnitudes(log_mel: np.ndarray) -> np.ndarray:
  """Mel magnitudes of log-mel; those of two sounds together are about the sum."""
  return np.exp(log_mel) - _LOG_OFFSET


def fit_examples(examples: np.ndarray, frames: int) -> tuple[np.ndarray, int]:
  """One example for each video frame: cuts what is too many, repeats the last where too few.

  Args:
    examples: float32 [E, 96, 64], E > 0.
    frames: the number of video frames.

  Returns:
    float32 [frames, 96, 64], and how many of them are repetitions.
  """
  last = len(examples) - 1
  return examples[np.minimum(np.arange(frames), last)], max(0, frames - len(examples))


def clip_log_mel(path: str | os.PathLike, frames: int) -> np.ndarray:
  """Log-mel examples of a sound file, float32 [frames, 96, 64], one for each second of video.

  A sound that is too short repeats its last example, which is logged once for each file.

  Raises:
    UserError: the file cannot be read (see `read_wav`), or is too short for a single example.
  """
  waveform = resample(*read_wav(path))
  if len(waveform) < samples_needed(1):
    raise UserError(
      f'{os.fspath(path)} lasts {len(waveform) / SAMPLE_RATE:.4f} s, and one example needs '
      f'{samples_needed(1) / SAMPLE_RATE} s: extract the whole clip or leave it out'
    )
  examples = log_mel_examples(waveform[: samples_needed(frames)])
  fitted, missing = fit_examples(examples, frames)
  if missing:
    _report_short(os.fspath(path), len(examples), frames)
  return fitted


@functools.cache  # once a file, however many epochs read it
def _report_short(path: str, examples: int, frames: int) -> None:
  _logger.warning(
    '%s: the sound gives %d of %d examples; the last one is repeated.', path, examples, frames
  )
