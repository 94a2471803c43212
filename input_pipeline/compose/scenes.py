"""Who is seen and heard in a clip of a composed set: the plan, the pictures, the sound."""

import pathlib
from typing import NamedTuple

import numpy as np

from .. import avsbench, errors
from ..audio import SAMPLE_RATE
from ..avsbench import SUBSETS
from ..clips import SPLITS
from .looks import Picture, background, drawn_picture, load_picture
from .sounds import Sound, load_recording, synthetic_sound

_FIRST = ('dog', 'guitar', 'car', 'bird', 'drum', 'violin', 'man', 'helicopter', 'cat', 'piano',
          'train', 'baby', 'trumpet', 'horse', 'clock', 'woman')  # fmt: skip
# The 70 classes, varied ones first: a set of n classes has the first n.
CLASSES = _FIRST + tuple(name for name in avsbench.CLASSES[1:] if name not in _FIRST)

_VARIANTS, _TEST_VARIANTS = 6, 2  # of each class's look and sound; the last ones only in test
_SOUND_START = int(0.02 * SAMPLE_RATE)  # see _mix


class Thing(NamedTuple):
  """A class: its pictures and sounds, those of the train and val splits and those of test."""

  name: str
  pictures: tuple[Picture, ...]
  sounds: tuple[Sound, ...]
  test_pictures: tuple[Picture, ...]
  test_sounds: tuple[Sound, ...]


class Plan(NamedTuple):
  """What happens in a clip of T seconds with K objects; object 0 is drawn first, the last in front.

  things holds K Things; sounding, bool [T, K], tells who sounds when, and labelled, of the same
  shape, whose pixels the labels show; rng draws the rest.
  """

  uid: str
  split: str
  subset: str
  things: list[Thing]
  sounding: np.ndarray
  labelled: np.ndarray
  rng: np.random.Generator


def drawn_things(num_classes: int) -> list[Thing]:
  """The first num_classes of CLASSES with drawn shapes and synthetic sounds."""
  last = _VARIANTS - _TEST_VARIANTS
  things = []
  for kind, name in enumerate(CLASSES[:num_classes]):
    pictures = tuple(drawn_picture(kind, v) for v in range(_VARIANTS))
    sounds = tuple(synthetic_sound(kind, v) for v in range(_VARIANTS))
    things.append(Thing(name, pictures[:last], sounds[:last], pictures[last:], sounds[last:]))
  return things


def sprite_things(folder: pathlib.Path) -> list[Thing]:
  """The classes of a sprites folder, by name; see dataset.compose.

  Raises:
    UserError: a class is unknown or incomplete, a file is unusable, or there are too few classes.
  """
  if not folder.is_dir():
    raise errors.UserError(f'the sprites folder {folder} does not exist: name one that does')
  things = []
  for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith('.')):
    if path.name not in CLASSES:
      raise errors.UserError(
        f'{path} is not named after a class: use one of the names in avsbench.CLASSES, such as '
        '"dog"'
      )
    images = sorted(path.glob('*.png'))
    recordings = sorted(p for e in ('wav', 'ogg', 'flac') for p in path.glob(f'*.{e}'))
    if not images or not recordings:
      raise errors.UserError(
        f'{path} holds {len(images)} *.png and {len(recordings)} *.wav, *.ogg or *.flac: a class '
        'needs at least one of each'
      )
    pictures = tuple(load_picture(p) for p in images)
    sounds = tuple(load_recording(p) for p in recordings)
    things.append(
      Thing(path.name, pictures[:-1] or pictures, sounds[:-1] or sounds, pictures[-1:], sounds[-1:])
    )
  if len(things) < 2:
    raise errors.UserError(
      f'the sprites folder {folder} holds {len(things)} class folders: at least 2 are needed'
    )
  return things


def plan_clip(
  things: list[Thing], seed: int, split: str, subset: str, index: int, visible: bool = False
) -> Plan:
  """What happens in one clip; depends on the arguments alone, not on the clips made before.

  What sounds is labelled; or, with `visible`, nothing sounds and everything is labelled.
  """
  numbers = [seed, SPLITS.index(split), list(SUBSETS).index(subset), index]
  rng = np.random.default_rng(np.random.SeedSequence(numbers))
  count = 1 if subset == 'v1s' else int(rng.integers(2, min(3, len(things)) + 1))
  chosen = [things[i] for i in rng.choice(len(things), count, replace=False)]
  uid = _draw_uid(rng, index, SUBSETS[subset])
  sounding = _draw_schedule(rng, count, SUBSETS[subset])
  labelled = np.ones_like(sounding) if visible else sounding
  return Plan(uid, split, subset, chosen, sounding & (not visible), labelled, rng)


