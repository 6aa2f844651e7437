"""Samples per second, stage by stage: `python benchmarks/throughput.py`.

One sample is one segment, which gives two views. Without arguments it measures the shards in ./shards or, if there are
none, generated songs, which it keeps in the cache folder; on the GPU if there is one. Every
stage is warmed up; a figure is the median of five windows, and the stages of a group take turns. The stages are
described in benchmarks/stages.py and baselines.py, and what --json writes, after each group, in document.py.
"""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import material
from chart import draw
from document import described, document, view_seconds, write
from measure import interleaved, summary
from result_text import terminal_table
from stages import BASELINE_OF_TRAIN, KINDS, TRAINING, Spec, open_stage

from simsiam_dali.common.distributed import choose_device
from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.common.shipped import config_file
from simsiam_dali.config.load import default_config_file, load_config
from simsiam_dali.config.schema import Config
from simsiam_dali.data.shards import ShardSet, open_shards
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training.data import log_mel_settings

GROUPS = (
    ("loader/read", "loader/decode", "loader/resample", "loader/mel"),
    ("loader/light", "baseline/light", "baseline/songs", "baseline/gpu_light"),
    ("loader/all", "baseline/full", "baseline/gpu_full", "baseline/plain_pitch"),
    ("pack",),
    ("loader/train", "model", "train", "baseline/train", "baseline/gpu_train"),
)
"""Stages that take turns, because they are compared; a group's processes live at the same time."""

LARGE = ("loader/train", "model", "train", "baseline/train", "baseline/gpu_train")
"""Stages that have a GPU to themselves, since together they may fill it."""

OPTIONAL = ("pack", "baseline/songs", "baseline/plain_pitch", "baseline/train")
GPU_ONLY = ("baseline/gpu_light", "baseline/gpu_full", "baseline/gpu_train")

SWEEPS: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "threads": ((1, 2, 4, 8, 16), ("loader/light", "loader/all")),
    "batch": ((4, 16, 64), ("loader/light", "loader/all")),
    "codec": (("flac", "wav", "ogg"), ("loader/decode", "loader/light", "baseline/light")),
    "rate": ((16000, "native"), ("loader/resample", "loader/light", "baseline/light")),
    "seconds": ((5.0, 15.0, 30.0, 60.0), ("loader/light", "loader/all")),
}
"""What a sweep changes: its values, and the stages it measures unless --stages says others."""

LOADER_BATCH, LOADER_SECONDS, LOADER_THREADS = 16, 60.0, 2
"""Of the loader's stages and the baselines on a CPU; on a GPU they have the training's batch, and all cores."""
BASELINE_BATCH = 4
"""On a GPU, of the baselines whose views the CPU makes: a window holds a batch of each worker, minutes with 128."""
SOAK_WINDOWS = 20
LEAST_BATCHES = 16
"""Of the largest batch: in fewer, what happens once an epoch weighs more than on a library of songs."""
MOST_DECODED = 1.02
"""Segments decoded over segments given, above which a loader's rate is not that of its batches."""

Plan = list[dict[str, Spec]]  # groups of stages that take turns, by name


def trains(kind: str) -> bool:
    """Whether a stage goes by the training's config, not by the loader's."""
    return kind in TRAINING or kind in BASELINE_OF_TRAIN


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["auto", "cpu", "gpu"], default="auto", help="auto takes the GPU when there is one")
    add("--stages", nargs="+", metavar="STAGE", help=f"which to measure: {', '.join(KINDS)}")
    add("--batch-size", type=int, metavar="N",
        help=f"segments in a batch (default: the config's for training and on a GPU, else {LOADER_BATCH})")  # fmt: skip
    add("--baseline-batch", type=int, metavar="N",
        help="batch of the baselines that make views on the CPU; their windows hold"
        f" one batch per worker (default: {BASELINE_BATCH} on a GPU, else as the others')")  # fmt: skip
    add("--threads", type=int, metavar="N",
        help=f"DALI's CPU threads (default: all cores on a GPU, else {LOADER_THREADS}; in training the config's,"
        " auto = all cores)")  # fmt: skip
    add("--workers", type=int, metavar="N", help="the baselines' worker processes (default: as many as threads)")
    add("--view-seconds", type=float, metavar="S",
        help=f"length of a view (default: {LOADER_SECONDS:g}, and the config's for training)")  # fmt: skip
    add("--seconds", type=float, default=4.0, metavar="S", help="length of a window (default: %(default)s)")
    add("--windows", type=int, default=5, metavar="N", help="windows of each stage (default: %(default)s)")
    add("--shards", type=Path, metavar="DIR", help="shards to measure (default: ./shards, else generated ones)")
    add("--music", type=Path, metavar="DIR", help="songs to pack into the cache and measure, instead of shards")
    add("--config", type=config_file, metavar="FILE",
        help="settings of the training stages, as for train (default: gpu or cpu)")  # fmt: skip
    add("--set", action="append", default=[], metavar="a.b=c", dest="assignments",
        help="a setting of the training stages, such as train.compile=true")  # fmt: skip
    add("--sweep", choices=list(SWEEPS), help="measure stages at several values of this")
    add("--soak", type=int, metavar="N", help="run loader/all for N batches and watch the memory")
    add("--json", type=Path, metavar="F", help="write the results here")
    add("--plot", type=Path, metavar="F", help="draw them into this PNG")
    return parser


