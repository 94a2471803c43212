"""Clips and videos of one's own: what sounds, as what, and both drawn over the frames.

Sources are read and answered window by window, so memory does not grow with their length.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import cv2
import jax
import ml_collections
import numpy as np
from PIL import Image

from aavs_jax import methods
from aavs_jax.console import Progress, say
from aavs_jax.input_pipeline import audio, files
from aavs_jax.input_pipeline.errors import UserError, may_pass
from aavs_jax.input_pipeline.images import read_image, resize_frame
from aavs_jax.input_pipeline.masks import of_scores
from aavs_jax.media.overlay import overlay, overlay_binary
from aavs_jax.media.timeline import claimed_seconds
from aavs_jax.media.video import Window, read_windows, write_overlay_video
from aavs_jax.scoring.predictor import Predictor
from aavs_jax.training.state import digest
from aavs_jax.training.work_folder import class_names, load_stages
from aavs_jax.types import Variables

WINDOW_FRAMES = 10  # the longest clip the models have seen
_BATCH_FRAMES = 5  # of one call of a model; what is lacking is padded, so that it compiles once
_SUMMARY = 'summary.json'
_SUFFIXES = ('.jpg', '.jpeg', '.png')
# What counts as a video in a folder of them; one that is named may be called anything.
VIDEOS = (
  '.mp4', '.m4v', '.mov', '.mkv', '.webm', '.avi', '.mpg', '.mpeg', '.ts', '.mts', '.m2ts', '.vob',
  '.mxf', '.ogv', '.flv', '.f4v', '.wmv', '.asf', '.3gp', '.3g2',
)  # fmt: skip

_T = TypeVar('_T')
Frames = Sequence[np.ndarray]  # uint8 [H W 3] each, RGB, at the source's size
Model = Callable[[Frames, np.ndarray, np.ndarray | None], np.ndarray]


def predict(
  source: str | Path,
  *,
  stage1: str | Path | None,
  stage2: str | Path | None = None,
  out: str | Path,
  every: float = 1,
) -> Path:
  """Answers a clip folder or a video second by second and writes a folder of results.

  OUT appears only when all of it is written:

    masks/{t}.png     0 or 255, what sounds in frame t: stage 1's answer, or where stage 2's is not
                      background if there is no stage 1; at the size of the frame, as all images
    classes/{t}.png   class ids as grey values; with stage 2 only
    overlays/{t}.jpg  the classes, or without stage 2 the mask, drawn over the frame
    overlay.mp4       the same over every frame of a video, with its sound
    summary.json      source, seconds, every, stage1, stage2, digests of the models and the source,
                      and frames: for each its second, the share of it that sounds, and id, name
                      and share of its classes, the largest first

  Args:
    source: a folder with frames/ (JPEG or PNG, named by their numbers, one a second) and audio.wav,
      or a video file.
    stage1: work folder of `aavs train` with a model of the binary task.
    stage2: the same of the semantic task. A model that takes a prior gets stage 1's masks of the
      same frames; one trained end to end needs no stage 1.
    out: a new or empty folder.
    every: seconds from a frame of a video to the next, in whole milliseconds. With 1 a frame hears
      what frames hear in training, examples of 0.96 s one after the other; else the 0.96 s that
      begin with it, or at the end of the sound the last ones.

  Returns:
    out.

  Raises:
    UserError: the source, a model or the output folder is at fault. Nothing is left behind, however
      this ends; what SIGKILL leaves goes with the next call for `out`.
  """
  _check(every)
  target = files.new_folder(out)
  opened = _open(Path(source), every)
  _write_results(target, opened, _load(stage1, stage2), every)
  return Path(out)


def predict_all(
  sources: Sequence[Path],
  *,
  stage1: str | Path | None,
  stage2: str | Path | None = None,
  out: str | Path,
  every: float = 1,
) -> Path:
  """As `predict`, of several sources with the same models, each into OUT/{its name without suffix}.

  One that cannot be read does not keep the others from being answered. Called again, it goes on
  with what OUT does not hold yet.

  Raises:
    UserError: before anything is done, a model or folder is at fault, or two sources have one name;
      at the end, sources that could not be answered.
  """
  _check(every)
  files.refuse_bucket(out)
  target, named = Path(out).resolve(), {}
  for source in sources:
    name = source.absolute().name if source.is_dir() else source.stem
    if name in named:
      raise UserError(
        f'{named[name]} and {source} would both be written to {Path(out) / name}: rename one, or '
        'give it another --out'
      )
    named[name] = source
  if not target.is_dir() or any(
    path.name not in named and not path.name.endswith(files.UNFINISHED) for path in target.iterdir()
  ):
    files.new_folder(out)  # else it is an earlier call's
  files.require_place(target / _SUMMARY if target.is_dir() else target)
  models = _load(stage1, stage2)
  failed = []
  for name, source in named.items():
    try:
      opened, folder = _open(source, every), target / name
      if folder.exists() and any(folder.iterdir()):
        if not _is_answered(folder, source, models, every):
          raise UserError(
            f'{folder} is not what this command gives, but of another model, --every or source of '
            'that name, or no answer: remove it, or name another --out'
          )
        say(f'  {folder} is there: remove it to have it answered again')
        continue
      _write_results(folder, opened, models, every)
    except (UserError, OSError) as error:
      if not isinstance(error, UserError) and may_pass(error):
        raise
      say(f'  FAILED: {error}')
      failed.append(str(source))
  if failed:
    others = f'; the others are in {out}' if len(failed) < len(named) else ''
    raise UserError(
      f'{len(failed)} of {len(named)} sources failed, as said above ({", ".join(failed)}){others}'
    )
  return Path(out)


def expand(source: str | Path) -> list[Path]:
  """The videos in a folder that is no clip folder, without what else is there; or just itself."""
  files.refuse_bucket(source)
  source = Path(source)
  if not source.is_dir() or (source / 'frames').exists():
    return [source]
  found = sorted(path for path in source.iterdir() if path.name[0] != '.')
  videos = [path for path in found if path.suffix.lower() in VIDEOS]
  if videos and (others := [path.name for path in found if path not in videos]):
    say(
      f'{source}: not named as videos, so passed over: {", ".join(others[:5])}'
      + (f' and {len(others) - 5} more' if len(others) > 5 else '')
    )
  return videos or [source]


class _Source(NamedTuple):
  path: Path
  windows: Iterator[Window]
  frames: int  # that are expected; 0 if it is not known


class _Models(NamedTuple):
  stage1: str | Path | None
  stage2: str | Path | None
  answer: Callable[[Frames, np.ndarray], tuple[np.ndarray, np.ndarray | None]]
  digests: dict[str, str]
  names: Sequence[str]  # of classes


def _load(stage1: str | Path | None, stage2: str | Path | None) -> _Models:
  answer, digests = load_models(stage1, stage2)
  return _Models(stage1, stage2, answer, digests, () if stage2 is None else class_names(stage2))


def _check(every: float) -> None:
  if not (0.01 <= every <= 3600 and round(every * 1e3, 6).is_integer()):
    raise UserError(
      f'--every {every} is no time from a frame to the next: use 0.01 to 3600 s, in ms'
    )


def _is_answered(folder: Path, source: Path, models: _Models, every: float) -> bool:
  """Whether a folder has the results of this source by these models, wherever they lie."""
  if not (folder / _SUMMARY).exists():
    return False
  summary = files.read_json(folder / _SUMMARY, dict, f'remove {folder}')
  facts = _facts(source, models, every)
  return all(summary.get(key) == facts[key] for key in ('every', 'digests'))


def _facts(source: Path, models: _Models, every: float) -> dict[str, str | float | dict | None]:
  """The part of a summary that says what was answered by what."""
  return {
    'source': str(source),
    'every': every,
    'stage1': None if models.stage1 is None else str(models.stage1),
    'stage2': None if models.stage2 is None else str(models.stage2),
    'digests': {'source': _digest(source), **models.digests},
  }


def _digest(source: Path) -> str:
  total = hashlib.sha256()
  paths = [source] if source.is_file() else [*_frame_paths(source), *source.glob('audio.wav')]
  for path in paths:
    with open(path, 'rb') as file:
      total.update(hashlib.file_digest(file, 'sha256').digest())
  return total.hexdigest()[:16]


def _open(source: Path, every: float) -> _Source:
  if source.is_file():
    expected = max(1, round(claimed_seconds(source) / every))
    return _Source(source, read_windows(source, WINDOW_FRAMES, every), expected)
  if every != 1:
    raise UserError(f'{source} has one frame a second: --every is for videos, leave it out')
  paths = _frame_paths(source)
  return _Source(source, read_clip_folder(source), len(paths))


def _write_results(target: Path, source: _Source, models: _Models, every: float) -> None:
  """The folder of results of one source, see `predict`."""
  # One window is read while the one before it is answered and the one before that is written.
  heard = _ahead(_hear(source, every))
  answered = _ahead((images, *models.answer(images, log_mel)) for images, log_mel in heard)
  with files.writing_folder(target) as working:
    summary = []
    with Progress(source.path.name, source.frames, 'frames') as progress:
      for images, masks, classes in answered:
        for i, image in enumerate(images):
          ids = None if classes is None else classes[i]
          entry = _write_frame(working, len(summary), image, masks[i], ids, models.names)
          summary.append({'second': len(summary) * every, **entry})
        progress.advance_to(len(summary))
    if source.path.is_file():
      # Read back one by one: the masks of a long video need not fit into memory.
      named = models.stage2 is not None
      drawn = working / ('classes' if named else 'masks')
      draw = overlay if named else overlay_binary
      with Progress('overlay.mp4', len(summary), 'masks') as progress:

        def maps():
          for t in range(len(summary)):
            progress.advance(1)
            yield read_image(drawn / f'{t}.png')[..., 0]

        write_overlay_video(working / 'overlay.mp4', source.path, maps(), draw, every)
    files.write_json(
      working / _SUMMARY,
      {
        **_facts(source.path, models, every),
        'seconds': len(summary) * every,
        'frames': summary,
      },
    )


def read_clip_folder(folder: str | Path) -> Iterator[Window]:
  """Cuts a clip folder into windows of at most WINDOW_FRAMES frames, as read_windows does a video.

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
      [read_image(path, upright=True) for path in paths[start : start + WINDOW_FRAMES]],
      waveform[start * audio.SAMPLE_RATE : (start + WINDOW_FRAMES) * audio.SAMPLE_RATE],
      start,
    )
    for start in range(0, len(paths), WINDOW_FRAMES)
  )


