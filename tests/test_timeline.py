"""Videos as people have them: every second shows and sounds what a player would show and sound."""

import gc
import struct
import types
from fractions import Fraction

import av
import numpy as np
import pytest

from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.media import timeline
from aavs_jax.media.timeline import Timeline
from aavs_jax.media.video import SAMPLE_RATE, read_windows, write_overlay_video
from tests.test_video import COLOURS, dominant_frequency, frequency, write_video

RATE = 16000  # of the sound, where it is no matter


def tone(seconds, hertz=440.0):
  return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)


def write_stamped(path, times, sounds, codec='pcm_s16le', layout='mono', size=(32, 48)):
  """A grey picture of level 10 * second at each of `times`; `sounds` are (second, waveform)."""
  channels = av.AudioLayout(layout).nb_channels
  with av.open(str(path), 'w') as container:
    picture = container.add_stream('mpeg4', rate=10)
    picture.height, picture.width, picture.pix_fmt = *size, 'yuv420p'
    picture.codec_context.time_base = Fraction(1, 1000)
    sound = container.add_stream(codec, rate=RATE, layout=layout)
    packets = []
    for time in times:
      grey = np.full((*size, 3), round(10 * time) % 250, np.uint8)
      frame = av.VideoFrame.from_ndarray(grey, format='rgb24')
      frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
      packets += picture.encode(frame)
    packets += picture.encode(None)
    for second, wave in sounds:
      samples = (32767 * wave).astype(np.int16).repeat(channels)[None]
      frame = av.AudioFrame.from_ndarray(samples, format='s16', layout=layout)
      frame.sample_rate, frame.time_base = RATE, Fraction(1, RATE)
      frame.pts = round(second * RATE)
      packets += sound.encode(frame)
    packets += sound.encode(None)
    for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
      container.mux(packet)
  return path


def read(path):
  """Frames and waveforms, one of each a second."""
  windows = list(read_windows(path))
  frames = [frame for frames, _, _ in windows for frame in frames]
  return frames, np.concatenate([waveform for _, waveform, _ in windows]).reshape(-1, SAMPLE_RATE)


def loudness(waveform):
  return np.sqrt(np.mean(np.square(waveform), axis=-1))


def copy_with_overlay(path):
  """The overlay video of a source, nothing being drawn."""
  out = path.with_name(f'{path.stem}_overlay.mp4')
  return write_overlay_video(out, path, [np.zeros((4, 4), np.uint8)])


