"""How many segments pass the encoder at once, so that a step of `encoder.batch_size` fits into memory.

First by the estimate of `memory`, then, on a GPU, by a rehearsal: a forward and a backward pass of random data before
the first step. A step then adds up the gradients of as many micro-batches as make its batch; batch norm goes over each
micro-batch, as it goes over each GPU's own segments in the paper (32 of them, arXiv:2011.10566, section 4.1).
"""

from collections.abc import Callable

import torch

from simsiam_dali import factory, memory
from simsiam_dali.config import Config, changed
from simsiam_dali.data.loader import Batch, Single
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.distributed import World
from simsiam_dali.encoders import encoder_type
from simsiam_dali.errors import UserError
from simsiam_dali.learner import Learner, autocast_dtype
from simsiam_dali.models.recompute import recompute_blocks

REHEARSED = ("cuda",)
"""Kinds of device on which memory ends in an error: on a CPU the kernel kills the process."""


def candidates(config: Config) -> list[int]:
    """The micro-batches that may be taken, the largest first. Raises UserError where the configured one cannot."""
    size, chosen = config.encoder.batch_size, config.train.micro_batch
    whole = encoder_type(config).compares
    if chosen == "auto":
        # A loss that compares a batch's segments is another one on a part of them.
        return [size] if whole else [n for n in range(size, 1, -1) if size % n == 0]
    if size % chosen:
        raise UserError(f"train.micro_batch is {chosen}, which does not divide encoder.batch_size, {size}")
    if whole and chosen != size:
        raise UserError(
            f"train.micro_batch is {chosen}, but {config.encoder.encoder_type} compares all segments of a step:"
            " leave it at auto, and use a smaller --batch-size"
        )
    return [chosen]


def estimated(config: Config, shards: ShardSet, world: World, say: Callable[[str], None]) -> Config:
    """The config with `train.micro_batch` as a number: the largest that fits by the estimate, on every rank.

    Raises UserError where none does.
    """
    log_mel, seconds = factory.log_mel_settings(config), factory.view_seconds(config, shards)
    shapes = encoder_type(config).input_shapes(log_mel, seconds)
    half = autocast_dtype(config.train.precision, world.device) != torch.float32
    with torch.device("meta"):  # an encoder of its own: it is only counted
        encoder = factory.create_encoder(config, pretrained=False)
    if config.train.activation_checkpointing:
        recompute_blocks(encoder)
    largest, refusal = 0, ""
    for size in candidates(config):
        try:
            warning = memory.check_fits(encoder, size, shapes, half, world.device, shards.segment_seconds)
        except UserError as e:
            refusal = refusal or str(e)
            continue
        if warning and config.train.micro_batch != "auto":
            say(warning)
        largest = size
        break
    # Ranks may have unequal memory free, such as where one GPU also draws a desktop, and must make equal steps.
    size, why = min(world.gather((largest, refusal)))
    if not size:
        raise UserError(why)
    return changed(config, train__micro_batch=size)


def rehearsed(config: Config, learner: Learner, shards: ShardSet, world: World, keep: bool = False) -> Config:
    """The config with the largest micro-batch, from its own downwards, of which a rehearsal does not run out of memory.

    keep: only its own will do, as a run that goes on makes the steps it made before. The same on all ranks. Raises
    UserError where not even the smallest runs.
    """
    log_mel, seconds = factory.log_mel_settings(config), factory.view_seconds(config, shards)
    shapes = encoder_type(config).input_shapes(log_mel, seconds)
    first = config.train.micro_batch_of(config.encoder.batch_size)
    sizes = [n for n in candidates(changed(config, train__micro_batch="auto")) if n <= first]
    for size in sizes[:1] if keep else sizes:
        fits = True
        try:
            data = [torch.rand(size, *shape, device=world.device) for shape in shapes]
            data.append(torch.empty(beside_bytes(learner, shards, size), dtype=torch.uint8, device=world.device))
            segment = torch.arange(size) % len(shards.segments)
            learner.rehearse(Batch(data[0], data[1], segment) if len(shapes) == 2 else Single(data[0], segment))
        except torch.OutOfMemoryError:
            fits = False
        data = []
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        if all(world.gather(fits)):
            return changed(config, train__micro_batch=size)
    if keep:
        raise UserError(
            f"out of memory on {world.device} with {first} segments at once, and a run that goes on keeps its"
            " micro-batches: end what else uses the memory, or start a new run"
        )
    raise UserError(
        f"out of memory on {world.device} with {sizes[-1]} segments at once: use shorter views"
        " (--set data.view_seconds=...), a smaller --batch-size or backbone"
    )


def beside_bytes(learner: Learner, shards: ShardSet, size: int) -> int:
    """What a step's memory has to hold beside the rehearsal: DALI's buffers for `size` segments, and the momentum."""
    momentum = 4 * sum(p.numel() for p in learner.encoder.parameters())
    return momentum + round(memory.DALI_BYTES * shards.segment_seconds * size)