class Bench:
    """What the command line asks for: shards and configs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = choose_device(args.device)
        self.cores = machine.cores()
        on_cpu = self.device.type == "cpu"
        self.threads = args.threads or (LOADER_THREADS if on_cpu else self.cores)
        self.workers = args.workers or self.threads
        self.baseline_batch = args.baseline_batch or (None if on_cpu else BASELINE_BATCH)
        train = load_config(args.config or default_config_file(self.device.type), {}, {}, args.assignments)
        self.train_batch = args.batch_size or train.encoder.batch_size
        self.loader_batch = args.batch_size or (LOADER_BATCH if on_cpu else self.train_batch)
        self.least = material.enough_segments(self.batch_sizes(), LEAST_BATCHES)
        self.shards = self.choose_shards()
        segment, count = self.shards.segment_seconds, self.shards.count("train")
        largest = max(self.batch_sizes())
        if count < LEAST_BATCHES * largest:
            say(
                f"warning: {count} training segments are fewer than {LEAST_BATCHES} batches of {largest}, so the start"
                " of each epoch weighs more than on a large library"
            )
        view, plan = args.view_seconds or min(LOADER_SECONDS, segment), Config()
        frames, mask = log_mel_settings(plan).frames(view), plan.encoder.simsiam.augmentation.time_mask_param
        self.loader_config = load_config(command_line={
            "data.shards": self.shards.root,
            "data.threads": self.threads,
            "data.view_seconds": view,
            "encoder.batch_size": min(self.loader_batch, count),
            "encoder.simsiam.augmentation.time_mask_param": min(mask, frames // 2),  # for very short segments
        })  # fmt: skip
        self.train_config = load_config(base=train.model_dump(mode="json"), command_line={
            "data.shards": self.shards.root,
            "data.threads": args.threads or (self.cores if train.data.threads == "auto" else train.data.threads),
            "data.view_seconds": args.view_seconds or min(train.data.view_seconds or segment, segment),
            "encoder.batch_size": min(self.train_batch, count),
        })  # fmt: skip

    def kinds(self) -> list[str]:
        """The stages asked for. Raises UserError for one that does not exist."""
        args = self.args
        default = SWEEPS[args.sweep][1] if args.sweep else [
            kind for kind in KINDS if kind not in OPTIONAL and (kind not in GPU_ONLY or self.device.type == "cuda")
        ]  # fmt: skip
        wanted = ["loader/all"] if args.soak else args.stages or list(default)
        if unknown := [kind for kind in wanted if kind not in KINDS]:
            raise UserError(f"--stages: there is no stage {', '.join(unknown)}; there are {', '.join(KINDS)}")
        return wanted

    def batch_sizes(self) -> set[int]:
        """Those of the stages asked for."""
        if self.args.sweep == "batch":
            return set(SWEEPS["batch"][0])
        return {self.train_batch if trains(kind) else self.loader_batch for kind in self.kinds()}

    def choose_shards(self) -> ShardSet:
        """--shards, --music, ./shards, or generated ones."""
        args = self.args
        if args.shards:
            return open_shards(args.shards)
        if not args.music and (Path("shards") / "manifest.json").exists():
            return open_shards(Path("shards"))
        if not args.music:
            say(f"no shards in ./shards: generated songs take their place, kept in {material.cache_folder()}")
        return open_shards(self.packed())

    def packed(self, codec: str = "flac", sample_rate: int | None = 16000) -> Path:
        """Shards of --music, or of generated songs."""
        if self.args.music:
            return material.packed(self.args.music, self.cores, codec, sample_rate)
        return material.packed_generated(self.least, self.cores, codec, sample_rate)

    def spec(self, kind: str, **changes: Any) -> Spec:
        """A stage with some settings of its config changed, by dotted key with __ for the dot."""
        config = self.train_config if trains(kind) else self.loader_config
        over = {key.replace("__", "."): value for key, value in changes.items()}
        if self.baseline_batch and kind.startswith("baseline/") and kind not in GPU_ONLY:
            over = {"encoder.batch_size": self.baseline_batch} | over
        if over:
            config = load_config(base=config.model_dump(mode="json"), command_line=over)
        return Spec(kind, config, "gpu" if self.device.type == "cuda" else "cpu", self.workers)

    def plan(self) -> Plan:
        """The stages asked for, in groups; one that has the GPU to itself is a group of its own."""
        wanted = self.kinds()
        groups = ({kind: self.spec(kind) for kind in group if kind in wanted} for group in GROUPS)
        return [
            part
            for group in groups if group
            for part in ([group] if takes_turns(group) else [{kind: spec} for kind, spec in group.items()])
        ]  # fmt: skip

    def sweep(self, name: str) -> Plan:
        """The stages of a sweep; one group is one kind at all values."""
        values, _ = SWEEPS[name]
        return [
            {f"{kind} {name}={value:g}" if isinstance(value, float) else f"{kind} {name}={value}": spec
             for value in values if (spec := self.at(kind, name, value))}
            for kind in self.kinds()
        ]  # fmt: skip

    def about(self, plan: Plan) -> dict[str, Any]:
        """The settings that hold for all stages, as the JSON has them."""
        shards, train = self.shards, self.train_config
        return {
            "device": self.device.type,
            "segments": shards.count("train"),
            "segment_seconds": shards.segment_seconds,
            "codec": shards.codec,
            "sample_rate": shards.sample_rate,
            "model": f"{train.encoder.encoder_type} {encoder_type(train).variant}",
            "precision": train.train.precision,
            "compile": train.train.compile,
            "sweep": self.args.sweep,
            "soak": self.args.soak,
            "asked": [name for group in plan for name in group],
            "alone": [name for group in plan if not takes_turns(group) for name in group],
        }

    def at(self, kind: str, sweep: str, value: Any) -> Spec | None:
        """A stage at one value of a sweep; None where this machine or these shards do not have it."""
        if sweep == "threads":
            return self.spec(kind, data__threads=value) if value <= 2 * self.cores else None
        if sweep == "batch":
            fits = value <= self.shards.count("train")
            return self.spec(kind, encoder__batch_size=value) if fits else None
        if sweep == "seconds":
            fits = value <= self.shards.segment_seconds
            return self.spec(kind, data__view_seconds=value) if fits else None
        codec, rate = (value, 16000) if sweep == "codec" else ("flac", None if value == "native" else value)
        return self.spec(kind, data__shards=self.packed(codec, rate))


def say(line: str) -> None:
    """Progress; results go to standard output."""
    print(line, file=sys.stderr, flush=True)


def measure(
    plan: Plan,
    windows: int,
    seconds: float,
    batches: int = 1,
    each: Callable[[dict[str, dict[str, Any]]], None] = lambda _: None,
) -> tuple[dict[str, dict[str, Any]], list[UserError]]:
    """Each stage's entry in the JSON, and why others have none. each: gets all entries so far after each group."""
    result: dict[str, dict[str, Any]] = {}
    errors = []
    for group in plan:
        how = {name: (open_stage, (spec,)) for name, spec in group.items()}
        timed, failed = interleaved(how, windows, seconds, batches, say, together=takes_turns(group))
        errors += failed
        for name, came in timed.items():
            result[name] = described(group[name]) | summary(came, view_seconds(group[name].config))
        each(result)
    return result, errors


