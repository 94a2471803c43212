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

from aavs_jax.console import say
from aavs_jax.input_pipeline import files
from aavs_jax.input_pipeline.audio import SAMPLE_RATE
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.media.overlay import overlay
from aavs_jax.media.timeline import Timeline

_AAC_RATE = 48000
_TIME_BASE = Fraction(1, 60000)  # exact for 24, 25, 30, 60 and 30000/1001 frames a second
_EPSILON = 1.5e-3  # seconds; many formats round their time stamps to milliseconds
_SHORT = 0.1  # seconds; what is left of a picture and shorter is not drawn anew
Window = tuple[Sequence[np.ndarray], np.ndarray, int]


def read_windows(path: str | Path, seconds: int = 10) -> Iterator[Window]:
  """Cuts a video into windows of at most `seconds` seconds, at one frame a second.

  The frame of second t is the one on the screen at t, counted from the first frame; the waveform is
  what is heard from t on, with silence where there is no sound. Both are placed by their own time
  stamps; pieces whose clocks begin anew or leap are joined. A video lasts until its picture and
  its sound have both ended, the last frame staying on, and has as many seconds as that length
  rounded, at least one. Memory holds one window, whatever the length of the video.

  What had to be left out or assumed is said in a line when the last window has been read.

  Args:
    path: a video file with picture and sound, of any format the installed FFmpeg libraries read.
    seconds: length of a window.

  Yields:
    frames: T <= seconds times uint8 [H, W, 3], RGB, upright (a phone's rotation mark is obeyed);
      the size may change within a video.
    waveform: float32 [T * 16000], mono, the mean over the channels.
    start_second: second of the first frame.

  Raises:
    UserError: no such file, not a video, no picture or no sound, or none that can be decoded.
  """
  return _windows(Timeline(path), seconds)


def write_overlay_video(
  out: str | Path,
  source: str | Path,
  masks_by_second: Iterable[np.ndarray],
  draw: Callable[[np.ndarray, np.ndarray], np.ndarray] = overlay,
) -> Path:
  """Writes a copy of a video with each second's mask drawn over all of its frames.

  It plays as the source does, with the same time line as `read_windows`; a frame that stays for
  long is repeated, as the masks change. All frames get the size of the first, and its shape of a
  pixel.

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
    raise UserError(f'{out} does not end in .mp4, and the video is written as MP4: name it so')
  if out.resolve() == source.resolve():
    raise UserError(f'{out} is the source video itself: give the output another name')
  timeline = Timeline(source)
  with (
    files.writing(out) as working,
    av.open(str(working), 'w', format='mp4', options={'movflags': 'faststart'}) as target,
  ):
    _write_streams(target, timeline, iter(masks_by_second), draw)
  return out


def _windows(timeline: Timeline, seconds: int) -> Iterator[Window]:
  pictures = _one_frame_a_second(timeline)
  pieces, buffer = timeline.sound(SAMPLE_RATE, 'mono'), np.zeros(0, np.float32)
  for start in itertools.count(0, seconds):
    frames = list(itertools.islice(pictures, seconds))
    if not frames:
      break
    wanted = len(frames) * SAMPLE_RATE
    parts, have = [buffer], len(buffer)
    while have < wanted and (piece := next(pieces, None)) is not None:
      parts.append(piece[0])
      have += len(piece[0])
    waveform = np.concatenate(parts)
    waveform, buffer = waveform[:wanted], waveform[wanted:]
    yield frames, np.pad(waveform, (0, wanted - len(waveform))), start
  for remark in timeline.remarks():
    say(f'{timeline.path}: {remark}')


def _one_frame_a_second(timeline: Timeline) -> Iterator[np.ndarray]:
  """The frame of each second, as `read_windows` defines it."""
  second, image = 0, None
  for _, end, frame in timeline.pictures():
    while True:
      # Held back until the video is known to reach the middle of the second.
      if image is None and second < end - _EPSILON:
        image = timeline.upright(frame)
      if image is None or end < second + 0.5:
        break
      yield image
      second, image = second + 1, None
  if second == 0:
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
  if names[0] == 'libx264':
    # In MP4 with B-frames the length of the last frame is lost.
    stream.options = {'crf': '20', 'preset': 'fast', 'bf': '0'}
  else:
    stream.bit_rate = max(1_000_000, 6 * width * height)
  return stream


def _repeated(timeline: Timeline) -> Iterator[tuple[float, np.ndarray]]:
  """Every picture as (seconds, image), again at each full second it stays, and at its end."""
  for start, end, frame in timeline.pictures():
    image = timeline.upright(frame)
    times = [start, *range(math.floor(start + _EPSILON) + 1, math.ceil(end - _SHORT))]
    yield from ((time, image) for time in times)
  # So that the file is as long as the video: its end is that of a usual frame.
  if (last := end - float(1 / max(timeline.rate, 1))) > times[-1] + _SHORT:
    yield last, image


def _write_streams(
  target: av.container.OutputContainer,
  timeline: Timeline,
  masks: Iterator[np.ndarray],
  draw: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> None:
  images = _repeated(timeline)
  first = next(images)
  height, width = first[1].shape[:2]
  picture_stream = _add_picture(target, timeline, first[1])
  layout = 'mono' if timeline.channels == 1 else 'stereo'
  sound_stream = target.add_stream('aac', rate=_AAC_RATE, layout=layout)
  sound = _sound_frames(timeline, layout)
  next_sound = next(sound, None)

  mask, second = None, 0
  for time, image in itertools.chain([first], images):
    while second <= time + _EPSILON:
      mask = next(masks, mask)
      second += 1
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
