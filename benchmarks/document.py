"""The JSON of throughput.py.

    environment   cpu, cores, memory_gb, gpu, gpu_memory_gb, cuda, python, kernel, versions, date, commit (+ = changed
                  files), settings: the shards (segments, segment_seconds, codec, sample_rate in Hz, null = each song's
                  own), device, the trained model, its precision and compile; sweep and soak, null when not asked for;
                  asked: the stages asked for, of which one without an entry was not measured; alone: those that had the
                  GPU for themselves, because each may fill it, and took no turns with the others
    stages        by name, in a sweep "stage name=value": samples_per_s (median), low, high (windows' extremes),
                  audio_hours_per_s, x_realtime; windows, samples, seconds (all windows together); batch_size,
                  view_seconds, n_mels, threads, prefetch, workers as far as the stage has them; host_peak_bytes (the
                  process and its workers, shared pages counted in each), host_bytes (at the end of each window),
                  gpu_bytes, bytes_to_device (for each sample), data_wait_share (training stages), decoded_over_given
                  (loader stages and train: segments decoded over segments that arrived; loader/read: read)
    ratios        light_over_baseline, all_over_full, train_over_slower, data_wait_share (of train); null = not measured

train_over_slower is train / min(loader/train, model). On a CPU the two share the cores: if each alone kept all of them
busy, 1 / (1 + slower / faster) would be the limit, and what lies above it is time that one of them had left idle.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import machine
import torch
from stages import Spec

from simsiam_dali.config.schema import Config
from simsiam_dali.data.shards import open_shards


def view_seconds(config: Config) -> float:
    """Length of a view, s."""
    return config.data.view_seconds or open_shards(config.data.shards).segment_seconds


def described(spec: Spec) -> dict[str, Any]:
    """The settings that a stage's speed depends on most."""
    c = spec.config
    shape = {"batch_size": c.encoder.batch_size, "view_seconds": view_seconds(c), "n_mels": c.encoder.simsiam.n_mels}
    if spec.kind.startswith("baseline/"):
        return shape | {"workers": spec.workers}
    return shape | ({} if spec.kind == "model" else {"threads": c.data.threads, "prefetch": c.data.prefetch})


def ratios(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """The four ratios; None where a stage they need was not measured."""

    def rate(name: str) -> float | None:
        return entries[name]["samples_per_s"] if name in entries else None

    def over(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    loader, model = rate("loader/train"), rate("model")
    return {
        "light_over_baseline": over(rate("loader/light"), rate("baseline/light")),
        "all_over_full": over(rate("loader/all"), rate("baseline/full")),
        "train_over_slower": over(rate("train"), min(loader, model) if loader and model else None),
        "data_wait_share": entries["train"]["data_wait_share"] if "train" in entries else None,
    }


def document(
    device: torch.device, settings: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What --json writes. settings: `environment.settings`. entries: of the stages measured so far."""
    return {
        "environment": machine.environment(device) | {"settings": dict(settings)},
        "stages": dict(entries),
        "ratios": ratios(entries),
    }


def write(doc: Mapping[str, Any], path: Path) -> None:
    """Put the document in the place of what `path` held, whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(doc, indent=1) + "\n")
    part.replace(path)