def takes_turns(group: dict[str, Spec]) -> bool:
    """Whether the group's stages are open side by side; not where each of them may fill a GPU."""
    return all(spec.device == "cpu" or spec.kind not in LARGE for spec in group.values())


@one_line_errors
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the stages' processes are ended
    bench = Bench(args)
    plan = bench.sweep(args.sweep) if args.sweep and not args.soak else bench.plan()
    about = bench.about(plan)

    def keep(entries: dict[str, dict[str, Any]]) -> None:
        if args.json and entries:
            write(document(bench.device, about, entries), args.json)

    windows, seconds, batches = args.windows, args.seconds, 1
    if args.soak:
        windows, seconds, batches = SOAK_WINDOWS, 0.0, max(1, args.soak // SOAK_WINDOWS)
    entries, errors = measure(plan, windows, seconds, batches, keep)
    if not entries:
        raise errors[0]
    doc = document(bench.device, about, entries)
    print(terminal_table(doc))
    for name, entry in entries.items():
        if (share := entry.get("decoded_over_given", 1.0)) > MOST_DECODED:
            say(f"warning: {name} decoded {share:.2f} segments for each that it gave, so its rate is too low")
    if args.plot:
        draw(doc, args.plot)
    if errors:
        raise UserError("\nerror: ".join(map(str, errors)))


if __name__ == "__main__":
    main()
