"""What a run of training says at first, and keeps beside its checkpoints: config, list of clips."""

from collections.abc import Sequence

import jax
import ml_collections
from etils import epath

from aavs_jax import checkpoint, distributed, evaluate, stages
from aavs_jax import config as config_lib
from aavs_jax.logging import say
from aavs_jax.state import TrainState
from input_pipeline import pipeline
from input_pipeline.avsbench import Clip
from input_pipeline.errors import UserError

# Keys in which a restarted run may differ from its beginning: they change no weight, given that the
# clips are compared one by one and that the masks are checked.
_FREE_KEYS = (
  'train.log_every_steps', 'train.keep_checkpoints', 'train.init', 'train.accumulate', 'mesh.',
  'data.threads', 'data.workers', 'data.root', 'data.masks', 'data.on_bad_clip',
  'data.max_bad_clips',
)  # fmt: skip


def claim(
  workdir: epath.Path, config: ml_collections.ConfigDict, clips: Sequence[Clip], begun: bool
) -> None:
  """Saves config and list of clips, or, once there is a checkpoint, compares with those saved."""
  path, listing = workdir / 'config.json', workdir / 'clips.json'
  found = [f'{clip.split}/{clip.subset}/{clip.uid}' for clip in clips]
  if not begun:
    if distributed.is_first():
      evaluate.write_json(path, config.to_dict())
      evaluate.write_json(listing, found)
    return
  if checkpoint.read_json(listing) != found:
    raise UserError(
      f'{workdir} was begun with other clips than those of {config.data.root} (see {listing}): '
      'use the same data set or another --workdir'
    )
  changed = [
    line
    for line in config_lib.differences(config_lib.from_json(path), config)
    if not line.startswith(_FREE_KEYS)
  ]
  if changed:
    raise UserError(
      f'{workdir} was begun with another config ({"; ".join(changed[:3])}): '
      'use the same values or another --workdir'
    )


def leave_out_bad(
  config: ml_collections.ConfigDict, workdir: epath.Path, clips: Sequence[Clip]
) -> tuple[Sequence[Clip], list[dict[str, str]]]:
  """Clips to train on and, as config.data.on_bad_clip says, those left out when the run began."""
  if config.data.on_bad_clip == 'error':
    return clips, []
  listing = workdir / 'bad_clips.json'
  if distributed.is_first() and not listing.exists():
    say(f'  reading all {len(clips)} training clips once, to leave out bad ones')
    bad = pipeline.find_bad_clips(clips, config.data.threads)
    pipeline.leave_out(clips, bad, config.data.max_bad_clips)  # too many are not written down
    evaluate.write_json(listing, bad)
  distributed.wait_for_all('bad clips')
  bad = checkpoint.read_json(listing)
  good = pipeline.leave_out(clips, bad, config.data.max_bad_clips)
  for row in bad:
    say(f'  left out {row["clip"]}: {row["text"]}')
  return good, bad


def announce(
  config: ml_collections.ConfigDict,
  workdir: epath.Path,
  lacking: Sequence[str],
  state: TrainState,
  clips: int,
  total: int,
  step: int,
) -> None:
  """Says what is trained on what, and for how long; `lacking`: see stages.first_params."""
  trained, frozen = stages.count(state.trained) / 1e6, stages.count(state.frozen) / 1e6
  say(
    f'  {config.task} task, {trained + frozen:.2f} M parameters, {trained:.2f} M of them trained, '
    f'{clips} clips, {total} steps, {jax.device_count()} {jax.devices()[0].platform} '
    f'device{"s" * (jax.device_count() > 1)}; work folder {workdir}'
  )
  if frozen and not config.train.init:
    say(
      f'  WARNING: {frozen:.2f} M parameters stay at their random initialisation, since '
      'config.train.init names no start'
    )
  if lacking:
    say(f'  not in {config.train.init}, so initialised anew: {stages.in_groups(lacking)}')
  if step:
    say(f'  going on from step {step}')
