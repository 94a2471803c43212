"""Videos of one's own: read in windows for the model, written again with the masks drawn in.

Everything streams. Picture and sound are demuxed by two readers of the same file, so that a file
whose sound lies far from its picture needs no more memory than any other.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.overlay import overlay

SAMPLE_RATE = 16000
_AAC_RATE = 48000
_TIME_BASE = Fraction(1, 60000)  # exact for 24, 25, 30, 60 and 30000/1001 frames a second
Window = tuple[np.ndarray, np.ndarray, int]


def read_windows(path: str | Path, seconds: int = 10) -> Iterator[Window]:
  """Cuts a video into windows of at most `seconds` seconds, at one frame a second.

  The frame of second t is the first one at or after t, as in the data sets (t counts from the first
  frame; the last frame stands in where none follows). A video has as many seconds as its length
  rounded, at least one. Memory holds one window, whatever the length of the video.

  Args:
    path: a video file with picture and sound, of any format the installed FFmpeg libraries read.
    seconds: length of a window.

  Yields:
    frames: uint8 [T, H, W, 3], RGB, upright (a phone's rotation mark is obeyed); T <= seconds.
    waveform: float32 [T * 16000], mono, the mean over the channels; zeros where the sound ends
      before the picture.
    start_second: second of the first frame.

  Raises:
    UserError: no such file, not a video, no picture or no sound, or damaged data.
  """
  path = Path(path)
  _check_streams(path)
  return _windows(path, seconds)


def write_overlay_video(
  out: str | Path,
  source: str | Path,
  masks_by_second: Iterable[np.ndarray],
  draw: Callable[[np.ndarray, np.ndarray], np.ndarray] = overlay,
) -> Path:
  """Writes a copy of a video with each second's mask drawn over all of its frames.

  H.264 if the installed FFmpeg libraries can write it, else MPEG-4 part 2; the sound becomes AAC at
  48 kHz. The file appears under its name only when complete. Masks are taken one by one as the
  video advances, so they may come from a generator that is still computing.

  Args:
    out: path of the MP4 file to write; its folder is made.
    source: the video, as for `read_windows`.
    masks_by_second: the mask of second 0, 1, ..., [h, w] of any size; the last one stays until the
      video ends.
    draw: (frame uint8 [H, W, 3], mask) -> uint8 [H, W, 3]; `overlay` or `overlay_binary`.

  Returns:
    out.

  Raises:
    UserError: as `read_windows`; or `out` is not named *.mp4, or is the source itself; or there is
      not a single mask.
  """
  out, source = Path(out), Path(source)
  if out.suffix.lower() != '.mp4':
    raise UserError(f'{out}: the video is written as MP4, so give it a name that ends in .mp4.')
  if out.resolve() == source.resolve():
    raise UserError(f'{out}: this is the source video itself, give the output another name.')
  _check_streams(source)
  out.parent.mkdir(parents=True, exist_ok=True)
  partial = out.with_name(f'.{out.stem}.partial.mp4')
  try:
    with av.open(str(partial), 'w', format='mp4', options={'movflags': 'faststart'}) as target:
      _write_streams(target, source, iter(masks_by_second), draw)
    partial.replace(out)
  finally:
    partial.unlink(missing_ok=True)
  return out


def _video_stream(container: av.container.InputContainer):
  """The first stream of moving pictures; the cover picture of a song is none. None if absent."""
  cover = av.stream.Disposition.attached_pic
  return next((s for s in container.streams.video if not s.disposition & cover), None)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[av.container.InputContainer]:
  """Opens a file for reading; whatever FFmpeg cannot do inside the block becomes a UserError."""
  if not path.is_file():
    raise UserError(f'{path}: there is no such file, check the path of the video.')
  try:
    with av.open(str(path)) as container:
      yield container
  except av.error.FFmpegError as error:
    raise UserError(
      f'{path}: cannot be read as a video ({error.strerror}), convert it or give another file.'
    ) from error


def _check_streams(path: Path) -> None:
  with _open(path) as container:
    if _video_stream(container) is None:
      raise UserError(f'{path}: has no picture, only sound; give a video file.')
    if not container.streams.audio:
      raise UserError(
        f'{path}: has no sound, but the model finds what sounds; give one with sound.'
      )


def _frames(path: Path) -> Iterator[tuple[float, float, av.VideoFrame]]:
  """All frames of the picture, as (seconds since the first frame, its length in seconds, frame)."""
  with _open(path) as container:
    stream = _video_stream(container)
    stream.thread_type = 'AUTO'
    length = float(1 / (stream.average_rate or 25))
    origin, time = None, -length
    for frame in container.decode(stream):
      if origin is None:
        origin = frame.time or 0.0
      time = time + length if frame.time is None else frame.time - origin
      yield time, length, frame
  if origin is None:
    raise UserError(f'{path}: not a single frame can be decoded, convert it or give another file.')


def _sound(path: Path, resampler: av.AudioResampler) -> Iterator[av.AudioFrame]:
  """The first sound stream through a resampler, to its very end."""
  with _open(path) as container:
    for frame in container.decode(container.streams.audio[0]):
      yield from resampler.resample(frame)
    # None flushes it; what comes back is [None] if there was nothing to resample.
    yield from filter(None, resampler.resample(None))


def _start_of_sound(path: Path) -> float:
  """Seconds by which the sound starts after the first frame (negative: before)."""
  with _open(path) as container:
    sound = next(container.decode(container.streams.audio[0]), None)
  with _open(path) as container:
    picture = next(container.decode(_video_stream(container)), None)
  if sound is None or sound.time is None or picture is None or picture.time is None:
    return 0.0
  return sound.time - picture.time


def _upright(frame: av.VideoFrame) -> np.ndarray:
  """The frame as a viewer shows it, uint8 [H, W, 3]."""
  return np.rot90(frame.to_ndarray(format='rgb24'), round(frame.rotation / 90) % 4)


def _one_frame_a_second(path: Path) -> Iterator[np.ndarray]:
  """The frame of each second, as `read_windows` defines it."""
  waiting = (
    None  # the latest second's frame, held back until the video is known to reach its middle
  )
  second = 0  # of the next frame to pick
  for time, length, frame in _frames(path):
    end = time + length
    while time >= second - 1e-6:
      if waiting is not None:
        yield waiting
      waiting = _upright(frame)
      second += 1
  duration = max(1, round(end))
  if second <= duration:
    yield waiting
  if second < duration:
    yield from [_upright(frame)] * (duration - second)


def _waveform(path: Path) -> Iterator[np.ndarray]:
  """The sound from the first frame on, as float32 pieces at 16 kHz, mono."""
  # Channels are averaged here: FFmpeg's own down-mix to mono of float samples is louder by sqrt(2).
  offset = round(_start_of_sound(path) * SAMPLE_RATE)
  if offset > 0:
    yield np.zeros(offset, np.float32)
  for frame in _sound(path, av.AudioResampler(format='fltp', rate=SAMPLE_RATE)):
    piece = frame.to_ndarray().mean(axis=0)
    skipped = min(max(-offset, 0), len(piece))
    offset += skipped
    yield piece[skipped:]


def _windows(path: Path, seconds: int) -> Iterator[Window]:
  pieces, buffer = _waveform(path), np.zeros(0, np.float32)
  pictures = _one_frame_a_second(path)
  for start in itertools.count(0, seconds):
    frames = list(itertools.islice(pictures, seconds))
    if not frames:
      return
    wanted = len(frames) * SAMPLE_RATE
    parts, have = [buffer], len(buffer)
    while have < wanted and (piece := next(pieces, None)) is not None:
      parts.append(piece)
      have += len(piece)
    waveform = np.concatenate(parts)
    waveform, buffer = waveform[:wanted], waveform[wanted:]
    yield np.stack(frames), np.pad(waveform, (0, wanted - len(waveform))), start


def _add_picture(target: av.container.OutputContainer, first: np.ndarray, rate: Fraction):
  """An output stream for frames like `first`, cut to even sides as the encoders demand."""
  names = [name for name in ('libx264', 'libopenh264', 'mpeg4') if name in av.codecs_available]
  stream = target.add_stream(names[0], rate=rate)
  height, width = first.shape[:2]
  stream.width, stream.height = width // 2 * 2, height // 2 * 2
  stream.pix_fmt = 'yuv420p'
  stream.codec_context.time_base = _TIME_BASE
  if names[0] == 'libx264':
    stream.options = {'crf': '20', 'preset': 'fast'}
  else:
    stream.bit_rate = max(1_000_000, 6 * width * height)
  return stream


def _write_streams(
  target: av.container.OutputContainer,
  source: Path,
  masks: Iterator[np.ndarray],
  draw: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> None:
  with _open(source) as container:
    rate = _video_stream(container).average_rate or Fraction(25)
    layout = 'mono' if container.streams.audio[0].channels == 1 else 'stereo'
  frames = _frames(source)
  first = next(frames)
  picture_stream = _add_picture(target, _upright(first[2]), rate)
  sound_stream = target.add_stream('aac', rate=_AAC_RATE, layout=layout)
  sound = _timed_sound(source, layout)
  next_sound = next(sound, None)

  mask, second, ticks = None, 0, -1
  for time, _, frame in itertools.chain([first], frames):
    while second <= time + 1e-6:
      mask = next(masks, mask)
      second += 1
    if mask is None:
      raise UserError(f'{source}: no mask was made for this video, nothing can be drawn.')
    # Sound goes in up to this frame, so that the writer has little to hold back.
    while next_sound is not None and next_sound.time <= time:
      target.mux(sound_stream.encode(next_sound))
      next_sound = next(sound, None)
    drawn = draw(_upright(frame), mask)[: picture_stream.height, : picture_stream.width]
    drawn = av.VideoFrame.from_ndarray(np.ascontiguousarray(drawn), format='rgb24')
    ticks = max(ticks + 1, round(time / _TIME_BASE))  # encoders want times that rise
    drawn.pts, drawn.time_base = ticks, _TIME_BASE
    target.mux(picture_stream.encode(drawn))
  target.mux(picture_stream.encode(None))
  while next_sound is not None:
    target.mux(sound_stream.encode(next_sound))
    next_sound = next(sound, None)
  target.mux(sound_stream.encode(None))


def _timed_sound(source: Path, layout: str) -> Iterator[av.AudioFrame]:
  """The sound for the encoder, its times counted from the first frame of the picture."""
  position = round(_start_of_sound(source) * _AAC_RATE)
  resampler = av.AudioResampler(format='fltp', layout=layout, rate=_AAC_RATE)
  for frame in _sound(source, resampler):
    frame.pts, frame.time_base = position, Fraction(1, _AAC_RATE)
    position += frame.samples
    if frame.pts >= 0:
      yield frame
