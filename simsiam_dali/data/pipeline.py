"""The DALI graph: read -> decode -> resample -> two augmented views, or one clean view, or raw audio.

One definition serves both devices: with `gpu`, everything after the decoder (which DALI has for the CPU only) runs on
the GPU; without it no GPU is touched. The mel front end equals `torchaudio.transforms.MelSpectrogram` (periodic Hann
window, HTK mel scale, no filter normalisation) followed by `AmplitudeToDB`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from nvidia.dali import Pipeline, fn, math, pipeline_def, types
from nvidia.dali.data_node import DataNode

from simsiam_dali.config import AugmentationConfig
from simsiam_dali.data import augment

FLOOR_DB = -100.0
"""Log-mel floor: `AmplitudeToDB(amin=1e-10)`."""

CONVERT_QUALITY, PITCH_QUALITY = 50.0, 20.0
"""DALI's resampling quality, 0..100: 16 and 4 lobes of the sinc on each side."""

BAND_EDGE = 0.94
"""Where the low-pass before a conversion is 6 dB down, as a fraction of the front end's Nyquist frequency."""

LOSSY_CODEC_SLACK = 1e-3
"""How much shorter than its nominal length, as a fraction, a decoded Vorbis segment may be."""


@dataclass(frozen=True)
class LogMel:
    """The spectrogram's settings, and the data set's statistics of it (mean and std in dB)."""

    sample_rate: int = 16000  # Hz
    n_fft: int = 2048  # samples
    hop_length: int = 512  # samples
    n_mels: int = 128
    mean: float = 0.0  # dB
    std: float = 1.0  # dB

    def frames(self, seconds: float) -> int:
        """Frames of a view: centred windows, one each hop, the first at time 0."""
        return 1 + round(seconds * self.sample_rate) // self.hop_length


@dataclass(frozen=True)
class Source:
    """What is read: tars with their DALI indexes, and this process's part of them."""

    tars: tuple[Path, ...]
    indexes: tuple[Path, ...]
    codec: str
    native_rate: bool  # False: the shards are packed at the front end's rate
    segment_seconds: float
    shard_id: int = 0
    num_shards: int = 1
    shuffle_buffer: int = 0  # segments; 0 reads in the stored order, once, the last batch padded


@dataclass(frozen=True)
class Graph:
    """Everything that shapes the graph. seconds: length of a view. augmentation, crops: read by mode "views" only."""

    source: Source
    log_mel: LogMel
    mode: Literal["views", "clean", "raw"]
    seconds: float
    augmentation: AugmentationConfig
    crops: Literal["same", "independent"] = "same"


def mel_power(wave: DataNode, spec: LogMel) -> DataNode:
    """Mel power `(F, n_mels)` of `wave (N,)`, F = 1 + N // hop. Time first: the STFT is 2.5 times faster that way."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(spec.n_fft) / spec.n_fft)
    power = fn.spectrogram(
        wave,
        nfft=spec.n_fft,
        window_length=spec.n_fft,
        window_step=spec.hop_length,
        window_fn=window.tolist(),
        power=2,
        layout="tf",
    )
    mel = fn.mel_filter_bank(
        power,
        nfilter=spec.n_mels,
        sample_rate=float(spec.sample_rate),
        freq_high=spec.sample_rate / 2,
        mel_formula="htk",
        normalize=False,
    )
    return fn.reshape(mel, layout="")  # conditionals merge only equal layouts, and warps name theirs otherwise


def normalised(mel: DataNode, spec: LogMel) -> DataNode:
    """dB, then zero mean and unit std over the data set, in one pass."""
    return fn.to_decibels(
        mel,
        multiplier=10.0 / spec.std,
        reference=10.0 ** (spec.mean / 10.0),
        cutoff_db=(FLOOR_DB - spec.mean) / spec.std,
    )


def exactly(wave: DataNode, samples: DataNode) -> DataNode:
    """`wave (N,)` cut or padded with zeros to `samples` (INT32); resamplers and codecs may leave out the last few."""
    start = types.Constant(np.int32(0), device="cpu")
    return fn.slice(wave, start=start, end=samples, axes=[0], out_of_bounds_policy="pad")


def fastest(cfg: AugmentationConfig) -> float:
    """Largest tempo a view can draw: how much more sound than its own length it may need."""
    return max(1.0, cfg.time_stretch_range[1]) if cfg.time_stretch_prob > 0 else 1.0


def place(wave: DataNode, rate: DataNode, graph: Graph, at: DataNode | float) -> DataNode:
    """The stretch of `wave (N,)` that a view shows: `graph.seconds` long, `at` (0..1) of the way from first to last."""
    if graph.seconds >= graph.source.segment_seconds:
        return wave
    length = augment.integer(rate * graph.seconds)
    free = math.max(wave.shape(dtype=types.INT32)[0] - length, 0)
    start = augment.integer(at * free)
    return fn.slice(wave, start=start, end=start + length, axes=[0], out_of_bounds_policy="trim_to_shape")


def band_limited(wave: DataNode, rate: DataNode, graph: Graph, gpu: bool) -> DataNode:
    """`wave (N,)` without what the front end's rate cannot hold, so that resampling folds nothing back."""
    if graph.source.native_rate and rate > float(graph.log_mel.sample_rate):
        wave = augment.low_pass(wave, BAND_EDGE * graph.log_mel.sample_rate / rate, gpu)
    return wave


