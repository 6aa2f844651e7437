"""Signals with known answers, shards made of them, and graphs run on them, for the tests of the data path."""

import io
import sys
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import soundfile
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torchaudio.functional import melscale_fbanks
from torchaudio.transforms import AmplitudeToDB, MelSpectrogram

from simsiam_dali.config.schema import AugmentationConfig
from simsiam_dali.data.augment import Draws
from simsiam_dali.data.format import FileSum, Manifest, read_index
from simsiam_dali.data.graph import GraphConfig, LogMel, Source
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.data.views import noisy_spectrum, view

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import demo_synth

Array = NDArray[Any]
RATE = 16000  # Hz
HOP = 512  # samples


# --- waves: float32 (N,)


def tone(hz: float, seconds: float, rate: int = RATE) -> Array:
    """A sine of amplitude 0.5."""
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def noise(seconds: float, seed: int = 0, rate: int = RATE) -> Array:
    """White Gaussian noise, RMS 0.1."""
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate), np.float32)


def clicks(period: float, seconds: float, rate: int = RATE) -> Array:
    """Single samples of height 0.9, `period` seconds apart, the first half a period in."""
    wave = np.zeros(round(seconds * rate), np.float32)
    wave[round(period * rate / 2) :: round(period * rate)] = 0.9
    return wave


def song(seconds: float, seed: int, rate: int = RATE) -> Array:
    """A song as the demo library has them, each seed by another artist. RMS 0.08."""
    rng = np.random.default_rng(seed)
    style = demo_synth.draw_styles(1, rng)[0]
    mix, _ = demo_synth.compose(style, seconds, rng)
    return demo_synth.master(mix, style.tilt, rate, 1)[:, 0].astype(np.float32)


# --- the reference


def reference_mel(wave: Array, spec: LogMel | None = None) -> Array:
    """Mel power `(n_mels, F)` by torchaudio, in float64 so that the rounding seen is the graph's own."""
    spec = spec or LogMel()
    size = {"n_fft": spec.n_fft, "hop_length": spec.hop_length, "n_mels": spec.n_mels}
    mel = MelSpectrogram(spec.sample_rate, **size, mel_scale="htk", norm=None, power=2).double()
    return mel(torch.from_numpy(wave).double()).numpy()


def reference_log_mel(wave: Array, spec: LogMel | None = None) -> Array:
    """Log-mel `(n_mels, F)` in dB by torchaudio, without a limit on its range but `amin`."""
    return AmplitudeToDB("power", top_db=None)(torch.from_numpy(reference_mel(wave, spec))).numpy()


def power(log_mel: Array) -> Array:
    """dB to power."""
    return 10.0 ** (np.asarray(log_mel, np.float64) / 10)


def frequency(view: Array) -> float:
    """Hz of the tone in a log-mel in dB.

    HTK triangles interpolate linearly between the filters' centres, so the mean of the centres, weighted with the
    mel power, is the frequency itself.
    """
    bins = melscale_fbanks(1025, 0.0, RATE / 2, 128, RATE, mel_scale="htk").numpy()
    grid = np.linspace(0, RATE / 2, 1025)
    centres = (bins * grid[:, None]).sum(0) / bins.sum(0)
    # The first and last frames hold the wave's reflected ends.
    weights = power(view)[:, 4:-4].sum(axis=1)
    return float((weights * centres).sum() / weights.sum())