def assert_colours_and_tones(path, seconds):
  """Of `write_video`: frame and tone of second t are those of its second seconds[t]."""
  frames, waves = read(path)
  assert len(frames) == len(waves) == len(seconds)
  for frame, wave, second in zip(frames, waves, seconds):
    height, width = frame.shape[:2]
    colour = frame[height // 2 :, width // 2 :].mean(axis=(0, 1))
    np.testing.assert_allclose(colour, COLOURS[second], atol=15)
    assert dominant_frequency(wave[1600:6400]) == pytest.approx(frequency(second), abs=5)


def test_a_gap_in_the_sound_is_silence(tmp_path):
  path = write_stamped(
    tmp_path / 'v.mkv', np.arange(0, 6, 0.5), [(0, tone(1)), (4, tone(1, 880.0)), (5, tone(0.6))]
  )
  for version in (path, copy_with_overlay(path)):
    frames, waves = read(version)
    assert len(frames) == 6
    np.testing.assert_allclose(loudness(waves), [0.35, 0, 0, 0, 0.35, 0.27], atol=0.02)
    assert dominant_frequency(waves[4]) == pytest.approx(880, abs=4)


def test_sound_whose_clock_drifts_stays_with_the_picture(tmp_path):
  for pace in (0.97, 1.03):  # seconds of samples in a second of time stamps
    pieces = [(0.1 * i, tone(0.1 * pace, 440 if i < 110 else 880)) for i in range(120)]
    _, waves = read(write_stamped(tmp_path / f'{pace}.mkv', np.arange(12), pieces))
    assert dominant_frequency(waves[10][-4800:-2400]) == pytest.approx(440, abs=10)
    assert dominant_frequency(waves[11][2400:4800]) == pytest.approx(880, abs=10)


def test_small_errors_of_time_stamps_do_not_tear_the_sound(tmp_path):
  pieces = np.split(tone(2), 20)
  shaken = [(0.1 * i + 0.03 * (i % 2), piece) for i, piece in enumerate(pieces)]
  _, waves = read(write_stamped(tmp_path / 'v.mkv', np.arange(2), shaken))
  np.testing.assert_allclose(waves.ravel(), tone(2), atol=1e-3)


@pytest.mark.parametrize('suffix', ['.ts', '.mkv'])
def test_joined_pieces_play_one_after_the_other(suffix, tmp_path, capsys):
  piece = write_video(tmp_path / f'piece{suffix}', 2.7).read_bytes()  # the next begins within 3
  joined = tmp_path / f'joined{suffix}'
  joined.write_bytes(piece * 2)
  assert_colours_and_tones(joined, [0, 1, 2, 0, 1, 2])
  assert 'begin anew or leap: 1' in capsys.readouterr().out
  assert_colours_and_tones(copy_with_overlay(joined), [0, 1, 2, 0, 1, 2])


def test_pieces_of_other_days_sizes_and_formats_are_joined(tmp_path):
  pieces = [
    write_video(tmp_path / 'a.ts', 2.7),
    write_video(tmp_path / 'b.ts', 2.7, size=(96, 80), rate=48000, channels=1, start=60),
    write_video(tmp_path / 'c.ts', 2.7, size=(64, 48), rate=22050, start=72000),
  ]
  joined = tmp_path / 'joined.ts'
  joined.write_bytes(b''.join(path.read_bytes() for path in pieces))
  frames, _ = read(joined)
  assert [frame.shape[:2] for frame in frames] == 3 * [(48, 64)] + 3 * [(96, 80)] + 2 * [(64, 48)]
  assert_colours_and_tones(joined, [0, 1, 2, 0, 1, 2, 0, 1])
  copy = copy_with_overlay(joined)
  assert_colours_and_tones(copy, [0, 1, 2, 0, 1, 2, 0, 1])
  for frame in read(copy)[0]:
    assert frame.shape[:2] == (48, 64) and frame[5, 5].min() > 200 and frame[18, 8].min() < 100


def test_sound_of_eight_channels(tmp_path):
  path = write_stamped(tmp_path / 'v.mkv', [0, 1], [(0, tone(2))], layout='7.1')
  np.testing.assert_allclose(read(path)[1].ravel(), tone(2), atol=1e-3)
  np.testing.assert_allclose(loudness(read(copy_with_overlay(path))[1]) > 0.1, True)


def with_channels(path, count):
  """An AVI whose header says that its sound has so many channels, without names."""
  content = bytearray(write_stamped(path, [0, 1], [(0, tone(2))]).read_bytes())
  at = content.index(b'strf', content.index(b'auds')) + 8
  struct.pack_into('<HHIIHH', content, at, 1, count, RATE, RATE * 2 * count, 2 * count, 16)
  path.write_bytes(content)
  return path


@pytest.mark.parametrize('count', [9, 32])
def test_channels_without_names_are_mixed_to_one(count, tmp_path):
  path = with_channels(tmp_path / 'v.avi', count)
  assert Timeline(path).is_mono
  assert loudness(read(copy_with_overlay(path))[1])[0] > 0.01


def test_more_channels_than_ffmpeg_mixes_are_no_sound(tmp_path):
  with pytest.raises(UserError, match='sound of which nothing can be decoded'):
    read(with_channels(tmp_path / 'v.avi', 65))


def test_stereo_of_six_channels_is_no_louder_than_they_are(tmp_path):
  path = write_stamped(tmp_path / 'v.mkv', [0, 1], [(0, tone(2))], layout='5.1')
  stereo = np.concatenate([*Timeline(path).sound(RATE, 'stereo')], 1)
  np.testing.assert_allclose(loudness(stereo), loudness(tone(2)), rtol=0.01)


def test_a_stream_that_comes_in_the_middle_does_not_end_the_reading(tmp_path):
  """PyAV trips over it when it would hand out the last, empty packets."""

  class Grown:
    def demux(self, streams):
      for packet in container.demux(streams):
        if not packet.size:
          raise IndexError('list index out of range')
        yield packet

  path = write_stamped(tmp_path / 'v.mkv', [0, 1], [(0, tone(2))])
  counts = []
  for demuxed in (None, Grown()):
    with av.open(str(path)) as container:
      streams = [container.streams.video[0], container.streams.audio[0]]
      packets = list(timeline._packets(demuxed or container, streams))
      counts.append([(p.stream.index, p.size, len(p.decode())) for p in packets])
      for packet in packets[-2:]:
        timeline._Clock(10.0, {}).correct(packet)
  assert counts[0] == counts[1]


def test_times_that_cannot_be_are_not_followed():
  clock = timeline._Clock(10.0, {0: 0.5})

  def packet(pts, duration):
    return types.SimpleNamespace(
      stream_index=0, time_base=Fraction(1, 1000), dts=1000, pts=pts, duration=duration
    )

  clock.correct(packet(1000, 10**9))
  assert clock.end == 1.5
  clock.correct(late := packet(10**9, 250))
  assert clock.end == 1.25 and late.pts == 1000 and clock.wrong == 2


def test_a_long_gap_of_the_sound_alone_is_no_leap_of_the_clock(tmp_path):
  """In MPEG-TS too, where picture and sound would leap together."""
  path = write_stamped(
    tmp_path / 'v.ts', np.arange(0, 15, 0.5), [(0, tone(1.008)), (13, tone(1.008))], codec='mp2'
  )
  frames, waves = read(path)
  assert [round(frame.mean() / 10) for frame in frames] == list(range(15))
  assert (loudness(waves[[0, 13]]) > 0.3).all() and not waves[3:12].any()


def test_a_long_still_picture_is_no_leap_of_the_clock(tmp_path, capsys):
  frames, waves = read(write_stamped(tmp_path / 'v.mkv', [0, 40.2], [(0, tone(1))]))
  assert len(frames) == 40 and len(frames) == len(waves)
  assert all(frame.mean() < 20 for frame in frames)
  assert not waves[1:].any() and not capsys.readouterr().out


@pytest.mark.parametrize(
  ('times', 'sound', 'levels'),
  [
    ([0, 2.4, 2.8], 6, [0, 0, 0, 28, 28, 28]),  # the sound goes on
    ([0], 3, [0, 0, 0]),  # a still picture
    ([0, 2.4, 3.6, 3.7], 1, [0, 0, 0, 24]),  # the last frame's own length of 0.1 s
    ([0, 1, 2, 3, 3.3], 3.6, [0, 10, 20, 30]),
    ([0, 1.001, 2.001], 3, [0, 10, 20]),  # rounded
    ([0, 1.002, 2.004], 3, [0, 0, 10]),  # 1 and 2 are shown a moment too late
  ],
)
def test_a_second_has_what_is_on_the_screen_until_all_has_ended(times, sound, levels, tmp_path):
  path = write_stamped(tmp_path / 'v.mkv', times, [(0, tone(sound))])
  for version in (path, copy_with_overlay(path)):
    np.testing.assert_allclose([frame.mean() for frame in read(version)[0]], levels, atol=4)


def test_masks_change_over_a_still_picture(tmp_path):
  source = write_stamped(tmp_path / 'v.mkv', [0, 2.5], [(0, tone(4))])
  masks = (np.full((4, 4), second, np.uint8) for second in range(4))
  out = write_overlay_video(
    tmp_path / 'o.mp4', source, masks, draw=lambda image, mask: image * 0 + 60 * mask[0, 0]
  )
  with av.open(str(out)) as container:
    drawn = [(f.time, f.to_ndarray(format='gray').mean()) for f in container.decode(video=0)]
  assert [round(time, 2) for time, _ in drawn] == [0, 1, 2, 2.5, 3, 3.9]
  np.testing.assert_allclose([grey for _, grey in drawn], [0, 60, 120, 120, 180, 180], atol=12)


def test_the_last_frame_of_an_overlay_lasts_as_long_as_the_sound(tmp_path):
  copy = copy_with_overlay(write_video(tmp_path / 'v.mp4', 2, fps=10, sound_end=4))
  with av.open(str(copy)) as container:
    stream = container.streams.video[0]
    assert float(stream.duration * stream.time_base) == pytest.approx(4, abs=0.05)


def turned(path, matrix):
  """The same MP4 with another display matrix."""
  data = bytearray(path.read_bytes())
  at = data.index(b'tkhd') + 44  # of the first track, the picture
  values = np.zeros(9, '>i4')
  values[[0, 1, 3, 4]] = np.array(matrix) * 65536
  values[8] = 1 << 30
  data[at : at + 36] = values.tobytes()
  path.write_bytes(data)
  return path


@pytest.mark.parametrize(
  ('matrix', 'shown'),
  [
    ((1, 0, 0, 1), lambda image: image),
    ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),  # a quarter turn clockwise
    ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
    ((0, -1, 1, 0), lambda image: np.rot90(image)),
    ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
    ((1, 0, 0, -1), lambda image: image[::-1]),
    ((0, 1, 1, 0), lambda image: image.swapaxes(0, 1)),
    ((0, -1, -1, 0), lambda image: image[::-1, ::-1].swapaxes(0, 1)),
  ],
)
def test_pictures_are_shown_in_all_eight_orientations(matrix, shown, tmp_path):
  path = write_video(tmp_path / 'v.mp4', 1)
  stored = read(path)[0][0]
  np.testing.assert_array_equal(read(turned(path, matrix))[0][0], shown(stored))