def render_clip(plan: Plan, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Draws and mixes a planned clip; uses up the plan's generator.

  Returns:
    frames uint8 [T, H, W, 3] RGB, class ids uint8 [T, H, W], audio int16 [T * 16000].
  """
  rng = plan.rng
  seconds, count = plan.sounding.shape
  (width, height), test = size, plan.split == 'test'
  pictures = [_pick(rng, t.test_pictures if test else t.pictures) for t in plan.things]
  sounds = [_pick(rng, t.test_sounds if test else t.sounds) for t in plan.things]
  ids = [avsbench.CLASSES.index(t.name) for t in plan.things]
  # An area of pi * radius^2 covers about 6 to 14 % of a 4:3 frame.
  radii = rng.uniform(0.16, 0.245, count) * min(size)
  turn = rng.uniform(-0.1, 0.1, count)  # radians a second
  angles = rng.uniform(-0.4, 0.4, count) + turn * np.arange(seconds)[:, None]
  centres = np.round(_draw_paths(rng, radii, size, seconds)).astype(int)

  pan = rng.integers(-2, 3, 2)  # pixels a second that the camera moves
  margin = np.abs(pan) * (seconds - 1)
  scene = background(rng, width + int(margin[0]), height + int(margin[1]))
  frames = np.empty((seconds, height, width, 3), np.uint8)
  targets = np.zeros((seconds, height, width), np.uint8)
  for t in range(seconds):
    left, top = np.maximum(-pan, 0) * (seconds - 1) + pan * t
    image = scene[top : top + height, left : left + width].copy()
    for k in range(count):
      rgb, alpha = pictures[k](radii[k], angles[t, k])
      inside, cut = _clip_to_image(centres[t, k], alpha.shape[0], size)
      rgb, alpha = rgb[cut], alpha[cut]
      image[inside] += alpha[..., None] * (rgb - image[inside])
      targets[t][inside][alpha > 0.5] = ids[k] if plan.labelled[t, k] else 0
    frames[t] = image
  return frames, targets, _mix(rng, sounds, plan.sounding)


def _pick(rng, options):
  return options[rng.integers(len(options))]


def _draw_uid(rng, index: int, seconds: int) -> str:
  """Such as _aldtLqTVYI_1000_11000: a video id and a range in milliseconds."""
  letters = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789'
  first = ('-', '_', letters, letters)[(index + 3) % 4]  # a quarter each; careless tools stumble
  video = rng.choice(list(first)) + ''.join(rng.choice(list(letters + '-_'), 10))
  start = 1000 * int(rng.integers(0, 200))
  return f'{video}_{start}_{start + 1000 * seconds}'


def _draw_schedule(rng, count: int, seconds: int) -> np.ndarray:
  """Who sounds when, bool [seconds, count].

  A single object always sounds. Of several, any but one may stay silent throughout; every other
  one sounds at least once.
  """
  if count == 1:
    return np.ones((seconds, 1), bool)
  voices = rng.permutation(count)[: rng.integers(1, count + 1)]
  while True:
    sounding = np.zeros((seconds, count), bool)
    for t in range(seconds):
      how_many = min(rng.choice(3, p=(0.18, 0.62, 0.2)), len(voices))
      sounding[t, rng.permutation(voices)[:how_many]] = True
    if sounding[:, voices].any(0).all():
      return sounding


def _draw_paths(rng, radii: np.ndarray, size: tuple[int, int], seconds: int) -> np.ndarray:
  """Centres in pixels, [seconds, count, 2] as (x, y): straight motion, reflected at the borders.

  Of many draws the first is taken that leaves most of every object visible, or else the best.
  """
  tries, count = 64, len(radii)
  low, high = radii[:, None], np.array(size) - radii[:, None]
  start = rng.uniform(0, 1, (tries, 1, count, 2)) * (high - low)
  speed = rng.uniform(-0.09, 0.09, (tries, 1, count, 2)) * min(size)
  travelled = start + speed * np.arange(seconds)[:, None, None]
  paths = low + (high - low) - np.abs(travelled % (2 * (high - low)) - (high - low))
  gaps = np.full(tries, np.inf)
  for a in range(count):
    for b in range(a):
      distance = np.linalg.norm(paths[:, :, a] - paths[:, :, b], axis=-1)
      gaps = np.minimum(gaps, distance.min(1) / (radii[a] + radii[b]))
  enough = gaps >= 0.8
  return paths[np.argmax(enough) if enough.any() else np.argmax(gaps)]


def _clip_to_image(centre, side: int, size):
  """The part of the image that a square patch covers, and the part of the patch inside it."""
  inside, cut = [], []
  for middle, length in zip(centre[::-1], size[::-1]):
    start = middle - side // 2
    first, last = max(start, 0), min(start + side, length)
    inside.append(slice(first, last))
    cut.append(slice(first - start, last - start))
  return tuple(inside), tuple(cut)


def _mix(rng, sounds, sounding: np.ndarray) -> np.ndarray:
  """The clip's audio, int16 [T * 16000].

  VGGish example i covers the seconds 0.96 i to 0.96 i + 0.96 and lags frame i by up to 0.36 s, so
  second i is heard from i + 0.02 to i + 0.62: inside example i, and in no other, up to i = 9.
  """
  seconds = len(sounding)
  hiss = rng.standard_normal(seconds * SAMPLE_RATE, np.float32)
  audio = hiss * np.float32(rng.uniform(0.001, 0.003))
  ramp = np.sin(np.linspace(0, np.pi / 2, 160)) ** 2  # 10 ms
  for t, k in np.argwhere(sounding):
    burst = sounds[k](rng) * np.float32(0.08 * 10 ** (rng.uniform(-4, 4) / 20))
    burst *= min(1, 0.45 / np.abs(burst).max())  # so that two at once do not clip
    burst[:160] *= ramp
    burst[-160:] *= ramp[::-1]
    start = t * SAMPLE_RATE + _SOUND_START
    audio[start : start + len(burst)] += burst
  return np.round(audio * 32767).astype(np.int16)
