"""The DALI graph: read -> decode -> resample -> two augmented views, or one clean view, or raw audio.

One definition serves both devices: with `gpu`, everything after the decoder (which DALI has for the CPU only) runs on
the GPU; without it no GPU is touched. The mel front end equals `torchaudio.transforms.MelSpectrogram` (periodic Hann
window, HTK mel scale, no filter normalisation) followed by `AmplitudeToDB`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from simsiam_dali.config.schema import AugmentationConfig
from simsiam_dali.data import augment
from simsiam_dali.data.dali import DataNode, OperatorConcurrency, Pipeline, build_on_cpu, fn, math, pipeline_def, types

FLOOR_DB = -100.0
"""Log-mel floor: `AmplitudeToDB(amin=1e-10)`."""

CONVERT_QUALITY = 50.0
"""DALI's resampling quality, 0..100: 16 lobes of the sinc on each side."""

BAND_EDGE = 0.94
"""Where the low-pass before a conversion is 6 dB down, as a fraction of the front end's Nyquist frequency."""

MISSING = 0.1
"""How much of its end a segment may lack, s: lossy codecs and resamplers leave out some samples."""

LOSSLESS = ("flac", "wav")
"""Codecs that give back as many samples as were packed."""

NOISE_PLACES = 15.0
"""How much longer than a view the bank of noise is, s: a view's noise may start anywhere in it."""


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

    tars: tuple[Path | str, ...]  # a str is an address on S3
    indexes: tuple[Path, ...]
    codec: str
    native_rate: bool  # False: the shards are packed at the front end's rate
    segment_seconds: float
    shard_id: int = 0
    num_shards: int = 1
    shuffle_buffer: int = 0  # segments; 0 reads in the stored order


@dataclass(frozen=True)
class Epoch:
    """The reader gives its segments in `turn` batches; the first `used` are an epoch, the others are only read."""

    used: int
    turn: int

    def uses(self, batch: int) -> bool:
        """Whether the `batch`-th of all batches, from 0, belongs to an epoch."""
        return batch % self.turn < self.used


@dataclass(frozen=True)
class Graph:
    """Everything that shapes the graph. seconds: length of a view. augmentation, crops: read by mode "views" only.

    epoch: which batches are decoded; None decodes all.
    """

    source: Source
    log_mel: LogMel
    mode: Literal["views", "clean", "raw"]
    seconds: float
    augmentation: AugmentationConfig
    crops: Literal["same", "independent"] = "same"
    epoch: Epoch | None = None


def power_spectrogram(wave: DataNode, spec: LogMel) -> DataNode:
    """Power `(F, 1 + n_fft // 2)` of `wave (N,)`, F = 1 + N // hop. Time first: 2.5 times faster that way."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(spec.n_fft) / spec.n_fft)
    return fn.spectrogram(
        wave,
        nfft=spec.n_fft,
        window_length=spec.n_fft,
        window_step=spec.hop_length,
        window_fn=window.tolist(),
        power=2,
        layout="tf",
    )


def mel_power(power: DataNode, spec: LogMel) -> DataNode:
    """Mel power `(F, n_mels)` of a power spectrogram `(F, 1 + n_fft // 2)`."""
    return augment.plain_mel(power, spec.sample_rate, spec.n_mels)


def normalised(mel: DataNode, spec: LogMel) -> DataNode:
    """dB, then zero mean and unit std over the data set, in one pass."""
    return fn.to_decibels(
        mel,
        multiplier=10.0 / spec.std,
        reference=10.0 ** (spec.mean / 10.0),
        cutoff_db=(FLOOR_DB - spec.mean) / spec.std,
    )


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
    """`wave (N,)` at the front end's rate, exactly `graph.seconds` long, zeros where its end is `MISSING`."""
    spec = graph.log_mel
    if graph.source.native_rate:
        wave = augment.resample(wave, rate, float(spec.sample_rate), CONVERT_QUALITY)
    elif graph.source.codec in LOSSLESS and graph.seconds >= graph.source.segment_seconds:
        return wave  # all of a segment that was packed at its exact length
    # One that lacks more stays too short, which ends the run.
    longest = wave.shape(dtype=types.INT32)[0] + round(MISSING * spec.sample_rate)
    end = math.min(longest, round(graph.seconds * spec.sample_rate))
    start = types.Constant(np.int32(0), device="cpu")
    return fn.slice(wave, start=start, end=end, axes=[0], out_of_bounds_policy="pad")


def clean_view(wave: DataNode, spec: LogMel) -> DataNode:
    """The log-mel `(T, n_mels)` of `wave (N,)`, at the front end's rate, without any augmentation."""
    return normalised(mel_power(power_spectrogram(wave, spec), spec), spec)


def spectrum(wave: DataNode, graph: Graph) -> DataNode:
    """What a view's mel is made from: power `(F, 1 + n_fft // 2)`, or mel power `(F, n_mels)` where none is pitched."""
    power = power_spectrogram(wave, graph.log_mel)
    return power if graph.augmentation.pitch_shift_prob > 0 else mel_power(power, graph.log_mel)


