"""How fast embedding is beside its parts: `python benchmarks/embed.py`.

Three stages take turns, each in a process of its own that is frozen while the others run (see measure.py):

    loader   the clean views of whole segments, as `python -m simsiam_dali.embed` asks for them
    model    the encoder's forward pass on such a batch, which always is on the device
    embed    both, and the parts written to the disk, by the command's own loop

A sample is a segment. On a GPU the first two overlap, and embed is to be at 90% or more of the slower one. On a CPU
they share the cores: no order of the work can be faster than 1 / (1 / loader + 1 / model), printed beside it.
Without --shards, generated songs are packed into the cache folder.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import material
import torch
from measure import Stage, interleaved, summary
from torch import Tensor

from simsiam_dali.common.distributed import World, choose_device
from simsiam_dali.common.errors import one_line_errors
from simsiam_dali.common.shipped import config_file
from simsiam_dali.config.load import default_config_file, load_config
from simsiam_dali.config.schema import Config
from simsiam_dali.data.shards import open_shards
from simsiam_dali.embedding.features import CHECKPOINT, encoder_features
from simsiam_dali.embedding.write import PartialResults, embed_batches, embedding_config
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training.data import create_loader, log_mel_settings, view_seconds, with_statistics
from simsiam_dali.training.throughput import StepClock

KINDS = ("loader", "model", "embed")
MEAN_DB, STD_DB = -20.0, 20.0
"""Statistics of the log-mel, which the trainer measures; no speed depends on them."""


@dataclass(frozen=True)
class Spec:
    """A stage to open; `config` as the command would have it."""

    kind: str
    config: Config
    device: str
    scratch: Path  # folder for the parts


def open_stage(spec: Spec) -> Stage:
    """Open the stage in this process; its encoder has random weights."""
    device = choose_device(spec.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    config, shards, world = spec.config, open_shards(spec.config.data.shards), World(0, 1, device)
    log_mel = with_statistics(log_mel_settings(config), MEAN_DB, STD_DB)
    kind = encoder_type(config)
    features = encoder_features(CHECKPOINT, encoder_type(config).create(pretrained=False).eval(), config, device)
    if spec.kind == "model":
        shape = kind.input_shapes(log_mel, view_seconds(config, shards))[0]
        data = torch.randn(config.encoder.batch_size, *shape, device=device)
        return Stage(forwards(features.compute, data), device)
    loader = create_loader(config, shards, log_mel, world, "train", features.mode)
    if spec.kind == "loader":
        return Stage((batch.segment for batch in loader.endless()), device)
    clock = StepClock(device)
    results = PartialResults(spec.scratch, {}).__enter__()  # to the end of this process
    batches = clock.batches(loader.endless())
    return Stage(embed_batches(features, batches, results, "train", loader.state_dict), device, clock=clock)


def forwards(of: Any, data: Tensor) -> Iterator[Tensor]:
    """The forward pass again and again, at most one ahead of the device."""
    rows, clock = torch.arange(len(data)), StepClock(data.device)

    def same() -> Iterator[Tensor]:
        while True:
            yield data

    for batch in clock.batches(same()):
        of(batch)
        yield rows


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="embed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shards", type=Path, metavar="DIR", help="shards to embed (default: generated songs)")
    add("--config", type=config_file, metavar="FILE", help="of the encoder (default: configs/gpu.yaml or cpu.yaml)")
    add("--set", action="append", default=[], metavar="a.b=c", dest="assignments", help="any setting of it")
    add("--batch-size", type=int, metavar="N", help="segments a batch (default: as embed chooses)")
    add("--device", choices=["auto", "cpu", "gpu"], default="auto", help="auto takes the GPU when there is one")
    add("--seconds", type=float, default=5.0, metavar="S", help="length of a window (default: %(default)s)")
    add("--windows", type=int, default=5, metavar="N", help="windows of each stage (default: %(default)s)")
    add("--json", type=Path, metavar="F", help="write the results here")
    return parser


def say(line: str) -> None:
    """Progress; results go to standard output."""
    print(line, file=sys.stderr, flush=True)


@one_line_errors
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the stages' processes are ended
    device = choose_device(args.device)
    trained = load_config(args.config or default_config_file(device.type), {}, {}, args.assignments)
    folder = args.shards or material.packed_generated(
        material.enough_segments({args.batch_size or trained.encoder.batch_size}), machine.cores()
    )
    seconds = open_shards(folder).segment_seconds
    config = embedding_config(trained, seconds, batch=args.batch_size, data__shards=folder)
    with tempfile.TemporaryDirectory() as scratch:
        how = {kind: (open_stage, (Spec(kind, config, args.device, Path(scratch)),)) for kind in KINDS}
        timed, errors = interleaved(how, args.windows, args.seconds, say=say)
    if errors:
        raise errors[0]
    stages = {kind: summary(windows, seconds) for kind, windows in timed.items()}
    rate = {kind: stages[kind]["samples_per_s"] for kind in KINDS}
    shared = 1 / (1 / rate["loader"] + 1 / rate["model"])
    ratios = {
        "embed_over_slower": rate["embed"] / min(rate["loader"], rate["model"]),
        "embed_over_shared": rate["embed"] / shared,
    }
    name = f"{config.encoder.encoder_type} {encoder_type(config).variant}"
    print(f"{name} on {device.type}, {machine.cores()} cores")
    print(f"segments of {seconds:g} s, {config.encoder.batch_size} a batch, {config.data.threads} DALI threads")
    for kind in KINDS:
        s = stages[kind]
        print(f"{kind:8} {s['samples_per_s']:8.2f} segments/s ({s['low']:.2f} to {s['high']:.2f}),"
              f" {s['audio_hours_per_s']:.3g} audio-h/s")  # fmt: skip
    print(f"embed over the slower of loader and model: {ratios['embed_over_slower']:.2f}")
    print(f"embed over what both can reach on shared cores ({shared:.2f}): {ratios['embed_over_shared']:.2f}")
    print(f"share of the time spent waiting for data: {stages['embed']['data_wait_share']:.0%}")
    if args.json:
        doc = {"environment": machine.environment(device), "stages": stages, "ratios": ratios}
        args.json.write_text(json.dumps(doc, indent=1) + "\n")


if __name__ == "__main__":
    main()
