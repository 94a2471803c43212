"""One time line for the picture and the sound of a video file, as a player lays them out.

Both are placed by their own time stamps, counted from the first picture. Each of the two generators
demuxes the file by itself, so that a file whose sound lies far from its picture needs no more
memory than any other; as both run the same clock over the same packets, they stay in step.
"""

import collections
import contextlib
import itertools
import operator
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from aavs_jax.input_pipeline.errors import UserError

# In formats whose clock may begin anew (MPEG-TS, Ogg) a stretch in which nothing is shown or heard
# for longer is a leap of the clock; in the others it is a long still picture. Both are ffplay's.
_LEAP_SECONDS, _STILL_SECONDS = 10.0, 3600.0
# FFmpeg's bounds for what is no fault of a clock: decoding times that go back by less, and sound
# that is off its time stamps by less, which would be torn if it followed every one of them.
_BACK_SECONDS = _JITTER_SECONDS = 0.1
_APART_SECONDS = 1.0  # by so much at most the streams of a piece end one before the other
_SHORTEST_SECONDS = 1e-4  # a picture that stays for less is not seen
_NOTHING_HEARD = 'has sound of which nothing can be decoded: convert it'
# PyAV 19 takes tags that are not UTF-8 as they are; those before must be told to.
_TAGS = {} if int(av.__version__.split('.')[0]) >= 19 else {'metadata_errors': 'replace'}


@contextlib.contextmanager
def _open(path: Path) -> Iterator[av.container.InputContainer]:
  """Opens a file for reading; whatever FFmpeg cannot do inside the block becomes a UserError."""
  if not path.is_file():
    raise UserError(f'{path} does not exist: check the path of the video')
  try:
    # FFmpeg takes what stands before a colon for a protocol, but not in an absolute path.
    with av.open(str(path.absolute()), **_TAGS) as container:
      yield container
  except av.error.FFmpegError as error:
    raise UserError(
      f'{path} cannot be read as a video ({error.strerror}): convert it or give another file'
    ) from error


def claimed_seconds(path: Path) -> float:
  """How long a video lasts by its own account, which may be wrong; 0 if it has none."""
  with _open(path) as container:
    return (container.duration or 0) / av.time_base