def noisy_spectrum(wave: DataNode, draws: augment.Draws, bank: DataNode | None, graph: Graph) -> DataNode:
    """The `spectrum` of a view of its own, with noise where drawn."""
    if bank is not None and draws.noisy:
        # The pitch shift comes later; what it takes off the noise is given beforehand.
        snr_db = draws.snr_db - augment.pitch_level_db(draws.semitones)
        wave = augment.add_noise(wave, snr_db, bank, draws.noise_at)
    return spectrum(wave, graph)


def view(spectrum: DataNode, draws: augment.Draws, graph: Graph, gpu: bool) -> DataNode:
    """A view `(T, n_mels)` from the `spectrum` of its place: pitch, shift, tempo, reverb, gain, log, masks."""
    spec, cfg, mel = graph.log_mel, graph.augmentation, spectrum
    frames, hop_seconds = spec.frames(graph.seconds), spec.hop_length / spec.sample_rate
    if cfg.pitch_shift_prob > 0:
        steps = augment.pitch_steps(*cfg.pitch_shift_range)
        mel = augment.pitched_mel(spectrum, draws.semitones, steps, spec.sample_rate, spec.n_mels)
    # A faster tempo needs more sound than the view is long; that and the shift go round the end.
    length = augment.integer(math.ceil((frames - 1) * draws.rate) + 1)
    # The last frame lies where the wave ends, which is where it begins: nearer than half a hop, they are one.
    joint = int(2 * (round(graph.seconds * spec.sample_rate) % spec.hop_length) < spec.hop_length)
    start = augment.integer(draws.shift * (frames - joint))
    mel = augment.circular_slice(mel, start, length, turns=1 + int(np.ceil(fastest(cfg))), joint=joint)
    if cfg.time_stretch_prob > 0 and draws.stretched:
        mel = augment.time_scale(mel, draws.rate, frames, spec.n_mels)
    if cfg.reverb_prob > 0 and draws.reverberant:
        mel = augment.reverb(mel, draws.rt60, draws.drr_db, cfg.reverb_rt60_range[1], hop_seconds, gpu)
    mel = augment.gain(mel, draws.gain_db)
    return augment.spec_augment(normalised(mel, spec), draws)


def two_views(
    waves: tuple[DataNode, DataNode],
    draws: tuple[augment.Draws, ...],
    bank: DataNode | None,
    graph: Graph,
    gpu: bool,
) -> tuple[DataNode, DataNode]:
    """Two augmented views `(T, n_mels)` of `waves (N,)`, the places that they show, at the front end's rate.

    Where both show one place and neither is noisy, they share its STFT, the dearest part of a view.
    """
    if graph.crops == "same" and (draws[0].noisy | draws[1].noisy) == 0:
        spectrum1 = spectrum2 = spectrum(waves[0], graph)
    else:
        spectrum1 = noisy_spectrum(waves[0], draws[0], bank, graph)
        spectrum2 = noisy_spectrum(waves[1], draws[1], bank, graph)
    return view(spectrum1, draws[0], graph, gpu), view(spectrum2, draws[1], graph, gpu)


def noise_bank(graph: Graph, seed: int) -> np.ndarray | None:
    """Unit-variance Gaussian noise `(M,)`, `NOISE_PLACES` longer than a view; None when no view can be noisy."""
    if graph.augmentation.noise_prob == 0:
        return None
    samples = round((graph.seconds + NOISE_PLACES) * graph.log_mel.sample_rate)
    return np.random.default_rng(augment.stream(seed, "noise bank")).standard_normal(samples, np.float32)


def read(source: Source, seed: int) -> tuple[DataNode, DataNode]:
    """Encoded audio (uint8) and the segment's row, int64 (1,).

    All of the source is read before any of it is read again; each turn is filled up to whole batches, as many for every
    rank, with its last segment.
    """
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
        dont_use_mmap=True,  # a mapped tar that is cut short, or on a failing disk, ends the process with SIGBUS
        shard_id=source.shard_id,
        num_shards=source.num_shards,
        pad_last_batch=True,
        **(order if shuffled else {"stick_to_shard": True}),
    )
    return segments


def is_used(epoch: Epoch, batch_size: int) -> DataNode:
    """BOOL, the same for a whole batch: whether it belongs to an epoch. Follows a checkpoint of the pipeline."""

    def of_batch(batch: int) -> np.ndarray:
        return np.full(batch_size, epoch.uses(batch))

    return fn.external_source(source=of_batch, dtype=types.BOOL, ndim=0)


def nothing(mode: str, device: str) -> tuple[DataNode, ...]:
    """What stands for the data, total and samples of a batch that is not decoded."""
    size = (1,) if mode == "raw" else (1, 1)
    data = types.Constant(np.zeros(size, np.float32), device=device)
    total = types.Constant(np.float32(0), device="cpu")
    samples = types.Constant(np.int32(0), device="cpu")
    return (*[data] * (2 if mode == "views" else 1), total, samples)


