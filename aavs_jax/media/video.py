"""Videos of one's own: read in windows for the model, written again with the masks drawn in.

Everything streams, on the one time line of `timeline`: second t of the answer has the picture that
is on the screen at t, and the sound that is heard from t on, as in a player.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from aavs_jax.console import say
from aavs_jax.input_pipeline import files
from aavs_jax.input_pipeline.audio import SAMPLE_RATE, samples_needed
from aavs_jax.input_pipeline.errors import UserError, of_disk
from aavs_jax.media.overlay import overlay
from aavs_jax.media.timeline import Timeline

_AAC_RATE = 48000
_TIME_BASE = Fraction(1, 60000)  # exact for 24, 25, 30, 60 and 30000/1001 frames a second
_EPSILON = 1.5e-3  # seconds; many formats round their time stamps to milliseconds
_SHORT = 0.1  # seconds; what is left of a picture and shorter is not drawn anew
Window = tuple[Sequence[np.ndarray], np.ndarray, int]


def read_windows(path: str | Path, count: int = 10, every: float = 1) -> Iterator[Window]:
  """Cuts a video into windows of at most `count` frames, one every second or so many seconds.

  Frame i is the one on the screen at i * every, counted from the first frame; the waveform is
  what is heard from then on, with silence where there is no sound. Both are placed by their own
  time stamps; pieces whose clocks begin anew or leap are joined. A video lasts until its picture
  and its sound have both ended, the last frame staying on, and gives as many frames as `every` goes
  into that length, rounded, at least one. Memory holds one window, whatever the length of the
  video.

  What had to be left out or assumed is said in a line when the last window has been read.

  Args:
    path: a video file with picture and sound, of any format the installed FFmpeg libraries read.
    count: frames of a window.
    every: seconds, in whole milliseconds.

  Yields:
    frames: T <= count times uint8 [H, W, 3], RGB, upright (a phone's rotation mark is obeyed);
      the size may change within a video.
    waveform: float32 [T * every * 16000], mono, the mean over the channels; with more behind it
      where the last frame needs it for an example of sound, which it is long enough for.
    start: number of the first frame.

  Raises:
    UserError: no such file, not a video, no picture or no sound, or none that can be decoded.
  """
  return _windows(Timeline(path), count, every)


def write_overlay_video(
  out: str | Path,
  source: str | Path,
  masks: Iterable[np.ndarray],
  draw: Callable[[np.ndarray, np.ndarray], np.ndarray] = overlay,
  every: float = 1,
) -> Path:
  """Writes a copy of a video with the mask of each second, or of `every`, drawn over its frames.

  It plays as the source does, with the same time line as `read_windows`; a frame that stays for
  long is repeated, as the masks change. All frames get the size of the first, and its shape of a
  pixel.

  H.264 if the installed FFmpeg libraries can write it, else MPEG-4 part 2; the sound becomes AAC at
  48 kHz. The file appears under its name only when complete. Masks are taken one by one as the
  video advances, so they may come from a generator that is still computing.

  Args:
    out: path of the MP4 file to write; its folder is made.
    source: the video, as for `read_windows`.
    masks: of the frames of `read_windows`, [h, w] of any size; the last one stays until the video
      ends.
    draw: (frame uint8 [H, W, 3], mask) -> uint8 [H, W, 3]; `overlay` or `overlay_binary`.
    every: as for `read_windows`.

  Returns:
    out.

  Raises:
    UserError: as `read_windows`; or `out` is not named *.mp4, or is the source itself; or there is
      not a single mask.
  """
  out, source = Path(out), Path(source)
  if out.suffix.lower() != '.mp4':
    raise UserError(f'{out} does not end in .mp4, and the video is written as MP4: name it so')
  if out.resolve() == source.resolve():
    raise UserError(f'{out} is the source video itself: give the output another name')
  timeline = Timeline(source)
  try:
    with (
      files.writing(out) as working,
      av.open(str(working), 'w', format='mp4', options={'movflags': 'faststart'}) as target,
    ):
      _write_streams(target, timeline, iter(masks), draw, every)
  except av.error.FFmpegError as error:
    if of_disk(error):
      raise
    raise UserError(
      f'{source} cannot be written again with masks drawn in ({error.strerror}): convert it'
    ) from error
  return out


def _windows(timeline: Timeline, count: int, every: float) -> Iterator[Window]:
  step, example = round(every * SAMPLE_RATE), samples_needed(1)
  pictures = _pictures_at(timeline, every)
  pieces, buffer = timeline.sound(SAMPLE_RATE, 'mono'), np.zeros(0, np.float32)
  for start in itertools.count(0, count):
    frames = list(itertools.islice(pictures, count))
    if not frames:
      break
    own = len(frames) * step
    wanted = max(own, own - step + example)
    parts, have = [buffer], len(buffer)
    while have < wanted and (piece := next(pieces, None)) is not None:
      parts.append(piece[0])
      have += len(piece[0])
    waveform = np.concatenate(parts)
    waveform, buffer = waveform[:wanted], waveform[own:]
    yield frames, np.pad(waveform, (0, max(0, max(own, example) - len(waveform)))), start
  for remark in timeline.remarks():
    say(f'{timeline.path}: {remark}')


def _pictures_at(timeline: Timeline, every: float) -> Iterator[np.ndarray]:
  """The frame at each multiple of `every`, as `read_windows` defines it."""
  number, image = 0, None
  for _, end, frame in timeline.pictures():
    while True:
      # Held back until the video is known to reach the middle between it and the next.
      if image is None and number * every < end - _EPSILON:
        image = timeline.upright(frame)
      if image is None or end < (number + 0.5) * every:
        break
      yield image
      number, image = number + 1, None
  if number == 0:
    yield image


def _add_picture(target: av.container.OutputContainer, timeline: Timeline, first: np.ndarray):
  """An output stream for frames like `first`, cut to even sides as the encoders demand."""
  names = [name for name in ('libx264', 'libopenh264', 'mpeg4') if name in av.codecs_available]
  stream = target.add_stream(names[0], rate=max(timeline.rate, 1))
  height, width = first.shape[:2]
  stream.width, stream.height = width // 2 * 2, height // 2 * 2
  stream.pix_fmt = 'yuv420p'
  stream.codec_context.time_base = _TIME_BASE
  stream.codec_context.sample_aspect_ratio = timeline.pixel_aspect
  # What FFmpeg makes of RGB; without a word on it players guess, by the size.
  stream.codec_context.colorspace = Colorspace.ITU601
  stream.codec_context.color_range = ColorRange.MPEG
  if names[0] == 'libx264':
    # In MP4 with B-frames the length of the last frame is lost.
    stream.options = {'crf': '20', 'preset': 'fast', 'bf': '0'}
  else:
    stream.bit_rate = max(1_000_000, 6 * width * height)
  return stream


def _repeated(timeline: Timeline, every: float) -> Iterator[tuple[float, np.ndarray]]:
  """Every picture as (seconds, image), again where a mask begins while it stays, and at its end."""
  for start, end, frame in timeline.pictures():
    image = timeline.upright(frame)
    first, stop = math.floor((start + _EPSILON) / every) + 1, math.ceil((end - _SHORT) / every)
    times = [start, *(number * every for number in range(first, stop))]
    yield from ((time, image) for time in times)
  # So that the file is as long as the video: its end is that of a usual frame.
  if (last := end - float(1 / max(timeline.rate, 1))) > times[-1] + _SHORT:
    yield last, image


def _write_streams(
  target: av.container.OutputContainer,
  timeline: Timeline,
  masks: Iterator[np.ndarray],
  draw: Callable[[np.ndarray, np.ndarray], np.ndarray],
  every: float,
) -> None:
  images = _repeated(timeline, every)
  first = next(images)
  height, width = first[1].shape[:2]
  picture_stream = _add_picture(target, timeline, first[1])
  layout = 'mono' if timeline.is_mono else 'stereo'
  sound_stream = target.add_stream('aac', rate=_AAC_RATE, layout=layout)
  sound = _sound_frames(timeline, layout)
  next_sound = next(sound, None)

  mask, number = None, 0
  for time, image in itertools.chain([first], images):
    while number * every <= time + _EPSILON:
      mask = next(masks, mask)
      number += 1
    if mask is None:
      raise UserError(
        f'{timeline.path} is a video for which no mask was made: nothing can be drawn'
      )
    # Sound goes in up to this frame, so that the writer has little to hold back.
    while next_sound is not None and next_sound.time <= time:
      target.mux(sound_stream.encode(next_sound))
      next_sound = next(sound, None)
    if image.shape[:2] != (height, width):
      image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    drawn = draw(image, mask)[: picture_stream.height, : picture_stream.width]
    drawn = av.VideoFrame.from_ndarray(np.ascontiguousarray(drawn), format='rgb24')
    drawn.pts, drawn.time_base = round(time / _TIME_BASE), _TIME_BASE
    target.mux(picture_stream.encode(drawn))
  target.mux(picture_stream.encode(None))
  while next_sound is not None:
    target.mux(sound_stream.encode(next_sound))
    next_sound = next(sound, None)
  target.mux(sound_stream.encode(None))


def _sound_frames(timeline: Timeline, layout: str) -> Iterator[av.AudioFrame]:
  """The sound for the encoder."""
  position = 0
  for piece in timeline.sound(_AAC_RATE, layout):
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), format='fltp', layout=layout)
    frame.sample_rate, frame.time_base = _AAC_RATE, Fraction(1, _AAC_RATE)
    frame.pts = position
    position += frame.samples
    yield frame