class Timeline:
  """The picture and the sound of a file on one time line, in seconds from the first picture.

  Attributes:
    path: the file.
    rate: pictures a second on average; a guess where the file has none.
    is_mono: whether stereo cannot be made of its sound.
    pixel_aspect: width of a pixel by its height, of pictures that are upright.

  Raises:
    UserError: no such file, not a video, no picture or no sound, none that can be decoded.
  """

  def __init__(self, path: str | Path):
    self.path = Path(path)
    with _open(self.path) as container:
      picture, sound = _choose_streams(self.path, container)
      discontinuous = container.format.flags & av.format.Flags.ts_discont.value
      self._leap = _LEAP_SECONDS if discontinuous else _STILL_SECONDS
      self._picture, self._sound = picture.index, sound.index
      self.rate = picture.average_rate or Fraction(25)
      self.is_mono = sound.codec_context.channels == 1 or not _mixes(sound.codec_context)
      aspect = picture.sample_aspect_ratio or Fraction(1)
    self._damaged = collections.Counter()  # packets, by the index of the stream
    self._jumps, self._wrong_times, self._is_silent = 0, 0, False
    first = next(self._decoded(self._picture, self._clock()), None)
    if first is None:
      raise UserError(
        f'{path} has not a single frame that can be decoded: convert it or give another file'
      )
    self._damaged.clear()
    self._origin = _time(first) or 0.0
    self._orientations = {}  # by angle
    self.pixel_aspect = 1 / aspect if self._orientation(first)[0] else aspect

  def pictures(self) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """All pictures as (start, end, frame), on the screen from start to end, where the next starts.

    The first starts at 0. The last one stays until picture and sound have both ended.
    """
    clock, length = self._clock(), float(1 / self.rate)
    start, shown = 0.0, None
    for frame in self._decoded(self._picture, clock):
      time = _time(frame)
      # Without time stamps pictures follow at the average rate.
      time = start + length if time is None else time - self._origin
      if shown is not None and time > start + _SHORTEST_SECONDS:
        yield start, time, shown
        start = time
      shown = frame
    self._jumps, self._wrong_times = clock.jumps, clock.wrong
    yield start, max(clock.end - self._origin, start + _SHORTEST_SECONDS), shown

  def upright(self, frame: av.VideoFrame) -> np.ndarray:
    """One of its frames as a viewer shows it, uint8 [H, W, 3], RGB."""
    image = frame.to_ndarray(format='rgb24')
    swap, down, across = self._orientation(frame)
    return (image.swapaxes(0, 1) if swap else image)[::down, ::across]

  def sound(self, rate: int, layout: str) -> Iterator[np.ndarray]:
    """The sound from second 0 on, in pieces that follow one another without gap or overlap.

    Args:
      rate: samples a second.
      layout: 'mono', the mean over the channels, or 'stereo'.

    Yields:
      float32 [channels, n], n > 0. Silence where the file has no sound; ends where its sound ends.
    """
    position = 0
    for start, piece in self._resampled(rate, layout):
      for gap in range(position, start, rate):  # a long one in pieces, as memory is to stay small
        yield np.zeros((len(piece), min(rate, start - gap)), np.float32)
      piece = piece[:, max(0, position - start) :]
      position = max(position, start) + piece.shape[1]
      if piece.size:
        yield piece

  def remarks(self) -> list[str]:
    """What a user should know of the file, after both generators have been read to their ends."""
    found = []
    for index, what in ((self._picture, 'picture'), (self._sound, 'sound')):
      if count := self._damaged[index]:
        found.append(f'damaged packets of the {what} that are left out: {count}')
    if self._jumps:
      found.append(f'pieces joined where its time stamps begin anew or leap: {self._jumps}')
    if self._wrong_times:
      found.append(f'time stamps that cannot be, and are not followed: {self._wrong_times}')
    if self._is_silent:
      found.append('its sound track is empty, so all is silent')
    return found

  def _orientation(self, frame: av.VideoFrame) -> tuple[bool, int, int]:
    # Asked for once an angle: PyAV ties a frame whose side data are asked for into a cycle, and
    # its memory would not be free before Python looks for cycles.
    angle = frame.rotation
    if angle not in self._orientations:
      self._orientations[angle] = _orientation(frame)
    return self._orientations[angle]

  def _clock(self) -> '_Clock':
    return _Clock(self._leap, {self._picture: float(1 / self.rate)})

  def _decoded(self, index: int, clock: '_Clock') -> Iterator[av.frame.Frame]:
    """All frames of a stream, their time stamps set right by the clock."""
    count = 0
    with _open(self.path) as container:
      streams = [container.streams[i] for i in (self._picture, self._sound)]
      streams[0].thread_type = 'AUTO'
      # The clock sees the packets of both, decoded or not.
      for packet in _packets(container, streams):
        clock.correct(packet)
        if packet.stream.index != index:  # its own is 0 of an empty packet, at the end
          continue
        try:
          frames = packet.decode()
        except av.error.EOFError:  # an empty packet has come before
          continue
        except av.error.FFmpegError:
          self._damaged[index] += 1
          continue
        count += len(frames)
        yield from frames
    if index == self._sound and not count:
      if self._damaged[index]:
        raise UserError(f'{self.path} {_NOTHING_HEARD}')
      self._is_silent = True

  def _runs(self) -> Iterator[tuple[tuple, av.AudioFrame]]:
    """The frames of the sound, each with its run: (where it starts, format, layout, rate).

    In a run all frames have one format and follow one another.
    """
    due, run = 0.0, None
    for frame in self._decoded(self._sound, self._clock()):
      time = _time(frame)
      time = due if time is None else time - self._origin
      kind = (frame.format.name, frame.layout.name, frame.sample_rate)
      if run is None or run[1:] != kind or abs(time - due) > _JITTER_SECONDS:
        due, run = time, (time, *kind)
      yield run, frame
      due += frame.samples / frame.sample_rate

  def _resampled(self, rate: int, layout: str) -> Iterator[tuple[int, np.ndarray]]:
    """The sound as (number of its first sample on the time line, float32 [channels, n])."""
    # Channels are averaged here: FFmpeg's own down-mix to mono of float samples is louder by
    # sqrt(2).
    mono, heard, lost = layout == 'mono', 0, 0
    for (start, *_), frames in itertools.groupby(self._runs(), operator.itemgetter(0)):
      # Interleaved, as PyAV crashes on eight planes, which 7.1 sound has. Where FFmpeg adds up
      # channels for stereo, it keeps sums of integers from being too loud, and no others.
      kind, loudest = ('flt', 1) if mono else ('s16', 2**15)
      resampler = av.AudioResampler(kind, layout=None if mono else layout, rate=rate)
      position = round(start * rate)
      for frame in itertools.chain((frame for _, frame in frames), [None]):  # None flushes
        try:
          # What comes back is [None] if there is nothing.
          pieces = [*filter(None, resampler.resample(frame))]
        except av.error.FFmpegError:  # as of 93 channels, by one wrong byte
          lost += 1
          continue
        heard += len(pieces)
        for resampled in pieces:
          piece = resampled.to_ndarray().reshape(-1, resampled.layout.nb_channels).T
          piece = piece.astype(np.float32) / loudest
          yield position, piece.mean(axis=0, keepdims=True) if mono else piece
          position += piece.shape[1]
    self._damaged[self._sound] += lost
    if lost and not heard:
      raise UserError(f'{self.path} {_NOTHING_HEARD}')