@dataclass(frozen=True)
class _Randomness:
    """What a batch draws before it is known whether it is used, so that every batch draws the same number of times."""

    crops: tuple[DataNode | float, ...]  # where each view starts, 0 to 1 of the way
    draws: tuple[augment.Draws, ...]  # of each view, in mode "views"


def randomness(graph: Graph, seed: int) -> _Randomness:
    """The crops' places and the augmentations' draws. seed: of this rank."""

    def anywhere(name: str) -> DataNode:
        return augment.uniform(0.0, 1.0, augment.stream(seed, name))

    def drawn(view: int) -> augment.Draws:
        frames, view_seed = graph.log_mel.frames(graph.seconds), augment.stream(seed, f"view {view}")
        return augment.draw(graph.augmentation, frames, graph.log_mel.n_mels, view_seed)

    if graph.mode == "views":
        crop1 = anywhere("crop 1")
        crop2 = anywhere("crop 2") if graph.crops == "independent" else crop1
        return _Randomness((crop1, crop2), (drawn(1), drawn(2)))
    crop = 0.5 if graph.source.shuffle_buffer == 0 else anywhere("crop")
    return _Randomness((crop,), ())


def build(
    graph: Graph, batch_size: int, threads: int, prefetch: int, seed: int, gpu: int | None, state: str | None
) -> Pipeline:
    """Build the pipeline. Outputs: [view1, view2, row, total, samples] in mode "views", [view or wave, ...] otherwise.

    Views are `(T, n_mels)`, time first. total, on the CPU: a number of each decoded segment that is finite only where
    all of the segment is. samples, on the CPU, INT32: its length as it was decoded; 0 in a batch outside `graph.epoch`,
    whose data is of size 1.

    gpu: CUDA device number, or None for the CPU alone. state: a `pipeline.checkpoint()` to go on from.
    The draws' seed differs by rank, the reader's must not: all ranks have to agree on the order they share.
    """
    pipeline = defined(graph, batch_size, threads, prefetch, seed, gpu, state)
    if gpu is None:
        build_on_cpu(pipeline)
    else:
        pipeline.build()
    return pipeline


def defined(
    graph: Graph, batch_size: int, threads: int, prefetch: int, seed: int, gpu: int | None, state: str | None
) -> Pipeline:
    """The pipeline of `build` before it is built, for which neither the shards nor a GPU need to be there."""
    on_gpu = gpu is not None
    device = "gpu" if on_gpu else "cpu"
    noise = noise_bank(graph, seed) if graph.mode == "views" else None

    def decoded(encoded: DataNode, random: _Randomness) -> tuple[DataNode, ...]:
        """The data of the mode, time before frequency, then total and samples."""
        wave, decoded_rate = fn.decoders.audio(encoded, dtype=types.FLOAT, downmix=True)
        samples = wave.shape(dtype=types.INT32)[0]
        # FLAC holds whole numbers: what decodes is finite, and need not be read once more to see that.
        total = fn.cast(samples, dtype=types.FLOAT) if graph.source.codec == "flac" else fn.reductions.sum(wave)
        rate = decoded_rate
        if not graph.source.native_rate:
            rate = types.Constant(np.float32(graph.log_mel.sample_rate), device="cpu")
        if on_gpu:
            wave = wave.gpu()

        def crop(at: DataNode | float) -> DataNode:
            return band_limited(place(wave, rate, graph, at), rate, graph, on_gpu)

        first = at_front_end_rate(crop(random.crops[0]), rate, graph)
        if graph.mode == "raw":
            return first, total, samples
        if graph.mode == "clean":
            return clean_view(first, graph.log_mel), total, samples
        second = first
        if graph.crops == "independent":
            second = at_front_end_rate(crop(random.crops[1]), rate, graph)
        # One bank for both views: DALI keeps a copy of a constant for each sample of the batch.
        bank = None if noise is None else types.Constant(noise, device=device)
        return (*two_views((first, second), random.draws, bank, graph, on_gpu), total, samples)

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=gpu,
        prefetch_queue_depth=prefetch,
        enable_conditionals=True,
        enable_checkpointing=True,
        exec_dynamic=True,
        concurrency=OperatorConcurrency.BACKEND if on_gpu else OperatorConcurrency.FULL,
    )
    def define() -> tuple[DataNode, ...]:
        encoded, row = read(graph.source, seed)
        random = randomness(graph, augment.stream(seed, f"rank {graph.source.shard_id}"))
        if graph.epoch is None:  # noqa: SIM114 - a condition of Python, and then one of the graph
            outputs = decoded(encoded, random)
        elif is_used(graph.epoch, batch_size):
            outputs = decoded(encoded, random)
        else:
            outputs = nothing(graph.mode, device)
        *data, total, samples = outputs
        return (*data, row, total, samples)

    return define(checkpoint=state)
