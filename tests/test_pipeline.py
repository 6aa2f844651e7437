"""The graph from a shard to views: rates, codecs, lengths, crops, and what it gives when nothing is drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.graphs import ALL, FRAMES, LONG, OFF, SECONDS, SHORT, crops, graph, outputs, places, sweep
from helpers.signals import RATE, Array, noise, reference_log_mel, song, write_shards
from torchaudio.functional import resample

from simsiam_dali.config.schema import AugmentationConfig
from simsiam_dali.data.graph import Epoch, GraphConfig, LogMel
from simsiam_dali.data.pipeline import PipelineSettings, build


def pcm(wave: Array) -> Array:
    """`wave` as 16 bits hold it."""
    return (np.round(wave * 32768) / 32768).astype(np.float32)


@pytest.fixture(scope="module")
def songs() -> list[Array]:
    return [song(SECONDS, seed) for seed in range(4)]


@pytest.mark.parametrize("codec", ["flac", "wav", "ogg"])
def test_every_codec_gives_the_reference_log_mel(codec: str, songs: list[Array], tmp_path: Path) -> None:
    shards = write_shards(tmp_path, songs, codec=codec)
    views, rows = outputs(graph(shards, "clean", codec=codec), len(songs))
    assert views.shape == (4, 128, FRAMES)
    assert views.dtype == np.float32
    assert rows.dtype == np.int64
    assert rows.ravel().tolist() == [0, 1, 2, 3]
    for wave, view in zip(songs, views, strict=True):
        expected = reference_log_mel(wave)
        loud = expected > expected.max() - 40
        # FLAC and WAV round to 16 bits, which is heard some 30 dB below what is compared; Vorbis is lossy.
        assert np.abs(view - expected)[loud].mean() < (1.0 if codec == "ogg" else 0.01)


RATES = (8000, 16000, 22050, 44100, 48000)


def test_mixed_native_rates_agree_with_a_reference_resampler(tmp_path: Path) -> None:
    studio = torch.from_numpy(song(SECONDS, seed=5, rate=48000))
    sharp = {"lowpass_filter_width": 64, "rolloff": 0.98}
    waves = [resample(studio, 48000, rate, **sharp).numpy() for rate in RATES]
    shards = write_shards(tmp_path, waves, RATES)
    clean = graph(shards, "clean", native_rate=True)
    views = outputs(clean, len(RATES))[0]
    expected = reference_log_mel(resample(studio, 48000, RATE, **sharp).numpy())
    assert views.shape == (len(RATES), 128, FRAMES)
    mels = 2595 * np.log10(1 + np.array([3600, 6900]) / 700)
    highest = (mels / (2595 * np.log10(1 + RATE / 2 / 700)) * 129 - 2).astype(int)
    for rate, view in zip(RATES, views, strict=True):
        # Below the resamplers' transition bands (8 kHz material ends at 4 kHz), and down to 40 dB below the peak,
        # where 16 bits and the resamplers' own ripple count for hundredths of a dB. What folds back is 20 dB and more.
        bins = highest[int(rate > 8000)]
        loud = expected[:bins] > expected.max() - 40
        error = np.abs(view[:bins] - expected[:bins])[loud]
        assert error.max() < 0.1, rate


# One sample more than 16,895 would be one frame more: some rates' samples do not divide evenly.
@pytest.mark.parametrize("seconds", [SECONDS, 16895 / RATE])
@pytest.mark.parametrize("native_rate", [False, True])
def test_nothing_drawn_gives_the_clean_view_exactly(native_rate: bool, seconds: float, tmp_path: Path) -> None:
    rates = RATES if native_rate else (RATE,) * 3
    shards = write_shards(tmp_path, [noise(seconds, seed, rate) for seed, rate in enumerate(rates)], rates)
    settings: dict[str, Any] = {"seconds": seconds, "segment_seconds": seconds, "native_rate": native_rate}
    settings["spec"] = LogMel(mean=-30.0, std=15.0)
    clean = outputs(graph(shards, "clean", **settings), len(rates))[0]
    assert clean.shape == (len(rates), 128, LogMel().frames(seconds))
    for augmentation in (OFF, AugmentationConfig(**{**OFF.model_dump(), "pitch_shift_prob": 1e-9, "noise_prob": 1e-9})):
        first, second, _ = outputs(graph(shards, "views", augmentation, **settings), len(rates))
        np.testing.assert_array_equal(first, clean)
        np.testing.assert_array_equal(second, clean)


@pytest.mark.parametrize("missing", [0, 1, 40])
def test_everything_drawn_at_once_gives_whole_views_at_any_rate(missing: int, tmp_path: Path) -> None:
    # `missing`: samples that a codec or the rounding of a rate may leave out.
    waves = [noise(SECONDS, seed, rate)[: -missing or None] for seed, rate in enumerate(RATES)]
    shards = write_shards(tmp_path, waves, RATES)
    for seconds in (SECONDS, 1.7):
        views = graph(shards, "views", ALL, seconds=seconds, native_rate=True)
        first, second, rows = outputs(views, len(RATES), batches=4)
        assert first.shape == second.shape == (4 * len(RATES), 128, LogMel().frames(seconds))
        assert np.isfinite(first).all()
        assert np.isfinite(second).all()
        assert rows.ravel().tolist() == list(range(len(RATES))) * 4
        # Two views of one segment, and two epochs of it, are never the same.
        everything = np.concatenate([first, second]).reshape(8 * len(RATES), -1)
        assert len(np.unique(everything, axis=0)) == len(everything)


def test_spec_augment_false_masks_nothing(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [noise(SECONDS, seed) for seed in range(8)])
    masked, plain = (
        outputs(graph(shards, "views", cfg), 8)[0]
        for cfg in (
            AugmentationConfig(),
            AugmentationConfig(spec_augment=False, frequency_mask_prob=1.0, time_mask_prob=1.0),
        )
    )
    assert (plain != 0).all()
    assert 0 < (masked == 0).mean() < 1
    # The masks are the only difference: every other draw has a seed of its own.
    np.testing.assert_array_equal(plain[masked != 0], masked[masked != 0])


# --- where a view is taken from


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    return write_shards(tmp_path_factory.mktemp("sweeps"), [sweep()] * 8)


@pytest.mark.parametrize("kind", ["same", "independent"])
def test_two_views_come_from_one_place_or_from_two(kind: str, sweeps: Any) -> None:
    first, second, _ = outputs(crops(sweeps, "views", crops=kind), 8, batches=8)
    one, two = places(first), places(second)
    if kind == "same":
        np.testing.assert_array_equal(first, second)
    else:
        assert np.abs(one - two).mean() > 0.2 * LONG  # a third of the length, for two uniform places
        assert abs(np.corrcoef(one, two)[0, 1]) < 4 / np.sqrt(len(one))
    for where in (one, two):  # all over the segment, no two alike
        assert SHORT / 2 - 0.1 <= where.min() < 0.15 * LONG
        assert 0.85 * LONG < where.max() <= LONG - SHORT / 2 + 0.1
        assert len(np.unique(where.round(3))) == len(where)


@pytest.mark.parametrize("kind", ["same", "independent"])
def test_more_views_leave_the_first_two_as_they_are(kind: str, sweeps: Any) -> None:
    """And each further one has draws and, where crops are independent, a place of its own."""
    drawn = {"augmentation": AugmentationConfig(time_mask_param=10), "crops": kind}
    two = outputs(crops(sweeps, "views", **drawn), 8, batches=4)
    four = outputs(crops(sweeps, "views", **drawn, views=4), 8, batches=4)
    for a, b in zip((two[0], two[1], two[-1]), (four[0], four[1], four[-1]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len({view.tobytes() for view in four[:4]}) == 4
    plain = outputs(crops(sweeps, "views", crops=kind, views=4), 8, batches=4)
    assert len({view.tobytes() for view in plain[:4]}) == (1 if kind == "same" else 4)


def test_the_clean_crop_is_the_middle(sweeps: Any) -> None:
    view = outputs(crops(sweeps, "clean"), 1)[0]
    assert view.shape == (1, 128, LogMel().frames(SHORT))
    assert places(view)[0] == pytest.approx(LONG / 2, abs=0.02)


def test_raw_audio_is_the_middle_in_order_and_anywhere_when_shuffled(sweeps: Any) -> None:
    wave, row = outputs(crops(sweeps, "raw"), 1)
    assert wave.dtype == np.float32
    assert row.dtype == np.int64
    start = round((LONG - SHORT) / 2 * RATE)
    np.testing.assert_allclose(wave[0], sweep()[start : start + round(SHORT * RATE)], atol=1e-4)  # 16 bits
    waves = outputs(crops(sweeps, "raw", shuffle_buffer=8), 8)[0]
    assert len(np.unique(waves, axis=0)) == 8


def test_raw_audio_of_any_rate_comes_at_the_front_end_rate(tmp_path: Path) -> None:
    # Away from the ends, where the resamplers see silence, a tone is the same samples whatever rate it had.
    waves = [(0.5 * np.sin(2 * np.pi * 440 * np.arange(round(SECONDS * rate)) / rate)) for rate in RATES]
    shards = write_shards(tmp_path, waves, RATES)
    result = outputs(graph(shards, "raw", native_rate=True), len(RATES))[0]
    assert result.shape == (len(RATES), round(SECONDS * RATE))
    expected = waves[RATES.index(RATE)][200:-200]
    for rate, wave in zip(RATES, result, strict=True):
        assert np.sqrt(np.mean((wave[200:-200] - expected) ** 2)) < 1e-3, rate


def test_stereo_is_mixed_to_mono(tmp_path: Path) -> None:
    left, right = noise(SECONDS, 1), noise(SECONDS, 2)
    shards = write_shards(tmp_path, [np.stack([left, right], axis=1)])
    wave = outputs(graph(shards, "raw"), 1)[0][0]
    np.testing.assert_allclose(wave, (left + right) / 2, atol=1e-4)


# --- the GPU

RESAMPLED_DEPTH_DB = 40.0
"""Depth of the comparison where the GPU resamples. An error of 1e-3 of a std is 95 dB below the peak there; the GPU
resampler's rounding was at 103 dB below it (NVIDIA H200)."""