class _Clock:
  """Lets time stamps run on where they begin anew or leap, for all streams of a file alike.

  Pieces that were joined (segments of a recorder, `cat` of MPEG-TS) have a clock each. As in ffplay
  and ffmpeg a packet whose decoding time goes back, or lies far beyond all that was read so far,
  begins another piece, which is moved to the end of what was read. It is moved as a whole, so that
  its sound stays with its picture; for stragglers of the piece before, the old clock is kept.

  Attributes:
    jumps: number of pieces after the first.
    wrong: number of times and lengths that are further off than a clock leaps.
  """

  def __init__(self, leap: float, lengths: dict[int, float]):
    """leap: seconds; lengths: seconds of the packets that do not tell, by the stream's index."""
    self._leap, self._lengths = leap, lengths
    self._offset, self._joint = 0.0, 0.0  # of the newest piece, and where it begins; seconds
    # By the stream's index, in seconds of the corrected clock.
    self._own = {}  # offset of the piece that it is in
    self._time, self._due = {}, {}  # decoding time of the last packet, and of the next
    self._last = {}  # the latest packet's start, and the length of the one read last
    self.jumps = self.wrong = 0

  @property
  def end(self) -> float:
    """Where the last packet so far ends, in seconds of the corrected clock."""
    # In MP4 the last picture's length is that of the packet read last, whichever is shown last.
    return max((sum(last) for last in self._last.values()), default=-float('inf'))

  def correct(self, packet: av.Packet) -> None:
    """Moves the time stamps of the next packet, of whichever stream, to the corrected clock."""
    index, unit = packet.stream_index, float(packet.time_base)
    length = packet.duration * unit if packet.duration else self._lengths.get(index, 0.0)
    if length > self._leap:
      length = self._lengths.get(index, 0.0)
      self.wrong += 1
    if packet.dts is not None and packet.pts is not None:
      if abs(packet.pts - packet.dts) * unit > self._leap:
        packet.pts = packet.dts
        self.wrong += 1
    offset = self._own.get(index, self._offset)
    if packet.dts is not None:
      offset = self._own[index] = self._piece(index, packet.dts * unit)
      packet.dts += round(offset / unit)
      self._time[index] = packet.dts * unit
      self._due[index] = self._time[index] + length
    if packet.pts is not None:
      packet.pts += round(offset / unit)
    stamp = packet.dts if packet.pts is None else packet.pts
    if stamp is not None:
      start, _ = self._last.get(index, (stamp * unit, length))
      self._last[index] = max(start, stamp * unit), length

  def _piece(self, index: int, time: float) -> float:
    """The offset of the piece to which a packet of this decoding time belongs."""
    furthest = max(self._due.values(), default=time)
    due, own = self._due.get(index, furthest), self._own.get(index, self._offset)
    earliest = self._time.get(index, -float('inf')) - _BACK_SECONDS
    # A straggler goes on with its stream, until that must have come to the joint.
    if earliest <= time + own <= min(due + _BACK_SECONDS, self._joint + _APART_SECONDS):
      return own
    if not earliest <= time + self._offset <= furthest + self._leap:
      # As ffmpeg does, at the end of its own stream, so that no picture is lost or held back.
      self._joint = max(due, furthest - _APART_SECONDS)
      self._offset = self._joint - time
      self.jumps += 1
    return self._offset


