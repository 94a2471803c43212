"""AdamW as in the release, with the schedule of the config."""

from collections.abc import Callable

import jax
import ml_collections
import optax


def make_optimizer(
  config: ml_collections.ConfigDict,
  learning_rate: float,
  steps: int,
  is_late: Callable[[str], bool] | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Optimiser of one phase of `steps` steps, and its learning rate by step of the phase.

  Betas 0.9 and 0.999, eps 1e-8, weight decay on every trained parameter; gradients clipped to the
  global norm config.clip_norm if that is positive. The parameters whose paths `is_late` have a
  count of steps of their own.
  """
  if config.schedule == 'cosine':
    schedule = optax.warmup_cosine_decay_schedule(
      0.0, learning_rate, config.warmup_steps, max(steps, config.warmup_steps + 1)
    )
  elif config.warmup_steps:
    schedule = optax.join_schedules(
      [
        optax.linear_schedule(0.0, learning_rate, config.warmup_steps),
        optax.constant_schedule(learning_rate),
      ],
      [config.warmup_steps],
    )
  else:
    schedule = optax.constant_schedule(learning_rate)
  adamw = optax.adamw(schedule, weight_decay=config.weight_decay)
  if is_late:
    adamw = optax.partition(
      {'early': adamw, 'late': adamw},
      lambda params: {path: 'late' if is_late(path) else 'early' for path in params},
    )
  if config.clip_norm > 0:
    adamw = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
  return adamw, schedule


def taken_over(fresh: optax.OptState, old: optax.OptState) -> optax.OptState:
  """The state that an optimiser begins with, but for what is early, which is as in an old one."""
  late = jax.tree_util.DictKey('late')  # has counted steps all the same
  known = {path: x for path, x in jax.tree_util.tree_flatten_with_path(old)[0] if late not in path}
  return jax.tree_util.tree_map_with_path(lambda path, leaf: known.get(path, leaf), fresh)