def _frame_paths(folder: Path) -> list[Path]:
  """The frames of a clip folder, in the order of their numbers."""
  advice = 'give videos, a folder of them, or one with frames/0.jpg, 1.jpg, ... and audio.wav'
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


def _hear(source: _Source, every: float) -> Iterator[tuple[Frames, np.ndarray]]:
  """Frames of each window with log-mel examples [T 96 64]; the last one fills up at the end."""
  last, repeated = None, 0
  for images, waveform, _ in source.windows:
    if every == 1:
      examples = audio.log_mel_examples(waveform)
    else:
      step, length = round(every * audio.SAMPLE_RATE), audio.samples_needed(1)
      begin = [min(i * step, len(waveform) - length) for i in range(len(images))]
      examples = np.concatenate([audio.log_mel_examples(waveform[i : i + length]) for i in begin])
    repeated += max(0, len(images) - len(examples))
    log_mel, _ = audio.fit_examples(examples if len(examples) else last, len(images))
    last = log_mel[-1:]
    yield images, log_mel
  if repeated:
    say(f'{source.path}: the sound is {repeated} s too short, its last second stands in for these')


def _ahead(items: Iterator[_T]) -> Iterator[_T]:
  """The same items in order; while one is in use a thread makes the next."""
  end = object()
  with ThreadPoolExecutor(1) as thread:
    coming = thread.submit(next, items, end)
    while (item := coming.result()) is not end:
      coming = thread.submit(next, items, end)
      yield item