def at_front_end_rate(wave: DataNode, rate: DataNode, graph: Graph) -> DataNode:
    """`wave (N,)` at the front end's rate, exactly `graph.seconds` long."""
    spec = graph.log_mel
    samples = round(graph.seconds * spec.sample_rate)
    if graph.source.native_rate:
        wave = augment.resample(wave, rate, float(spec.sample_rate), CONVERT_QUALITY)
    return exactly(wave, types.Constant(np.int32(samples), device="cpu"))


def clean_view(wave: DataNode, rate: DataNode, graph: Graph) -> DataNode:
    """The view `(n_mels, T)` without any augmentation."""
    mel = mel_power(at_front_end_rate(wave, rate, graph), graph.log_mel)
    return fn.transpose(normalised(mel, graph.log_mel), perm=[1, 0])


def mel_of_wave(wave: DataNode, rate: DataNode, draws: augment.Draws, bank: DataNode | None, graph: Graph) -> DataNode:
    """Mel power `(F, n_mels)` of `wave (N,)`, the place a view shows, shifted, pitched and noisy as drawn.

    F fits the drawn tempo: `on_mel` still has to scale it to the view's frames.
    """
    spec, cfg, native = graph.log_mel, graph.augmentation, graph.source.native_rate

    # A faster tempo needs more sound than the view is long; that and the shift go round the end.
    start = augment.integer(draws.shift * wave.shape(dtype=types.FLOAT)[0])
    length = augment.integer(rate * (graph.seconds * draws.rate))
    turns = 1 + int(np.ceil(fastest(cfg) + LOSSY_CODEC_SLACK))
    wave = augment.circular_slice(wave, start, length, turns)

    pitch_rate = augment.pitch_rate(float(spec.sample_rate), draws.semitones)
    if native:
        wave = augment.resample(wave, rate, pitch_rate, CONVERT_QUALITY)
        wave = exactly(wave, augment.integer(pitch_rate * (graph.seconds * draws.rate)))
    elif cfg.pitch_shift_prob > 0 and draws.semitones != 0.0:
        wave = augment.resample(wave, float(spec.sample_rate), pitch_rate, PITCH_QUALITY)
    if bank is not None and draws.noisy:
        wave = augment.add_noise(wave, draws.snr_db, bank, draws.noise_at, turns=2)
    return mel_power(wave, spec)


def mel_of_mel(mel: DataNode, draws: augment.Draws, graph: Graph) -> DataNode:
    """The same for a plain view, from the mel power `(T, n_mels)` of the place as it is: shifted by whole frames."""
    frames = graph.log_mel.frames(graph.seconds)
    length = augment.integer(math.ceil((frames - 1) * draws.rate) + 1)
    turns = 1 + int(np.ceil(fastest(graph.augmentation)))
    return augment.circular_slice(mel, augment.integer(draws.shift * frames), length, turns)


def on_mel(mel: DataNode, draws: augment.Draws, graph: Graph, gpu: bool) -> DataNode:
    """A view `(n_mels, T)` from its mel power `(F, n_mels)`: tempo, reverb, gain, log, masks."""
    spec, cfg = graph.log_mel, graph.augmentation
    frames, hop_seconds = spec.frames(graph.seconds), spec.hop_length / spec.sample_rate
    if (cfg.time_stretch_prob > 0 or cfg.pitch_shift_prob > 0) and draws.scaled:
        factor = draws.rate * math.pow(2.0, draws.semitones / -12.0)
        mel = augment.time_scale(mel, factor, frames, spec.n_mels)
    if cfg.reverb_prob > 0 and draws.reverberant:
        mel = augment.reverb(mel, draws.rt60, draws.drr_db, cfg.reverb_rt60_range[1], hop_seconds, gpu)
    mel = augment.gain(mel, draws.gain_db)
    log_mel = augment.spec_augment(normalised(mel, spec), draws)
    return fn.transpose(log_mel, perm=[1, 0])


