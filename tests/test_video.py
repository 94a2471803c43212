"""Videos: what is read at which second, and what an overlay video holds."""

from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace

from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.media.overlay import overlay_binary
from aavs_jax.media.video import SAMPLE_RATE, read_windows, write_overlay_video

COLOURS = np.array(
  [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200), (200, 30, 200)],
  np.uint8,
)


def frequency(second):
  return 300 + 100 * second


def write_video(
  path, duration, fps=5, size=(48, 64), picture=True, sound=True, rate=44100, sound_end=None,
  channels=2, sound_shift=0.0, start=0, title='', aspect=None,
):  # fmt: skip
  """Colour t in second t, and a tone of frequency(t); the right channel is silent."""
  options = {'output_ts_offset': str(start)}  # seconds that are added to all time stamps
  with av.open(str(path), 'w', container_options=options) as container:
    container.metadata['title'] = title
    streams = []
    if picture:
      stream = container.add_stream('mpeg4', rate=fps)
      stream.width, stream.height, stream.pix_fmt = size[1], size[0], 'yuv420p'
      stream.bit_rate = 2_000_000
      if aspect:
        stream.codec_context.sample_aspect_ratio = aspect
      streams.append(stream)
    if sound:
      layout = 'stereo' if channels == 2 else 'mono'
      tone = container.add_stream('aac', rate=rate, layout=layout)
    for i in range(round(duration * fps) if picture else 0):
      image = np.empty((*size, 3), np.uint8)
      image[:] = COLOURS[int(i / fps) % len(COLOURS)]
      image[: size[0] // 4, : size[1] // 4] = 255  # one white corner shows which way is up
      frame = av.VideoFrame.from_ndarray(image, format='rgb24')
      frame.pts, frame.time_base = i, Fraction(1, fps)
      container.mux(stream.encode(frame))
    if picture:
      container.mux(stream.encode(None))
    if sound:
      times = np.arange(round((sound_end or duration) * rate)) / rate
      wave = 0.5 * np.sin(2 * np.pi * frequency(np.floor(times)) * times)
      samples = np.zeros((channels, len(times)), np.float32)
      samples[0] = wave
      for start in range(0, len(times), 1024):
        frame = av.AudioFrame.from_ndarray(
          np.ascontiguousarray(samples[:, start : start + 1024]), format='fltp', layout=layout
        )
        frame.pts = start + round(sound_shift * rate)
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        container.mux(tone.encode(frame))
      container.mux(tone.encode(None))
  return path


def dominant_frequency(waveform):
  spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
  return spectrum.argmax() * SAMPLE_RATE / len(waveform)


@pytest.fixture(scope='module')
def long_video(tmp_path_factory):
  return write_video(tmp_path_factory.mktemp('video') / 'long.mp4', 23)


@pytest.fixture(scope='module')
def short_video(tmp_path_factory):
  return write_video(tmp_path_factory.mktemp('video') / 'short.mp4', 3)


def test_windows_of_a_long_video(long_video):
  windows = list(read_windows(long_video))
  assert [start for _, _, start in windows] == [0, 10, 20]
  assert [len(frames) for frames, _, _ in windows] == [10, 10, 3]
  for frames, waveform, start in windows:
    assert {(frame.shape, frame.dtype) for frame in frames} == {((48, 64, 3), np.dtype('uint8'))}
    assert waveform.shape == (len(frames) * SAMPLE_RATE,) and waveform.dtype == np.float32
    for i, frame in enumerate(frames):
      second = start + i
      np.testing.assert_allclose(
        frame[24:, 32:].mean(axis=(0, 1)), COLOURS[second % len(COLOURS)], atol=12
      )
      middle = waveform[i * SAMPLE_RATE + 1600 : (i + 1) * SAMPLE_RATE - 1600]
      assert dominant_frequency(middle) == pytest.approx(frequency(second), abs=3)


def test_channels_are_averaged(short_video):
  _, waveform, _ = next(read_windows(short_video))
  # Half an amplitude of 0.5, as the other channel is silent.
  assert np.abs(waveform[4000:12000]).max() == pytest.approx(0.25, abs=0.02)


def test_window_length_is_a_choice(short_video):
  assert [(len(f), s) for f, _, s in read_windows(short_video, count=2)] == [(2, 0), (1, 2)]


@pytest.mark.parametrize(
  ('duration', 'seconds'), [(0.4, 1), (1.0, 1), (1.4, 1), (1.6, 2), (10.2, 10), (10.8, 11)]
)
def test_number_of_seconds_is_the_rounded_length(tmp_path, duration, seconds):
  windows = list(read_windows(write_video(tmp_path / 'v.mp4', duration)))
  assert sum(len(frames) for frames, _, _ in windows) == seconds
  assert sum(len(waveform) for _, waveform, _ in windows) == seconds * SAMPLE_RATE


def test_frame_on_the_screen_at_the_second(tmp_path):
  # Frames at 0, 2/3, 4/3, 2, ...: in second 1 the frame of 2/3 is still there, which has colour 0.
  frames, _, _ = next(read_windows(write_video(tmp_path / 'v.mp4', 4, fps=Fraction(3, 2))))
  for second, frame in enumerate(frames):
    expected = COLOURS[int(np.floor(second * 1.5) / 1.5)]
    np.testing.assert_allclose(frame[24:, 32:].mean(axis=(0, 1)), expected, atol=12)


def test_slow_video_repeats_its_last_frame(tmp_path):
  source = write_video(tmp_path / 'v.mp4', 8, fps=Fraction(1, 4))
  frames, _, _ = next(read_windows(source))
  assert len(frames) == 8
  np.testing.assert_array_equal(frames[7], frames[4])
  copy = write_overlay_video(tmp_path / 'o.mp4', source, [np.zeros((4, 4), np.uint8)])
  assert sum(len(frames) for frames, _, _ in read_windows(copy)) == 8


def test_sound_shorter_than_picture_ends_in_zeros(tmp_path):
  _, waveform, _ = next(read_windows(write_video(tmp_path / 'v.mp4', 3, sound_end=1.0)))
  assert len(waveform) == 3 * SAMPLE_RATE
  assert np.abs(waveform[:15000]).max() > 0.2
  assert not waveform[round(1.2 * SAMPLE_RATE) :].any()


def test_late_sound_keeps_its_place(tmp_path):
  path = write_video(tmp_path / 'v.mkv', 4, sound_shift=1.0)
  _, waveform, _ = next(read_windows(path))
  assert np.abs(waveform[:15000]).max() < 0.01
  assert dominant_frequency(waveform[18000:30000]) == pytest.approx(frequency(0), abs=3)


def test_16_khz_mono_sound_is_read_to_its_end(tmp_path):
  _, waveform, _ = next(read_windows(write_video(tmp_path / 'v.mp4', 2, rate=16000, channels=1)))
  assert dominant_frequency(waveform[18000:30000]) == pytest.approx(frequency(1), abs=3)
  assert np.abs(waveform[-1000:]).max() > 0.4


def test_errors_name_the_file_at_the_call(tmp_path):
  junk = tmp_path / 'junk.mp4'
  junk.write_bytes(b'this is no video' * 100)
  cases = {
    tmp_path / 'missing.mp4': 'does not exist',
    junk: 'cannot be read',
    write_video(tmp_path / 'mute.mp4', 1, sound=False): r'mute\.mp4 has no sound: .* with sound$',
    write_video(tmp_path / 'blind.mp4', 1, picture=False): r'4 has no picture: give a video file$',
  }
  for path, words in cases.items():
    for call in (
      lambda p: read_windows(p),
      lambda p: write_overlay_video(tmp_path / 'out.mp4', p, [np.ones((2, 2), np.uint8)]),
    ):
      with pytest.raises(UserError, match=words) as caught:
        call(path)
      assert str(path) in str(caught.value)
  assert not list(tmp_path.glob('*out*'))


def decode(path):
  with av.open(str(path)) as container:
    frames = [(f.time, f.to_ndarray(format='rgb24')) for f in container.decode(video=0)]
  with av.open(str(path)) as container:
    sound = [f.to_ndarray() for f in container.decode(audio=0)]
    rate = container.streams.audio[0].rate
  return frames, np.concatenate(sound, axis=1), rate


def test_overlay_video_keeps_frames_times_and_sound(short_video, tmp_path):
  out = tmp_path / 'made' / 'overlay.mp4'
  taken = []

  def masks():
    for second in range(3):
      taken.append(second)
      mask = np.zeros((24, 32), np.uint8)
      mask[12:, 8 * second : 8 * second + 16] = 1  # moves right by a quarter each second
      yield mask

  drawn_of = lambda frame, mask: overlay_binary(frame, mask, alpha=1.0)  # noqa: E731
  assert write_overlay_video(out, short_video, masks(), draw=drawn_of) == out
  assert list(out.parent.iterdir()) == [out]
  assert taken == [0, 1, 2]
  frames, sound, rate = decode(out)
  source_frames, _, _ = decode(short_video)
  assert len(frames) == len(source_frames) == 15
  np.testing.assert_allclose([t for t, _ in frames], [t for t, _ in source_frames], atol=1e-4)
  for (time, frame), (_, before) in zip(frames, source_frames):
    left = 16 * int(time + 1e-6)
    np.testing.assert_allclose(
      frame[30:42, left + 6 : left + 26].mean(axis=(0, 1)), (255, 45, 110), atol=25
    )
    np.testing.assert_allclose(frame[:16], before[:16], atol=40)  # nothing is drawn up there
  assert sound.shape[1] / rate == pytest.approx(3, abs=0.1)
  # The overlay video is itself a video that can be read, with the same sound at the same seconds.
  _, waveform, _ = next(read_windows(out))
  for second in range(3):
    middle = waveform[second * SAMPLE_RATE + 1600 : (second + 1) * SAMPLE_RATE - 1600]
    assert dominant_frequency(middle) == pytest.approx(frequency(second), abs=3)


def test_last_mask_stays_and_odd_sizes_are_cut(tmp_path):
  source = write_video(tmp_path / 'v.mkv', 2.4, size=(49, 65))
  out = write_overlay_video(
    tmp_path / 'o.mp4',
    source,
    iter([np.ones((4, 4), np.uint8)]),
    draw=lambda frame, mask: overlay_binary(frame, mask, alpha=1.0),
  )
  frames, _, _ = decode(out)
  assert len(frames) == 12 and frames[0][1].shape == (48, 64, 3)
  np.testing.assert_allclose(frames[-1][1].mean(axis=(0, 1)), (255, 45, 110), atol=25)
  with av.open(str(out)) as container:
    colours = next(container.decode(video=0)).colorspace, Colorspace.ITU601
    assert colours[0] == colours[1], 'players would guess by the size'


def test_ambisonic_sound_is_heard_as_its_mean(tmp_path):
  source, rate = tmp_path / 'round.mkv', 48000
  with av.open(str(source), 'w') as container:
    picture = container.add_stream('mpeg4', rate=5)
    picture.width, picture.height, picture.pix_fmt = 64, 48, 'yuv420p'
    sound = container.add_stream(
      'libopus', rate=rate, layout='ambisonic 1', options={'mapping_family': '2'}
    )
    for i in range(5):
      frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 90, np.uint8), format='rgb24')
      frame.pts, frame.time_base = i, Fraction(1, 5)
      container.mux(picture.encode(frame))
    container.mux(picture.encode(None))
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    samples = np.repeat(np.int16(8000 * tone)[:, None], 4, axis=1)
    for start in range(0, rate, 960):
      frame = av.AudioFrame(format='s16', layout='ambisonic 1', samples=960)
      frame.planes[0].update(np.ascontiguousarray(samples[start : start + 960]).tobytes())
      frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
      container.mux(sound.encode(frame))
    container.mux(sound.encode(None))
  ((_, waveform, _),) = read_windows(source)
  assert dominant_frequency(waveform) == pytest.approx(440, abs=2)
  out = write_overlay_video(tmp_path / 'o.mp4', source, [np.zeros((4, 4), np.uint8)])
  ((_, again, _),) = read_windows(out)
  assert dominant_frequency(again) == pytest.approx(440, abs=2)