def correlation(a: Array, b: Array) -> float:
    """Pearson's correlation over all elements."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


# --- graphs


def run_graph(
    define: Callable[..., Any], inputs: Mapping[str, Sequence[Array]], gpu: int | None = None
) -> list[list[Array]]:
    """Run `define(**nodes)` once on a batch; each input and each output is a list of samples."""

    @pipeline_def(
        batch_size=len(next(iter(inputs.values()))),
        num_threads=2,
        device_id=gpu,
        prefetch_queue_depth=1,
        enable_conditionals=True,
        exec_dynamic=True,
    )
    def graph() -> Any:
        sources = {name: repeat(list(samples)) for name, samples in inputs.items()}
        return define(**{name: fn.external_source(source=source) for name, source in sources.items()})

    pipeline = graph()
    pipeline.build()
    return [[np.array(sample) for sample in output.as_cpu()] for output in pipeline.run()]


def no_source(seconds: float, native_rate: bool = False) -> Source:
    """A source for graphs whose waves are fed by the test."""
    return Source((), (), "flac", native_rate, seconds)


NEUTRAL = {
    **dict.fromkeys(("shift", "semitones", "snr_db", "noise_at", "gain_db", "drr_db"), 0.0),
    **dict.fromkeys(("mel_start", "mel_width", "time_start", "time_width"), 0.0),
    **dict.fromkeys(("rate", "rt60"), 1.0),
    **dict.fromkeys(("stretched", "noisy", "reverberant"), False),
}


def augmented(
    waves: Sequence[Array],
    draws: Sequence[Mapping[str, float]],
    spec: LogMel | None = None,
    bank: Array | None = None,
    gpu: int | None = None,
) -> list[Array]:
    """A view of each wave with its own known draws, the rest neutral: `(n_mels, T)` each.

    All waves have one length, which is the view's. The ranges of the config are the defaults.
    """
    seconds = len(waves[0]) / RATE
    graph = GraphConfig(no_source(seconds), spec or LogMel(), "views", seconds, AugmentationConfig())
    full = [{**NEUTRAL, "stretched": d.get("rate", 1) != 1, **d} for d in draws]
    inputs = {
        name: [np.array(d[name], np.bool_ if isinstance(NEUTRAL[name], bool) else np.float32) for d in full]
        for name in NEUTRAL
    }

    def define(wave: Any, **nodes: Any) -> Any:
        on_gpu = gpu is not None
        noise = None if bank is None else types.Constant(bank, device="gpu" if on_gpu else "cpu")
        drawn = Draws(**nodes)
        spectrum = noisy_spectrum(wave.gpu() if on_gpu else wave, drawn, noise, graph)
        return view(spectrum, drawn, graph, on_gpu)

    return [log_mel.T for log_mel in run_graph(define, {"wave": list(waves), **inputs}, gpu)[0]]


# --- shards


def write_shards(
    folder: Path,
    waves: Sequence[Array],
    rates: int | Iterable[int] = RATE,
    codec: str = "flac",
    per_tar: int = 10**9,
    subtype: str | None = None,
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Pack each wave as one segment, its row its place in the list. Returns tars and DALI indexes."""
    folder.mkdir(parents=True, exist_ok=True)
    rates = repeat(rates) if isinstance(rates, int) else rates
    segments = list(enumerate(zip(waves, rates, strict=False)))
    tars, indexes = [], []
    for number, first in enumerate(range(0, len(segments), per_tar)):
        tars.append(folder / f"train-{number:06d}.tar")
        indexes.append(tars[-1].with_suffix(".idx"))
        lines = []
        with tarfile.open(tars[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, (wave, rate) in segments[first : first + per_tar]:
                audio = io.BytesIO()
                soundfile.write(audio, wave, rate, subtype, format=codec.upper())
                parts = {codec: audio.getvalue(), "row": np.int64(row).tobytes()}
                line = []
                for extension, data in parts.items():
                    entry = tarfile.TarInfo(f"{row:09d}.{extension}")
                    entry.size = len(data)
                    line.append(f"{extension} {tar.offset + tarfile.BLOCKSIZE} {len(data)} {entry.name}")
                    tar.addfile(entry, io.BytesIO(data))
                lines.append(" ".join(line))
        indexes[-1].write_text(f"v1.2 {len(lines)}\n" + "\n".join(lines) + "\n")
    return tuple(tars), tuple(indexes)


def shard_set(tars: Sequence[Path], seconds: float, codec: str = "flac", packed: str = "once") -> ShardSet:
    """The set of the `tars` of `write_shards`, opened; each segment is a song of its own."""
    shards = [tar.name for tar in tars for _ in read_index(tar.with_suffix(".idx"))]
    keys = [f"{row:09d}" for row in range(len(shards))]
    segments = pd.DataFrame({"song": range(len(shards)), "key": keys, "split": "train", "shard": shards})
    songs = pd.DataFrame({"path": [f"song {row}.mp3" for row in range(len(shards))]})
    settings = {"codec": codec, "sample_rate": RATE, "segment_seconds": seconds}
    sums = {tar.name: FileSum(tar.stat().st_size, packed, 0) for tar in tars}
    return ShardSet(tars[0].parent, Manifest(1, "", settings, {}, sums), songs, segments)