def test_tags_that_are_not_utf_8_do_not_matter(tmp_path):
  path = write_video(tmp_path / 'v.mkv', 2, title='title')
  data = path.read_bytes()
  assert data.count(b'title') == 1
  path.write_bytes(data.replace(b'title', b't\xe9\x8e\xffe'))
  assert_colours_and_tones(path, [0, 1])


def test_names_may_hold_a_colon(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write_video(tmp_path / 'v.mp4', 1).rename(tmp_path / '23:50.mp4')
  assert_colours_and_tones('23:50.mp4', [0])
  write_overlay_video('take:1.mp4', '23:50.mp4', [np.zeros((4, 4), np.uint8)])
  assert sorted(path.name for path in tmp_path.iterdir()) == ['23:50.mp4', 'take:1.mp4']


def write_tracks(path, default):
  """A silent picture of 2 s with tones of 440 and 880 Hz, the track of number `default` marked."""
  with av.open(str(path), 'w') as container:
    picture = container.add_stream('mpeg4', rate=5)
    picture.width, picture.height, picture.pix_fmt = 48, 32, 'yuv420p'
    tracks = [container.add_stream('aac', rate=RATE, layout='mono') for _ in range(2)]
    for number, track in enumerate(tracks):
      track.disposition = int(number == default)
    for i in range(10):
      frame = av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format='rgb24')
      frame.pts = i
      container.mux(picture.encode(frame))
    container.mux(picture.encode(None))
    for track, hertz in zip(tracks, (440, 880)):
      wave = tone(2, hertz).astype(np.float32)[None]
      frame = av.AudioFrame.from_ndarray(wave, format='fltp', layout='mono')
      frame.sample_rate, frame.pts = RATE, 0
      container.mux([*track.encode(frame), *track.encode(None)])
  return path