@pytest.mark.gpu
@pytest.mark.parametrize("native_rate", [False, True])
@pytest.mark.parametrize("mode", ["views", "clean", "raw"])
def test_the_gpu_gives_what_the_cpu_gives(mode: str, native_rate: bool, tmp_path: Path) -> None:
    rates = RATES if native_rate else (RATE,) * 5
    shards = write_shards(tmp_path, [song(SECONDS, seed, rate) for seed, rate in enumerate(rates)], rates)
    drawn = AugmentationConfig(mixup_prob=0.5, crop_prob=0.5)
    one = graph(shards, mode, drawn, native_rate=native_rate, spec=LogMel(mean=-30.0, std=15.0))
    assert_same_on_both_devices(one, 5, batches=4, depth_db=RESAMPLED_DEPTH_DB if native_rate else 60.0)


@pytest.mark.gpu
@pytest.mark.parametrize(("crops", "seconds"), [("same", 60.0), ("independent", 45.0)])
def test_the_gpu_gives_what_the_cpu_gives_of_a_minute_at_44_1_khz(crops: str, seconds: float, tmp_path: Path) -> None:
    """The songs as they are on a disk: all of a segment, and two places of it, with a short view beside them."""
    rates = (44100,) * 3
    shards = write_shards(tmp_path, [song(60.0, seed, rate) for seed, rate in enumerate(rates)], rates)
    spec = LogMel(mean=-30.0, std=15.0)
    one = graph(shards, "views", AugmentationConfig(), seconds, 60.0, native_rate=True, spec=spec, crops=crops,
                short_views=1, short_seconds=5.0)  # fmt: skip
    assert_same_on_both_devices(one, 3, batches=2, depth_db=RESAMPLED_DEPTH_DB)


