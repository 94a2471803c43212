"""Stage 1 of Stepping Stones on AVSBench-semantic, as released; every other config changes this."""

from collections.abc import Iterable

import ml_collections

RECIPES = ('release', 'paper')  # what the released code does by default; what the paper states


def get_config() -> ml_collections.ConfigDict:
  """The published size and the released recipe."""
  config = ml_collections.ConfigDict()
  config.method = 'aavs'  # a module of aavs_jax.methods, or a dotted name of one of your own
  config.task = 'binary'  # 'binary': what sounds; 'semantic': as what
  config.num_classes = 2  # background included, null class not
  config.use_prior = False  # stage 2: a mask of what sounds enters the decoder
  config.oracle_prior = False  # validation and test take it from the labels, as training does
  config.seed = 0
  config.dtype = 'float32'  # of the computation; what trains and its optimiser stay float32

  config.mesh = ml_collections.ConfigDict()
  config.mesh.fsdp = 1  # devices that share one copy of the parameters

  config.data = ml_collections.ConfigDict()
  config.data.root = ''  # a folder of a data set, such as one in either of AVSBench's layouts
  config.data.masks = ''  # stage 1's masks, the prior of validation and test in stage 2
  config.data.leave_out = (0, 0)  # (k, K): train without part k of K, see cross_fit.py; (0, 0): all
  # Share of training items that hear silence, noise or a clip of what they do not show; no target.
  config.data.negative_sound = 0.0
  config.data.subsets = ('v1s', 'v1m', 'v2')
  config.data.image_size = 384
  config.data.eval_size = 224  # of predictions, masks and metrics
  config.data.item_frames = 0  # frames of one training item: 0 = a whole clip, 5 = half of v2's ten
  # Training clips with one label (v1s): False: its frame stands for all, as AAVS has it; True: all
  # frames as they are, of which one has weight.
  config.data.all_frames = False
  config.data.batch_items = 1  # of all processes; with whole clips, if > 1: slots of 5 frames
  config.data.max_targets = 2  # label values in one frame, at most
  config.data.threads = 4  # that read, in every process or, if there are any, in every worker
  config.data.workers = 0  # processes that read for each process in training
  config.data.on_bad_clip = 'error'  # 'skip': training leaves out clips with a file it cannot use
  config.data.max_bad_clips = 0  # with 'skip': more of them are an error

  # Stage 2 trains on the truth as its prior. The rest is for what it will meet: masks with faults.
  config.prior = ml_collections.ConfigDict()
  config.prior.soft = False  # data.masks holds probabilities of stage 1 and not its decisions
  config.prior.predicted = 0.0  # share of training items with stage 1's masks, by `aavs cross-fit`
  config.prior.none = 0.0  # share of training items without a prior: 128 of 255 in every pixel
  config.prior.missing = 0.0  # in all others: probability that an object that sounds is taken out,
  config.prior.added = 0.0  # that one is put in that does not sound in this second,
  config.prior.moved = 0.0  # share of the side by which edges and place may be off,
  config.prior.wrong = 0.0  # probability that the mask is somewhere else

  config.model = ml_collections.ConfigDict()
  config.model.num_queries = 30
  config.model.adapter_variant = 'replace'  # stage 1; 'after' in stage 2: see models/adapters.py
  config.model.swin = dict(
    embed_dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), window=12, mlp_ratio=4, drop_path=0.3
  )
  config.model.hidden = 256
  config.model.heads = 8
  config.model.encoder_layers = 6
  config.model.encoder_ffn = 1024
  config.model.encoder_points = 4
  config.model.decoder_layers = 9
  config.model.decoder_ffn = 2048
  config.model.audio_hidden = 512
  config.model.adaptive_query = True  # False: the ablation "origin audio query"
  config.model.mask_fusion = True  # the three places of the prior, off in the ablations
  config.model.robust_key = True
  config.model.prior_attention = True
  config.model.sampling = 'gather'  # 'dense' on TPUs and for small maps
  # What the backward pass keeps of layers: all ('none'), of those that repeat the outputs of dense
  # layers ('dots'), nothing ('full'). The rest is computed again, which costs time, saves memory.
  config.model.remat = 'dots'

  config.vggish = ml_collections.ConfigDict()
  config.vggish.conv_widths = (64, 128, 256, 256, 512, 512)
  config.vggish.dense_widths = (4096, 4096)
  config.vggish.embedding = 128
  config.vggish.final_relu = False  # the checkpoints were trained without it

  config.loss = ml_collections.ConfigDict()  # as released; the paper gives none
  config.loss.class_weight = 2.0
  config.loss.mask_weight = 5.0
  config.loss.dice_weight = 5.0
  config.loss.null_weight = 0.1  # of the null class in the class loss
  # The matching has weights of its own: in the release 1 for the class, where the loss has 2.
  config.loss.matching_class_weight = 1.0
  config.loss.matching_mask_weight = 5.0
  config.loss.matching_dice_weight = 5.0
  config.loss.points = 12544  # of the matching, and of each pair's mask and dice loss
  config.loss.oversample = 3  # candidates for each of these
  config.loss.uncertain_share = 0.75  # of them, taken where the logit is nearest to zero

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.lr = 1e-3
  config.optimizer.lr_phase2 = 1e-4
  config.optimizer.weight_decay = 0.05
  config.optimizer.clip_norm = 0.01  # 0 = no clipping
  config.optimizer.warmup_steps = 0
  config.optimizer.schedule = 'constant'  # or 'cosine', to zero at the end of the phase

  config.train = ml_collections.ConfigDict()
  config.train.epochs = 60.0
  config.train.steps = 0  # how long, if not `epochs`
  config.train.accumulate = 1  # parts of a batch that go through the model one after the other
  # From this epoch on the Swin adapters train too, from the best weights so far; before it they are
  # zero. 0: one phase, in which all of `trainable` trains.
  config.train.phase2_epoch = 30
  config.train.trainable = (  # regular expressions, searched in parameter paths
    r'aavs/queries/(features|positions)',
    r'aavs/.*adapter/',
    r'aavs/decoder/class_predictor/',
    r'aavs/audio_projection/',
  )
  config.train.frozen_dtype = 'float32'  # 'bfloat16' stores what does not train in half the memory
  config.train.init = ''  # the start: a work folder (its best weights), or one of its checkpoints
  config.train.eval_every_epochs = 1.0
  config.train.eval_every_steps = 0  # how often, if not `eval_every_epochs`
  config.train.checkpoint_every_steps = 1000
  config.train.keep_checkpoints = 2
  config.train.log_every_steps = 50
  # Seconds without a step, a validated clip or the end of a compilation or a save, after which the
  # process ends, to be started again. On a slow TPU host a compilation takes 900. 0: never.
  config.train.stuck_after = 1800
  return config


def with_recipe(
  config: ml_collections.ConfigDict, recipe: str, paper_epochs: int
) -> ml_collections.ConfigDict:
  """A config as released, or with what the paper's text has otherwise; changed in place.

  Args:
    config: with the released epochs, learning rate and beginning of phase 2.
    recipe: one of RECIPES.
    paper_epochs: how long the paper trains; phase 2 begins after the same share as released.

  Raises:
    ValueError: no such recipe.
  """
  check_variant(recipe, RECIPES)
  if recipe == 'paper':
    # The paper says that adapters are trained, 7.5 M parameters, which are the adapters alone. The
    # class predictor, the audio projection and stage 1's queries begin at random, though, and the
    # release trains them as well: `trainable` stays.
    share = config.train.phase2_epoch / config.train.epochs
    config.train.phase2_epoch = round(share * paper_epochs)
    config.train.epochs = float(paper_epochs)
    config.optimizer.lr = 1e-4
  return config


def check_variant(variant: str, known: Iterable[str]) -> None:
  """Raises ValueError, naming the known ones, if a config file has no such variant."""
  if variant not in known:
    raise ValueError(f'there is no variant {variant!r}: use {" or ".join(known)}')
