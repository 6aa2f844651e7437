"""Gradient accumulation: how many segments pass the encoder at once, so that a step fits in memory.

Chosen by the estimate of `memory`, then, on a GPU, by a trial step on random data before the first step. A step
accumulates the gradients of `encoder.batch_size / train.micro_batch` micro-batches; batch norm is computed over each
micro-batch, where the published code of SimSiam takes it over all GPUs.
"""

import torch

from simsiam_dali.common.distributed import World
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import replace_settings
from simsiam_dali.config.schema import Config
from simsiam_dali.data.loader import Batch
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.models.recompute import recompute_blocks
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training import memory
from simsiam_dali.training.data import log_mel_settings, seconds_of_views, view_seconds
from simsiam_dali.training.learner import Learner, autocast_dtype

NATIVE_RATE = 48000
"""Assumed of songs that are packed at their own rates, Hz."""

TRIED_ON = ("cuda",)
"""Device types with a trial step: on a CPU the kernel kills the process instead of raising an error."""


def candidates(config: Config) -> list[int]:
    """The possible micro-batches, the largest first. Raises UserError where the configured one is not possible."""
    size, chosen = config.encoder.batch_size, config.train.micro_batch
    whole = encoder_type(config).is_contrastive
    if chosen == "auto":
        # A contrastive loss on a part of the batch is another loss.
        return [size] if whole else [n for n in range(size, 1, -1) if size % n == 0]
    if size % chosen:
        raise UserError(f"train.micro_batch is {chosen}, which does not divide encoder.batch_size, {size}")
    if whole and chosen != size:
        raise UserError(
            f"train.micro_batch is {chosen}, but the loss of {config.encoder.encoder_type} compares all segments of a"
            " step: leave it at auto, and use a smaller --batch-size"
        )
    return [chosen]


def choose_by_estimate(config: Config, shards: ShardSet, world: World) -> Config:
    """The config with `train.micro_batch` as a number: the largest that fits by the estimate, on every rank.

    Raises UserError where none does.
    """
    kind, shapes, dali = encoder_type(config), _input_shapes(config, shards), _dali_bytes(config, shards)
    optimizer = kind.settings.optimizer
    half = autocast_dtype(config.train.precision, world.device) != torch.float32
    with torch.device("meta"):  # an encoder of its own, only to count its bytes
        encoder = kind.create(pretrained=False)
    if config.train.activation_checkpointing:
        recompute_blocks(encoder)
    largest, refusal = 0, ""
    for size in candidates(config):
        try:
            warning = memory.check_fits(encoder, size, shapes, half, world.device, dali, optimizer)
        except UserError as e:
            refusal = refusal or str(e)
            continue
        if warning and config.train.micro_batch != "auto":
            world.print(warning)
        largest = size
        break
    # Ranks may have unequal free memory, such as where one GPU also draws a desktop, and must make equal steps.
    size, refusal = min(world.gather((largest, refusal)))
    if not size:
        raise UserError(refusal)
    return replace_settings(config, train__micro_batch=size)


def choose_by_trial_step(
    config: Config, learner: Learner, shards: ShardSet, world: World, keep: bool = False
) -> Config:
    """The config with the largest micro-batch, from its own downwards, whose trial step does not run out of memory.

    keep: only its own is tried: a resumed run must make the steps it made before, and a size that was asked for is not
    exchanged for another. The same on all ranks; the learner then accumulates as many. Raises UserError where not even
    the smallest runs.

    Nothing is tried with `train.sync_bn` on several ranks: where one ran out of memory, the others would wait for its
    batch-norm statistics.
    """
    if config.train.sync_bn and world.size > 1:
        return config
    shapes = _input_shapes(config, shards)
    first = config.train.micro_batch_of(config.encoder.batch_size)
    sizes = [n for n in candidates(replace_settings(config, train__micro_batch="auto")) if n <= first]
    for size in sizes[:1] if keep else sizes:
        fits = True
        try:
            data = [torch.rand(size, *shape, device=world.device) for shape in shapes]
            beside = bytes_beside(config, learner, shards, size)
            data.append(torch.empty(beside, dtype=torch.uint8, device=world.device))
            segment = torch.arange(size) % len(shards.segments)
            with memory.out_of_memory_as_one_error():
                learner.trial_step(Batch(tuple(data[:-1]), segment))
        except torch.OutOfMemoryError:
            fits = False
        data = []
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        if all(world.gather(fits)):
            learner.micro_batches = config.encoder.batch_size // size
            return replace_settings(config, train__micro_batch=size)
    if keep:
        raise UserError(
            f"out of memory on {world.device} with {first} segments at once, which the run was told to take or began"
            " with: free the memory that other programs use, or start a run with another train.micro_batch"
        )
    raise UserError(
        f"out of memory on {world.device} with {sizes[-1]} segments at once: use shorter views"
        " (--set data.view_seconds=...), a smaller --batch-size or backbone"
    )


def bytes_beside(config: Config, learner: Learner, shards: ShardSet, size: int) -> int:
    """What a step needs beside the trial step: DALI's buffers for `size` segments, and the optimizer's state."""
    state = memory.BYTES_PER_PARAMETER[encoder_type(config).settings.optimizer] - 8  # without weight and gradient
    parameters = sum(p.numel() for p in learner.encoder.parameters())
    return state * parameters + round(size * _dali_bytes(config, shards)[1])


def _dali_bytes(config: Config, shards: ShardSet) -> tuple[float, float]:
    views = seconds_of_views(config, shards) if encoder_type(config).batches == "views" else 0.0
    samples = shards.segment_seconds * (shards.sample_rate or NATIVE_RATE)
    return memory.dali_bytes(samples, views, log_mel_settings(config))


def _input_shapes(config: Config, shards: ShardSet) -> list[tuple[int, ...]]:
    return encoder_type(config).input_shapes(log_mel_settings(config), view_seconds(config, shards))