@pytest.mark.gpu
def test_a_batch_outside_an_epoch_is_not_decoded_on_a_gpu_either(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [song(SECONDS, seed) for seed in range(4)], (RATE,) * 4)
    one = graph(shards, "views", AugmentationConfig(), epoch=Epoch(used=1, reader_batches=2))
    pipeline = build(one, PipelineSettings(2, threads=2, prefetch=1, seed=0, gpu=0))
    shapes = [tuple(np.array(pipeline.run()[0].as_cpu().as_array()).shape) for _ in range(4)]
    assert shapes == [(2, FRAMES, LogMel().n_mels), (2, 1, 1)] * 2


def assert_same_on_both_devices(one: GraphConfig, batch_size: int, batches: int, depth_db: float = 60.0) -> None:
    """The draws are the same, and so are the views, up to rounding.

    Deep in the valleys of a spectrum a log shows the rounding of float32, which differs between the two devices: that
    of the FFT, and the GPU resampler's, some 100 dB below the peak. So values are compared down to `depth_db` below the
    peak. The log-mel's std is 15 dB. Raw audio is compared whole.
    """
    (*cpu_data, cpu_rows), (*gpu_data, gpu_rows) = (
        outputs(one, batch_size, gpu=gpu, batches=batches) for gpu in (None, 0)
    )
    np.testing.assert_array_equal(cpu_rows, gpu_rows)
    for a, b in zip(cpu_data, gpu_data, strict=True):
        compared = np.isfinite(a) if one.mode == "raw" else a > a.max() - depth_db / 15.0
        np.testing.assert_allclose(a[compared], b[compared], rtol=0, atol=1e-3)
