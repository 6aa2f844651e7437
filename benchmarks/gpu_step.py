"""The training step on a GPU: does the host wait for it, and what memory does it take? python benchmarks/gpu_step.py

Two parts, each in processes of their own:

    waits   --steps of training, loader and all, under `torch.cuda.set_sync_debug_mode("error")`: the first call of
            torch that makes the host wait for the GPU ends it. The clock's events are no such call: the host waits for
            the step before the last, so that it runs at most one ahead. CUDA only.
    sizes   some steps at each of --batch-sizes, all of a batch at once, on data that always was on the device. On CUDA
            with peak_bytes (max_memory_allocated) and reserved_bytes (max_memory_reserved), beside parameter_bytes
            (weights, gradients, momentum) and kept_bytes (activations, `simsiam_dali.training.memory`); working_share,
            that is (peak - parameter) / kept, is the first of `memory.GPU_SHARES`, that of reserved_bytes the second.

Without CUDA the memory is null, and what was not measured is listed by name.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import machine
import material
import torch
from document import write
from stages import Spec, open_stage, random_batch

from simsiam_dali.common.distributed import World, choose_device
from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.common.shipped import config_file
from simsiam_dali.config.load import default_config_file, load_config, replace_settings
from simsiam_dali.config.schema import Config
from simsiam_dali.data.shards import open_shards
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training import memory
from simsiam_dali.training.data import log_mel_settings, view_seconds
from simsiam_dali.training.learner import Learner

WARM_UP = 3
"""Steps before those that are timed or watched: cuDNN tries its algorithms, the optimizer makes its momentum."""


def waits(config: Config, steps: int) -> dict[str, Any]:
    """Train `steps` steps in which no call of torch may make the host wait. Raises UserError at the first that does."""
    stage = open_stage(Spec("train", config, "gpu", workers=1))
    for _ in islice(stage.batches, WARM_UP):
        pass
    stage.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in islice(stage.batches, steps):
            pass
    except RuntimeError as e:
        raise UserError(f"the step waits for the GPU: {str(e).splitlines()[0]}") from e
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"steps": steps, "batch_size": config.encoder.batch_size, "calls_that_wait": 0}


def size(config: Config, steps: int) -> dict[str, Any]:
    """One entry of `sizes`: `steps` steps of a whole batch at once."""
    device = choose_device(config.train.device)
    shards, world, cuda = open_shards(config.data.shards), World(0, 1, device), device.type == "cuda"
    log_mel, batch_size = log_mel_settings(config), config.encoder.batch_size
    shapes = encoder_type(config).input_shapes(log_mel, view_seconds(config, shards))
    learner = Learner(config, shards, world)
    learner.encoder.train()
    batch = random_batch(config, shards, device)
    entry: dict[str, Any] = {"batch_size": batch_size, "precision": str(learner.dtype).removeprefix("torch.")}
    trained = memory.BYTES_PER_PARAMETER[encoder_type(config).settings.optimizer]
    entry["parameter_bytes"] = sum(
        p.numel() * (trained if p.requires_grad else p.element_size()) for p in learner.encoder.parameters()
    )
    kept = memory.activation_bytes(learner.encoder, shapes) * (0.5 if learner.half else 1.0)
    entry["kept_bytes"] = round(kept * batch_size)
    wait: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    for number in range(WARM_UP + steps):
        if number == WARM_UP:
            wait()
            began = time.perf_counter()
        learner.step([batch], 0.0, 0.0)
    wait()
    entry["samples_per_s"] = steps * batch_size / (time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated(device) if cuda else None
    entry["peak_bytes"] = peak
    entry["reserved_bytes"] = torch.cuda.max_memory_reserved(device) if cuda else None
    entry["working_share"] = (peak - entry["parameter_bytes"]) / entry["kept_bytes"] if peak else None
    return entry


def _answer(measured: Callable[[], dict[str, Any]], pipe: Any) -> None:
    try:
        with memory.out_of_memory_as_one_error():
            pipe.send(measured())
    except (UserError, torch.OutOfMemoryError) as e:
        pipe.send(str(e).splitlines()[0])


def alone(measured: Callable[[], dict[str, Any]]) -> dict[str, Any] | str:
    """What it returns in a process of its own, which leaves no memory behind; a line where it cannot."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(measured, theirs))
    process.start()
    theirs.close()
    try:
        answer: dict[str, Any] | str = ours.recv()
    except (EOFError, OSError):  # a reset, or the end in the middle of an answer
        answer = "the process died (its own message stands above, if it had one)"
    process.join()
    return answer


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="gpu_step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shards", type=Path, metavar="DIR", help="shards to train on (default: generated songs)")
    add("--config", type=config_file, metavar="FILE", help="of the training (default: configs/gpu.yaml or cpu.yaml)")
    add("--set", action="append", default=[], metavar="a.b=c", dest="assignments", help="any setting of it")
    add("--batch-sizes", type=int, nargs="+", default=[], metavar="N", help="of `sizes` (default: the config's)")
    add("--steps", type=int, default=10, metavar="N", help="steps of each part (default: %(default)s)")
    add("--json", type=Path, metavar="F", help="write the results here")
    return parser


@one_line_errors
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    config = load_config(args.config or default_config_file(choose_device("auto").type), {}, {}, args.assignments)
    device = choose_device(config.train.device)
    sizes = args.batch_sizes or [config.encoder.batch_size]
    folder = args.shards or material.packed_generated(material.enough_segments(set(sizes)), machine.cores())
    config = replace_settings(config, data__shards=folder)
    if config.data.threads == "auto":
        config = replace_settings(config, data__threads=machine.cores())
    failed: list[str] = []
    doc: dict[str, Any] = {"environment": machine.environment(device), "waits": None, "sizes": [], "skipped": []}

    def keep() -> None:
        if args.json:
            write(doc, args.json)

    if device.type == "cuda":
        count = open_shards(folder).count("train")
        own = replace_settings(config, encoder__batch_size=min(config.encoder.batch_size, count))
        answer = alone(partial(waits, own, args.steps))
        if isinstance(answer, str):
            failed.append(answer)
        else:
            doc["waits"] = answer
            print(f"no call of torch waits for the GPU in {args.steps} steps", flush=True)
    else:
        doc["skipped"] = ["waits", "peak memory"]
    keep()
    for batch_size in sizes:
        own = replace_settings(config, encoder__batch_size=batch_size, train__micro_batch=batch_size)
        answer = alone(partial(size, own, args.steps))
        # A batch that does not fit is an answer, and part of what is asked.
        entry = {"batch_size": batch_size, "failed": answer} if isinstance(answer, str) else answer
        doc["sizes"].append(entry)
        print(json.dumps(entry), flush=True)
        keep()
    for name in doc["skipped"]:
        print(f"skipped, no CUDA device: {name}")
    if all("failed" in entry for entry in doc["sizes"]):
        failed.append("not one batch size could be measured")
    if failed:
        raise UserError("\nerror: ".join(failed))


if __name__ == "__main__":
    main()