def without_codec(path, tracks):
  """The MOV with the codec of these of its AAC tracks, 0 and 1, made one that nobody knows."""
  data = bytearray(path.read_bytes())
  marks = [i for i in range(len(data)) if data[i : i + 4] == b'mp4a']
  entries = [i for i in marks if data[i - 8 : i - 4] == b'\0\0\0\1']
  for track in tracks:
    for mark in marks:
      if entries[track] <= mark < entries[track] + 200:
        data[mark : mark + 4] = b'apac'
    tables = data.index(b'esds', entries[track])  # else the object type still tells AAC
    data[tables : tables + 4] = b'xsds'
  path.write_bytes(data)
  return path


def test_the_sound_track_is_the_marked_one_if_it_can_be_decoded(tmp_path):
  for default, lost, hertz in ((0, (), 440), (1, (), 880), (0, (0,), 880), (1, (1,), 440)):
    path = write_tracks(tmp_path / 'v.mov', default)
    _, waves = read(without_codec(path, lost))
    assert dominant_frequency(waves[0]) == pytest.approx(hertz, abs=4)
  with pytest.raises(UserError, match=r'v\.mov has sound of a codec that is not known here'):
    read_windows(without_codec(write_tracks(tmp_path / 'v.mov', 0), (0, 1)))


