"""Clips and videos of one's own: what sounds, as what, and both drawn over the frames.

Sources are read and answered window by window, so memory does not grow with their length.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import jax
import ml_collections
import numpy as np
from PIL import Image

from aavs_jax import methods
from aavs_jax.console import say
from aavs_jax.input_pipeline import audio, files
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.images import read_image, resize_frame
from aavs_jax.input_pipeline.masks import of_scores
from aavs_jax.media.overlay import overlay, overlay_binary
from aavs_jax.media.video import Window, read_windows, write_overlay_video
from aavs_jax.scoring.predictor import Predictor
from aavs_jax.training.work_folder import class_names, load_stages
from aavs_jax.types import Variables

WINDOW_SECONDS = 10  # the longest clip the models have seen
_BATCH_FRAMES = 5  # of one call of a model; what is lacking is padded, so that it compiles once
_SUFFIXES = ('.jpg', '.jpeg', '.png')

Frames = Sequence[np.ndarray]  # uint8 [H W 3] each, RGB, at the source's size
Model = Callable[[Frames, np.ndarray, np.ndarray | None], np.ndarray]


def predict(
  source: str | Path,
  *,
  stage1: str | Path | None,
  stage2: str | Path | None = None,
  out: str | Path,
  progress: Callable[[int], None] | None = None,
) -> Path:
  """Answers a clip folder or a video second by second and writes a folder of results.

  OUT appears only when all of it is written:

    masks/{t}.png     0 or 255, what sounds in second t: stage 1's answer, or where stage 2's is not
                      background if there is no stage 1; at the size of the frame, as all images
    classes/{t}.png   class ids as grey values; with stage 2 only
    overlays/{t}.jpg  the classes, or without stage 2 the mask, drawn over the frame
    overlay.mp4       the same over every frame of a video, with its sound
    summary.json      source, seconds, stage1, stage2 and frames: for each second the share of the
                      frame that sounds, and id, name and share of its classes, the largest first

  Args:
    source: a folder with frames/ (JPEG or PNG, named by their numbers, one a second) and audio.wav,
      or a video file.
    stage1: work folder of `aavs train` with a model of the binary task.
    stage2: the same of the semantic task. A model that takes a prior gets stage 1's masks of the
      same frames; one trained end to end needs no stage 1.
    out: a new or empty folder.
    progress: called with the number of seconds done, after every window.

  Returns:
    out.

  Raises:
    UserError: the source, a model or the output folder is at fault. Nothing is left behind, however
      this ends; what SIGKILL leaves goes with the next call for `out`.
  """
  source, target = Path(source), files.new_folder(out)
  is_video = source.is_file()
  windows = read_windows(source, WINDOW_SECONDS) if is_video else read_clip_folder(source)
  answer = load_models(stage1, stage2)
  names = () if stage2 is None else class_names(stage2)

  with files.writing_folder(target) as working:
    summary = []
    for images, log_mel in _hear(windows, source):
      masks, classes = answer(images, log_mel)
      for i, image in enumerate(images):
        ids = None if classes is None else classes[i]
        summary.append(_write_second(working, len(summary), image, masks[i], ids, names))
      if progress:
        progress(len(summary))
    if is_video:
      # Read back one by one: the masks of a long video need not fit into memory.
      drawn = working / ('classes' if stage2 is not None else 'masks')
      maps = (read_image(drawn / f'{t}.png')[..., 0] for t in range(len(summary)))
      draw = overlay if stage2 is not None else overlay_binary
      write_overlay_video(working / 'overlay.mp4', source, maps, draw)
    files.write_json(
      working / 'summary.json',
      {
        'source': str(source),
        'seconds': len(summary),
        'stage1': None if stage1 is None else str(stage1),
        'stage2': None if stage2 is None else str(stage2),
        'frames': summary,
      },
    )
  return Path(out)


def read_clip_folder(folder: str | Path, seconds: int = WINDOW_SECONDS) -> Iterator[Window]:
  """Cuts a clip folder into windows of at most `seconds` frames, as read_windows does a video.

  The waveform ends early where the sound does.

  Raises:
    UserError: no such folder, no frames, frames not numbered one by one, or sound that is missing,
      unreadable or too short for one example; while reading, a frame that is no image.
  """
  folder = Path(folder)
  paths = _frame_paths(folder)
  waveform = audio.resample(*audio.read_wav(folder / 'audio.wav'))
  if len(waveform) < audio.samples_needed(1):
    raise UserError(
      f'{folder / "audio.wav"} lasts {len(waveform) / audio.SAMPLE_RATE:.3f} s, but at least '
      f'{audio.samples_needed(1) / audio.SAMPLE_RATE} s are needed: extract the whole sound'
    )
  return (
    (
      [read_image(path) for path in paths[start : start + seconds]],
      waveform[start * audio.SAMPLE_RATE : (start + seconds) * audio.SAMPLE_RATE],
      start,
    )
    for start in range(0, len(paths), seconds)
  )


def _frame_paths(folder: Path) -> list[Path]:
  """The frames of a clip folder, in the order of their numbers."""
  advice = 'give a video file, or a folder with frames/0.jpg, 1.jpg, ... and audio.wav'
  if not folder.exists():
    raise UserError(f'{folder} does not exist: {advice}')
  if not (folder / 'frames').is_dir():
    raise UserError(f'{folder} has no folder named frames: {advice}')
  found = [
    path
    for path in (folder / 'frames').iterdir()
    if path.suffix.lower() in _SUFFIXES and not path.name.startswith('.')
  ]
  if not found:
    raise UserError(f'{folder / "frames"} holds no JPEG or PNG file: {advice}')
  for path in found:
    if not path.stem.isdecimal():
      raise UserError(f'{path} is not named by a number: name frames 0.jpg, 1.jpg, and so on')
  paths = sorted(found, key=lambda path: int(path.stem))
  for before, path in itertools.pairwise(paths):
    # A gap would set all later frames against the sound of other seconds.
    if int(path.stem) != int(before.stem) + 1:
      raise UserError(
        f'{path} comes after {before.name}, but frames are numbered one by one, one a second: '
        'restore what is missing or number them anew'
      )
  return paths


def _hear(windows: Iterator[Window], source: Path) -> Iterator[tuple[Frames, np.ndarray]]:
  """Frames of each window with log-mel examples [T 96 64]; the last one fills up at the end."""
  last, repeated = None, 0
  for images, waveform, _ in windows:
    examples = audio.log_mel_examples(waveform)
    repeated += max(0, len(images) - len(examples))
    log_mel, _ = audio.fit_examples(examples if len(examples) else last, len(images))
    last = log_mel[-1:]
    yield images, log_mel
  if repeated:
    say(f'{source}: the sound is {repeated} s too short, its last second stands in for these')


def load_models(
  stage1: str | Path | None, stage2: str | Path | None
) -> Callable[[Frames, np.ndarray], tuple[np.ndarray, np.ndarray | None]]:
  """The models of one or both stages as one function.

  Args:
    stage1: as `predict`.
    stage2: as `predict`.

  Returns:
    (frames, log_mel float32 [T 96 64]) -> masks uint8 [T e e] of 0 and 255, and class ids uint8
    [T e e] or None without stage 2.

  Raises:
    UserError: as work_folder.load_stages.
  """
  first, second = load_stages(stage1, stage2)
  locate = first and _model(*first)
  classify = second and _model(*second)
  soft = bool(second) and second.config.prior.soft

  def answer(frames, log_mel):
    masks = classes = prior = None
    if locate is not None:
      scores = locate(frames, log_mel, None)
      masks = of_scores(scores, soft=False)
      prior = of_scores(scores, soft=True) if soft else masks
    if classify is not None:
      classes = classify(frames, log_mel, prior)
    if masks is None:
      masks = ((classes > 0) * 255).astype(np.uint8)
    return masks, classes

  return answer


def _model(config: ml_collections.ConfigDict, variables: Variables) -> Model:
  """(frames, log_mel, prior [T e e] or None) -> what Method.predict gives."""
  method = methods.of(config)
  predictor = Predictor(method)
  devices = jax.device_count()
  parts = devices * method.unit
  count = -(-_BATCH_FRAMES // parts) * parts

  def model(frames, log_mel, prior):
    size = config.data.image_size
    small = [resize_frame(Image.fromarray(frame), size) for frame in frames]
    batch = {'frames': np.stack(small), 'log_mel': log_mel}
    if config.use_prior:
      batch['prior'] = prior
    answers = []
    for start in range(0, len(frames), count):
      part = {name: value[start : start + count] for name, value in batch.items()}
      real = len(part['frames'])
      lacking = count - real
      padded = {name: np.concatenate([v, v[-1:].repeat(lacking, 0)]) for name, v in part.items()}
      answers.append(np.asarray(predictor(variables, padded))[:real])
    return np.concatenate(answers)

  return model


def _write_second(
  folder: Path,
  second: int,
  image: np.ndarray,
  mask: np.ndarray,
  classes: np.ndarray | None,
  names: Sequence[str],
) -> dict:
  """Writes the images of one second and returns its entry in summary.json."""
  height, width = image.shape[:2]

  def write(name: str, picture: np.ndarray) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(picture).save(path, quality=90)  # of JPEG; PNG ignores it

  def fit(ids: np.ndarray) -> np.ndarray:
    return cv2.resize(ids, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)

  mask = fit(mask)
  write(f'masks/{second}.png', mask)
  found = []
  if classes is None:
    drawn = overlay_binary(image, mask)
  else:
    classes = fit(classes)
    write(f'classes/{second}.png', classes)
    drawn = overlay(image, classes)
    counts = np.bincount(classes.ravel())
    ids = [i for i in np.argsort(-counts, kind='stable').tolist() if i and counts[i]]
    found = [{'id': i, 'name': names[i], 'share': counts[i] / classes.size} for i in ids]
  write(f'overlays/{second}.jpg', drawn)
  return {'second': second, 'sounding_share': np.mean(mask > 0).item(), 'classes': found}