def load_models(
  stage1: str | Path | None, stage2: str | Path | None
) -> tuple[Callable[[Frames, np.ndarray], tuple[np.ndarray, np.ndarray | None]], dict[str, str]]:
  """The models of one or both stages as one function.

  Args:
    stage1: as `predict`.
    stage2: as `predict`.

  Returns:
    (frames, log_mel float32 [T 96 64]) -> masks uint8 [T e e] of 0 and 255, and class ids uint8
    [T e e] or None without stage 2; and the digest of each stage's numbers.

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

  stages = {'stage1': first, 'stage2': second}
  return answer, {name: digest(stage.variables) for name, stage in stages.items() if stage}


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


def _write_frame(
  folder: Path,
  number: int,
  image: np.ndarray,
  mask: np.ndarray,
  classes: np.ndarray | None,
  names: Sequence[str],
) -> dict:
  """Writes the images of one frame and returns what summary.json has of it."""
  height, width = image.shape[:2]

  def write(name: str, picture: np.ndarray) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(picture).save(path, quality=90)  # of JPEG; PNG ignores it

  def fit(ids: np.ndarray) -> np.ndarray:
    return cv2.resize(ids, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)

  mask = fit(mask)
  write(f'masks/{number}.png', mask)
  found = []
  if classes is None:
    drawn = overlay_binary(image, mask)
  else:
    classes = fit(classes)
    write(f'classes/{number}.png', classes)
    drawn = overlay(image, classes)
    counts = np.bincount(classes.ravel())
    ids = [i for i in np.argsort(-counts, kind='stable').tolist() if i and counts[i]]
    found = [{'id': i, 'name': names[i], 'share': counts[i] / classes.size} for i in ids]
  write(f'overlays/{number}.jpg', drawn)
  return {'sounding_share': np.mean(mask > 0).item(), 'classes': found}