def spoil(path, out, kind, which):
  """A copy with packets of a stream replaced by noise."""
  rng = np.random.default_rng(0)
  with av.open(str(path)) as source, av.open(str(out), 'w') as container:
    to = {s.index: container.add_stream_from_template(s) for s in source.streams}
    count = 0
    for packet in source.demux():
      if packet.dts is None:
        continue
      new = packet
      if packet.stream.type == kind:
        if count in which:
          new = av.Packet(rng.integers(0, 256, packet.size, np.uint8).tobytes())
          new.pts, new.dts, new.time_base = packet.pts, packet.dts, packet.time_base
        count += 1
      new.stream = to[packet.stream.index]
      container.mux(new)
  return out


@pytest.mark.parametrize(('kind', 'name'), [('audio', 'sound'), ('video', 'picture')])
def test_damaged_packets_are_left_out_with_a_word(kind, name, tmp_path, capsys):
  source = write_video(tmp_path / 'v.mkv', 3)
  spoiled = spoil(source, tmp_path / 'spoiled.mkv', kind, {7, 9})
  assert_colours_and_tones(spoiled, [0, 1, 2])
  said = capsys.readouterr().out.splitlines()
  assert said == [f'{spoiled}: damaged packets of the {name} that are left out: 2']
  assert_colours_and_tones(copy_with_overlay(spoiled), [0, 1, 2])
  with pytest.raises(UserError, match=r'all\.mkv has '):
    list(read_windows(spoil(source, tmp_path / 'all.mkv', kind, range(1000))))


def test_pixels_that_are_not_square_stay_so(tmp_path):
  path = write_video(tmp_path / 'v.mp4', 1, aspect=Fraction(64, 45))
  for matrix, aspect in (((1, 0, 0, 1), Fraction(64, 45)), ((0, 1, -1, 0), Fraction(45, 64))):
    with av.open(str(copy_with_overlay(turned(path, matrix)))) as container:
      found = container.streams.video[0].sample_aspect_ratio
    assert Fraction(found.numerator, found.denominator) == aspect


def test_an_empty_sound_track_is_silence_with_a_word(tmp_path, capsys):
  path = write_stamped(tmp_path / 'v.mkv', np.arange(0, 2, 0.5), [])
  frames, waves = read(path)
  assert len(frames) == 2 and not waves.any()
  assert 'sound track is empty' in capsys.readouterr().out
  with av.open(str(copy_with_overlay(path))) as container:
    assert [stream.type for stream in container.streams] == ['video']


def test_a_gap_of_hours_needs_no_memory(tmp_path):
  path = write_stamped(tmp_path / 'v.mkv', [0, 3000], [(0, tone(0.1)), (3000, tone(0.1))])
  pieces = [piece.shape for piece in Timeline(path).sound(RATE, 'mono')]
  assert sum(length for _, length in pieces) == pytest.approx(3000.1 * RATE, abs=2)
  assert max(length for _, length in pieces) <= RATE


def test_frames_are_set_free_at_once(tmp_path):
  """In no cycle of references, for which a long video would have no constant memory."""
  timeline = Timeline(write_video(tmp_path / 'v.mp4', 2))
  gc.collect()
  gc.disable()
  try:
    for _, _, frame in timeline.pictures():
      timeline.upright(frame)
    alive = sum(type(thing) is av.VideoFrame for thing in gc.get_objects())
  finally:
    gc.enable()
  assert alive <= 2