def _packets(
  container: av.container.InputContainer, streams: Sequence[av.stream.Stream]
) -> Iterator[av.Packet]:
  """All packets of the streams, and an empty one of each at the end."""
  try:
    yield from container.demux(streams)
  except IndexError:  # PyAV, at the end of a file to which a stream came in the middle
    for stream in streams:
      packet = av.Packet()
      packet.stream, packet.time_base = stream, stream.time_base
      yield packet


def _mixes(sound: av.AudioCodecContext) -> bool:
  """Whether FFmpeg makes stereo of its channels: of ambisonic ones not, nor of many unnamed."""
  frame = av.AudioFrame(format='s16', layout=sound.layout, samples=16)
  frame.sample_rate = 16000
  try:
    av.AudioResampler('s16', layout='stereo', rate=16000).resample(frame)
    return True
  except (av.error.FFmpegError, ValueError):
    return False


def _choose_streams(path: Path, container: av.container.InputContainer) -> list:
  """The streams of picture and sound that a player takes, if they can be decoded."""
  cover, default = av.stream.Disposition.attached_pic, av.stream.Disposition.default
  chosen = []
  for what, streams, advice in (
    ('picture', container.streams.video, 'give a video file'),
    ('sound', container.streams.audio, 'the model finds what sounds, give one with sound'),
  ):
    present = [s for s in streams if not s.disposition & cover]  # the cover of a song is no video
    if not present:
      raise UserError(f'{path} has no {what}: {advice}')
    # Some versions of PyAV crash where a stream without a decoder is decoded.
    decodable = [s for s in present if s.codec_context is not None]
    if not decodable:
      raise UserError(f'{path} has {what} of a codec that is not known here: convert it')
    chosen.append(next((s for s in decodable if s.disposition & default), decodable[0]))
  return chosen


def _time(frame: av.frame.Frame) -> float | None:
  """Where a frame stands on the corrected clock; AVI has decoding times alone."""
  stamp = frame.dts if frame.pts is None else frame.pts
  return None if stamp is None else float(stamp * frame.time_base)


def _orientation(frame: av.VideoFrame) -> tuple[bool, int, int]:
  """How a picture is to be turned: swap rows and columns, then the steps down and across.

  A step of -1 turns that side round. Together they are all eight orientations, mirrored or not.
  """
  matrix = frame.side_data.get('DISPLAYMATRIX')
  if matrix is None:
    return False, 1, 1
  a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
  swap = abs(b) > abs(a)
  down, across = (b, c) if swap else (d, a)
  return swap, -1 if down < 0 else 1, -1 if across < 0 else 1