def test_what_ffmpeg_cannot_write_names_the_source(short_video, tmp_path, monkeypatch):
  def write(*_):
    raise av.error.FFmpegError(22, 'Invalid argument')

  monkeypatch.setattr('aavs_jax.media.video._write_streams', write)
  with pytest.raises(UserError, match=r'short\.mp4 cannot be written again .*Invalid argument'):
    write_overlay_video(tmp_path / 'o.mp4', short_video, [])
  assert not list(tmp_path.iterdir())


def test_failure_leaves_no_file_and_keeps_the_old_one(short_video, tmp_path):
  out = tmp_path / 'o.mp4'
  out.write_bytes(b'older result')

  def broken():
    yield np.ones((4, 4), np.uint8)
    raise RuntimeError('model failed')

  with pytest.raises(RuntimeError):
    write_overlay_video(out, short_video, broken())
  with pytest.raises(UserError, match='no mask'):
    write_overlay_video(out, short_video, [])
  assert [p.name for p in tmp_path.iterdir()] == ['o.mp4']
  assert out.read_bytes() == b'older result'


def test_output_must_be_another_mp4(short_video, tmp_path):
  with pytest.raises(UserError, match='source video itself'):
    write_overlay_video(short_video, short_video, [])
  with pytest.raises(UserError, match=r'\.mp4'):
    write_overlay_video(tmp_path / 'o.avi', short_video, [])


def test_masks_of_half_seconds_are_drawn_when_they_begin(tmp_path):
  source, seen = write_video(tmp_path / 'v.mp4', 2), []

  def draw(frame, mask):
    seen.append(int(mask[0, 0]))
    return frame

  masks = (np.full((4, 4), i, np.uint8) for i in range(4))
  write_overlay_video(tmp_path / 'out.mp4', source, masks, draw, every=0.5)
  times = np.arange(len(seen)) / (len(seen) / 2)
  assert seen == [int(time // 0.5) for time in times]