def augmented_views(
    waves: tuple[DataNode, DataNode],
    rate: DataNode,
    draws: tuple[augment.Draws, augment.Draws],
    bank: DataNode | None,
    graph: Graph,
    gpu: bool,
) -> tuple[DataNode, DataNode]:
    """Two augmented views `(n_mels, T)` of the places `waves` that they show.

    Where both show one place and neither is pitched or noisy, they share its STFT, the dearest part of a view.
    """
    if graph.crops == "same" and draws[0].plain & draws[1].plain:
        shared = mel_power(at_front_end_rate(waves[0], rate, graph), graph.log_mel)
        mel1, mel2 = mel_of_mel(shared, draws[0], graph), mel_of_mel(shared, draws[1], graph)
    else:
        mel1 = mel_of_wave(waves[0], rate, draws[0], bank, graph)
        mel2 = mel_of_wave(waves[1], rate, draws[1], bank, graph)
    return on_mel(mel1, draws[0], graph, gpu), on_mel(mel2, draws[1], graph, gpu)


def noise_bank(graph: Graph, seed: int) -> np.ndarray | None:
    """Unit-variance Gaussian noise `(M,)`, half as long again as the longest view; None when no view can be noisy."""
    cfg = graph.augmentation
    if cfg.noise_prob == 0:
        return None
    slowest_pitch = 2 ** (max(0.0, -cfg.pitch_shift_range[0]) / 12) if cfg.pitch_shift_prob > 0 else 1.0
    longest = (graph.seconds * fastest(cfg) + 1.0) * slowest_pitch * graph.log_mel.sample_rate
    return np.random.default_rng(augment.stream(seed, "noise bank")).standard_normal(int(1.5 * longest), np.float32)


def read(source: Source, seed: int) -> tuple[DataNode, DataNode]:
    """Encoded audio (uint8) and the segment's row, int64 (1,)."""
    shuffled = source.shuffle_buffer > 0
    order = {
        "random_shuffle": True,
        "initial_fill": source.shuffle_buffer,
        "shuffle_after_epoch": True,
        "shuffle_after_epoch_seed": augment.stream(seed, "shard order"),
        "seed": augment.stream(seed, "reader"),
    }
    segments: Any = fn.readers.webdataset(  # two outputs, as `ext` names two
        name="reader",
        paths=[str(p) for p in source.tars],
        index_paths=[str(p) for p in source.indexes],
        ext=[source.codec, "row"],
        dtypes=[types.UINT8, types.INT64],
        missing_component_behavior="error",
        shard_id=source.shard_id,
        num_shards=source.num_shards,
        **(order if shuffled else {"pad_last_batch": True, "stick_to_shard": True}),
    )
    return segments


def build(
    graph: Graph, batch_size: int, threads: int, prefetch: int, seed: int, gpu: int | None, state: str | None
) -> Pipeline:
    """Build the pipeline. Outputs: [view1, view2, row] in mode "views", [view, row] or [wave, row] otherwise.

    gpu: CUDA device number, or None for the CPU alone. state: a `pipeline.checkpoint()` to go on from.
    The draws' seed differs by rank, the reader's must not: all ranks have to agree on the order they share.
    """
    on_gpu = gpu is not None
    noise = noise_bank(graph, seed) if graph.mode == "views" else None

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=gpu,
        prefetch_queue_depth=prefetch,
        enable_conditionals=True,
        enable_checkpointing=True,
        exec_dynamic=True,
    )
    def define() -> tuple[DataNode, ...]:
        encoded, row = read(graph.source, seed)
        wave, decoded_rate = fn.decoders.audio(encoded, dtype=types.FLOAT, downmix=True)
        rate = decoded_rate
        if not graph.source.native_rate:
            rate = types.Constant(np.float32(graph.log_mel.sample_rate), device="cpu")
        if on_gpu:
            wave = wave.gpu()
        draw_seed = augment.stream(seed, f"rank {graph.source.shard_id}")

        def anywhere(name: str) -> DataNode:
            return augment.uniform(0.0, 1.0, augment.stream(draw_seed, name))

        def crop(at: DataNode | float) -> DataNode:
            return band_limited(place(wave, rate, graph, at), rate, graph, on_gpu)

        def drawn(view: int) -> augment.Draws:
            frames, view_seed = graph.log_mel.frames(graph.seconds), augment.stream(draw_seed, f"view {view}")
            return augment.draw(graph.augmentation, frames, graph.log_mel.n_mels, view_seed)

        if graph.mode == "views":
            first = crop(anywhere("crop 1"))
            second = crop(anywhere("crop 2")) if graph.crops == "independent" else first
            # One bank for both views: DALI keeps a copy of a constant for each sample of the batch.
            bank = None if noise is None else types.Constant(noise, device="gpu" if on_gpu else "cpu")
            draws = drawn(1), drawn(2)
            return (*augmented_views((first, second), rate, draws, bank, graph, on_gpu), row)
        cropped = crop(0.5 if graph.source.shuffle_buffer == 0 else anywhere("crop"))
        single = clean_view if graph.mode == "clean" else at_front_end_rate
        return single(cropped, rate, graph), row

    pipeline = define(checkpoint=state)
    pipeline.build()
    return pipeline
