"""The mel front end against torchaudio's."""

import numpy as np
import pytest
from helpers.signals import RATE, clicks, noise, reference_log_mel, reference_mel, run_graph, song, tone

from simsiam_dali.data.graph import LogMel
from simsiam_dali.data.views import FLOOR_DB, clean_view, mel_power, power_spectrogram

WAVES = {
    "noise": noise(4.0),
    "faint noise": 1e-3 * noise(4.0),
    "song": song(4.0, seed=0),
    "tone": tone(1000.0, 4.0),
    "square": np.sign(tone(333.0, 4.0)),
    "low tone": tone(30.0, 4.0),
    "clicks": clicks(0.25, 4.0),
}


@pytest.mark.parametrize(
    "spec",
    [LogMel(), LogMel(n_fft=1024, hop_length=256, n_mels=64), LogMel(sample_rate=22050, n_mels=80)],
    ids=["default", "short", "22 kHz"],
)
def test_mel_power_equals_torchaudio(spec: LogMel) -> None:
    mels = run_graph(lambda wave: mel_power(power_spectrogram(wave, spec), spec), {"wave": list(WAVES.values())})[0]
    for name, wave, mel in zip(WAVES, WAVES.values(), mels, strict=True):
        expected = reference_mel(wave, spec).T
        error, peak = np.abs(mel - expected), expected.max(axis=1, keepdims=True)
        # Relative to the loudest of the bin and its two neighbours: the filters' edges are rounded to float32,
        # which moves a little power from one bin to the next. 50 dB below the frame's peak a float32 FFT holds
        # little but the rounding of that peak, in torchaudio as well; there the peak is the measure.
        padded = np.pad(expected, ((0, 0), (1, 1)))
        nearby = np.max([padded[:, :-2], expected, padded[:, 2:]], axis=0)
        assert (error <= 1e-4 * nearby)[expected > 1e-5 * peak].all(), name
        assert (error <= 1e-4 * peak).all(), name


def test_log_mel_equals_torchaudio_in_db() -> None:
    waves = [WAVES["noise"], WAVES["faint noise"], np.zeros(4 * RATE, np.float32)]
    views = run_graph(lambda wave: clean_view(wave, LogMel()), {"wave": waves})[0]
    for wave, view in zip(waves, views, strict=True):
        # 1e-4 of the power is 4.3e-4 dB. Digital silence lies at the floor in both.
        np.testing.assert_allclose(view.T, reference_log_mel(wave), rtol=0, atol=4.3e-4)
    assert np.all(views[-1] == pytest.approx(FLOOR_DB, abs=1e-4))


def test_normalised_with_the_mean_and_std_of_the_data_set() -> None:
    spec = LogMel(mean=-31.5, std=14.2)
    view = run_graph(lambda wave: clean_view(wave, spec), {"wave": [WAVES["song"]]})[0][0].T
    loud = reference_log_mel(WAVES["song"]) > -50
    expected = (reference_log_mel(WAVES["song"]) + 31.5) / 14.2
    np.testing.assert_allclose(view[loud], expected[loud], rtol=0, atol=1e-3)


def test_a_minute_has_1876_frames() -> None:
    view = run_graph(lambda wave: clean_view(wave, LogMel()), {"wave": [noise(60.0)]})[0][0]
    assert view.shape == (1876, 128)  # time first
    assert LogMel().frames(60.0) == 1876
