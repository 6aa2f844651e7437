"""What does each augmentation cost? python benchmarks/augmentations.py --out benchmarks/results/augmentations/NAME.json

Core-ms a view on a CPU: the process's CPU time of a graph in which every view draws that augmentation alone, minus that
of a graph in which none does. The waves are handed to the graph at the front end's rate; a view without augmentation is
its STFT, mel filters and log. The graphs take turns, in another order each round; the median round counts.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import machine
import numpy as np
import torch

from simsiam_dali.common.files import atomic_write
from simsiam_dali.config.schema import AugmentationConfig
from simsiam_dali.data import augment
from simsiam_dali.data.dali import DataNode, Pipeline, fn, pipeline_def, types
from simsiam_dali.data.graph import GraphConfig, LogMel, Source
from simsiam_dali.data.pipeline import build_on_new_pool
from simsiam_dali.data.views import noise_bank, noisy_spectrum, view

PLAIN = "none"
SWITCHES = {
    "noise": "noise_prob",
    "pitch shift": "pitch_shift_prob",
    "time shift": "time_shift_prob",
    "time stretch": "time_stretch_prob",
    "reverb": "reverb_prob",
    "gain": "gain_prob",
    "mixup": "mixup_prob",
    "resized crop": "crop_prob",
    "frequency mask": "frequency_mask_prob",
    "time mask": "time_mask_prob",
}
"""What the table calls an augmentation, and its setting."""


def graph_of(name: str, seconds: float, views: int) -> Pipeline:
    """A graph that makes `views` views of noise, each with the augmentation of that name."""
    cfg = AugmentationConfig(**{switch: float(own == name) for own, switch in SWITCHES.items()})
    graph = GraphConfig(Source((), (), "wav", False, seconds), LogMel(), "views", seconds, cfg)
    bank = noise_bank(graph, seed=0)
    rng = np.random.default_rng(0)
    waves = [0.1 * rng.standard_normal(round(seconds * graph.log_mel.sample_rate), np.float32) for _ in range(views)]

    @pipeline_def(
        batch_size=views, num_threads=1, device_id=None, enable_conditionals=True, exec_dynamic=True,
        prefetch_queue_depth=1,
    )  # fmt: skip
    def define() -> DataNode:
        wave = fn.external_source(source=lambda: waves)
        draws = augment.draw(cfg, graph.log_mel.frames(seconds), graph.log_mel.n_mels, 0)
        noise = None if bank is None else types.Constant(bank, device="cpu")
        return view(noisy_spectrum(wave, draws, noise, graph), draws, graph, gpu=False)

    pipeline = define()
    build_on_new_pool(pipeline)
    pipeline.run()
    return pipeline


def core_ms(pipeline: Pipeline, views: int, batches: int) -> float:
    """CPU time of this process for a view, ms."""
    began = time.process_time()
    for _ in range(batches):
        pipeline.run()
    return 1000 * (time.process_time() - began) / (batches * views)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seconds", type=float, default=60.0, metavar="S", help="length of a view, s (default: %(default)s)")
    add("--views", type=int, default=8, metavar="N", help="views of a batch (default: %(default)s)")
    add("--batches", type=int, default=4, metavar="N", help="batches of a round (default: %(default)s)")
    add("--rounds", type=int, default=7, metavar="N", help="rounds (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="write the result here")
    args = parser.parse_args()
    pipelines = {name: graph_of(name, args.seconds, args.views) for name in (PLAIN, *SWITCHES)}
    rng, rounds = np.random.default_rng(0), []
    for _ in range(args.rounds):
        order = rng.permutation(list(pipelines))
        rounds.append({name: core_ms(pipelines[name], args.views, args.batches) for name in order})
    rows = {PLAIN: [each[PLAIN] for each in rounds]}
    rows |= {name: [each[name] - each[PLAIN] for each in rounds] for name in SWITCHES}
    for name, values in rows.items():
        low, median, high = min(values), statistics.median(values), max(values)
        print(f"{name:15} {median:6.2f} core-ms a view ({low:.2f} to {high:.2f})", flush=True)
    if args.out:
        doc = {"environment": machine.environment(torch.device("cpu")), "seconds": args.seconds, "core_ms": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.out) as part:
            part.write_text(json.dumps(doc, indent=1) + "\n")


if __name__ == "__main__":
    main()
