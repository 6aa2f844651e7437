"""The tables of docs/gpu.md that can be made without a GPU: what fits on which card, and where each operator runs.

make_docs.py writes them. Nothing is measured here: the first is the estimate of `simsiam_dali.training.memory` on meta
tensors, the second is the graph as it is defined for a GPU, read back from DALI before it is built.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from nvidia.dali import ops

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config, replace_settings
from simsiam_dali.config.schema import AugmentationConfig, Config
from simsiam_dali.data.graph import Epoch, GraphConfig, LogMel, Source
from simsiam_dali.data.pipeline import PipelineSettings, define
from simsiam_dali.models.recompute import recompute_blocks
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training import memory, micro_batch
from simsiam_dali.training.data import log_mel_settings

ROOT = Path(__file__).resolve().parent.parent
CARDS = (8, 12, 16, 24, 48, 85, 150)
"""GB of 10^9 bytes that are free before the process starts; cards sold with 80 and 141 GB have 85 and 150."""
SEGMENT_SECONDS = 60.0


@dataclass(frozen=True)
class Fit:
    """The largest micro-batch that `memory.check_fits` accepts, with the least and the most that it expects, bytes."""

    size: int
    least: float
    most: float


def fit(config: Config, free: float) -> Fit | None:
    """What `train.micro_batch: auto` takes on a GPU with `free` bytes, in 16 bits, by `memory.check_fits`."""
    shapes = encoder_type(config).input_shapes(log_mel_settings(config), SEGMENT_SECONDS)
    with torch.device("meta"):
        encoder = encoder_type(config).create(pretrained=False)
    if config.train.activation_checkpointing:
        recompute_blocks(encoder)
    kept = memory.activation_bytes(encoder, shapes) / 2
    static = memory.RUNTIME_BYTES + memory.BYTES_PER_PARAMETER["sgd"] * sum(p.numel() for p in encoder.parameters())
    spec = log_mel_settings(config)
    dali = memory.dali_bytes(SEGMENT_SECONDS * spec.sample_rate, config.data.views * SEGMENT_SECONDS, spec)
    device, real = torch.device("cuda", 0), memory.free_bytes
    memory.free_bytes = lambda device: int(free)  # noqa: ARG005
    try:
        for size in micro_batch.candidates(config):
            try:
                memory.check_fits(encoder, size, shapes, True, device, dali)
            except UserError:
                continue
            low, high = (static + size * (share * kept + buffer)
                         for share, buffer in zip(memory.GPU_SHARES, dali, strict=True))  # fmt: skip
            return Fit(size, low, high)
    finally:
        memory.free_bytes = real
    return None


def cards_table() -> Iterator[str]:
    """One row a card."""
    plain = load_config(ROOT / "configs" / "gpu.yaml")
    recomputing = replace_settings(plain, train__activation_checkpointing=True)
    yield "| free memory | micro-batch | expected | micro-batch, activations recomputed | expected |"
    yield "|---|---|---|---|---|"

    def cells(found: Fit | None) -> str:
        if found is None:
            return "none fits | |"
        return f"{found.size} | {found.least / 1e9:.1f} to {found.most / 1e9:.1f} GB |"

    for card in CARDS:
        yield f"| {card} GB | {cells(fit(plain, card * 1e9))} {cells(fit(recomputing, card * 1e9))}"


def gpu_graph() -> GraphConfig:
    """The graph with all there is: 44.1 kHz shards, independent crops, all augmentations, epochs."""
    source = Source((Path("a.tar"),), (Path("a.idx"),), "flac", True, SEGMENT_SECONDS, shuffle_buffer=1024)
    all_drawn = AugmentationConfig(mixup_prob=0.5, crop_prob=0.5)
    return GraphConfig(source, LogMel(), "views", 45.0, all_drawn, "independent", Epoch(1, 2))


@dataclass(frozen=True)
class Operator:
    """One call in a graph: the operator's name in DALI, where it runs, and where its inputs and named arguments lie."""

    name: str
    device: str
    inputs: tuple[str, ...]
    wanted: tuple[str, ...]  # by DALI's schema of it, for inputs where these are
    arguments: tuple[str, ...]

    @property
    def exists(self) -> bool:
        """Whether this DALI has the operator for that device."""
        registered = ops.gpu_ops if self.device == "gpu" else ops.cpu_ops  # type: ignore[attr-defined]  # not in the stub
        return self.name in registered()


def operators(graph: GraphConfig, gpu: int | None) -> list[Operator]:
    """Every operator of a graph in DALI's order."""
    pipeline = define(graph, PipelineSettings(4, threads=1, prefetch=1, seed=0, gpu=gpu))
    pipeline._build_graph()
    found = []
    for call in pipeline._ops:
        schema, device, spec = call._op.schema, call._op.device, call.spec
        inputs = tuple(spec.InputDevice(i) for i in range(spec.NumRegularInput()))
        wanted = tuple(schema.GetInputDevice(i, at, device) or device for i, at in enumerate(inputs))
        arguments = tuple(spec.InputDevice(i) for i in range(spec.NumRegularInput(), spec.NumInput()))
        found.append(Operator(schema.Name(), device, inputs, wanted, arguments))
    return found


def operators_table() -> Iterator[str]:
    """One row for each operator, device and place of its inputs."""

    def places(devices: tuple[str, ...]) -> str:
        return ", ".join(sorted(set(devices))) or "none"

    rows = Counter((each.name, each.device, places(each.inputs), places(each.arguments))
                   for each in operators(gpu_graph(), gpu=0))  # fmt: skip
    yield "| operator | runs on | inputs on | named arguments on | times |"
    yield "|---|---|---|---|---|"
    for (name, device, inputs, arguments), count in sorted(rows.items()):
        yield f"| `{name}` | {device} | {inputs} | {arguments} | {count} |"
    yield f"| all | | | | {sum(rows.values())} |"
