"""Synthesis of short songs for the demo library: an artist is a `Style`, a song is a draw from it.

This is no music, and a score on it promises nothing for a real library. It is made so that what an artist is can be
heard, that recordings get in the way as they do in life, and that a minute or two of training show a difference:

- An artist keeps instruments, scale, chords, rhythms, drums, bass line, note lengths, echo, mix, and, within 7%, the
  tempo. Genres, instruments and patterns are shared by several artists; it is the combination that is an artist's.
- A song has a melody of its own, a key within three semitones of the artist's, and a tempo of its own.
- A recording has a room, a tape with more or less hiss, and an equalisation of its own, whoever plays. Room, hiss, key
  and tempo are what SimSiam's augmentations vary (reverb, noise, pitch shift, time stretch), over the ranges that
  configs/demo.yaml sets for this library: an encoder can learn without a label to hear past them, which an average of
  the spectrum such as MFCCs cannot, and hears rhythm and tempo besides. Hiss is what MFCCs are led astray by most.

A song is composed on a grid of sixteenth notes (melody, chords, bass, drums), rendered with classic voices (additive,
FM, Karplus-Strong, noise) at 32 kHz in stereo, recorded, and then brought to a file's rate, channels and level.
Everything is a function of the generator that is passed in: a song depends on nothing but its seed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import ceil

import numpy as np
from numpy.typing import NDArray
from scipy import fft

Audio = NDArray[np.floating]
Voice = Callable[[float, int, np.random.Generator], Audio]

RENDER_RATE = 32_000  # Hz
STEPS = 16  # sixteenth notes in a bar
LEVEL_RMS = 0.08  # of full scale (-22 dBFS), the same for all songs
TILT_PIVOT_HZ = 700.0

SCALES = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "minor": (0, 2, 3, 5, 7, 8, 10),
    "dorian": (0, 2, 3, 5, 7, 9, 10),
    "pentatonic": (0, 3, 5, 7, 10),
    "whole tone": (0, 2, 4, 6, 8, 10),
    "hijaz": (0, 1, 4, 5, 7, 8, 10),
}
PROGRESSIONS = ((0, 3, 4, 0), (0, 5, 3, 4), (0, 4, 5, 3), (0, 0, 3, 0), (0, 2, 1, 4))
RHYTHMS = ("x...x...x...x...", "x..x..x.x..x..x.", "x.x.x.x.x.x.x.x.", "x.......x...x...", "x.xx..x.x.xx..x.")
CHORD_RHYTHMS = ("x...............", "..x...x...x...x.", "x.......x.......", "x..x..x.........")
BASS_RHYTHMS = ("x.....x.x.....x.", "x.......x.......", "x.x.x.x.x.x.x.x.", "x..x..x..x..x.x.")

DRUM_RHYTHMS = {
    "kick": ("x...x...x...x...", "x.....x.x.......", "x..x..x...x.x...", "x.........x.....", "x.x.......x....."),
    "snare": ("....x.......x...", "............x..x", "....x..x.x..x...", "........x......."),
    "hat": ("..x...x...x...x.", "x.x.x.x.x.x.x.x.", "xxxxxxxxxxxxxxxx", "x...x...x...x..."),
    "brush": ("x...x...x...x...", "x.xxx.xxx.xxx.xx", "x...x..xx...x..x", "..x...x...x...x."),
}

# A genre is what one hears first: which drums there are, and how fast they go.
DRUMS = {
    "Ambient": (),
    "Electronic": ("kick", "snare", "hat"),
    "Folk": ("brush",),
    "Jazz": ("kick", "brush"),
    "Rock": ("kick", "snare", "hat"),
}
TEMPI = {"Ambient": (64, 96), "Electronic": (116, 140), "Folk": (84, 120), "Jazz": (76, 124), "Rock": (100, 176)}
SWING = {"Jazz": 0.3}  # delay of every second step, in steps


@dataclass(frozen=True)
class Style:
    """What the songs of one artist have in common.

    `root` is a MIDI note, `lead_octave` in octaves above it, `tempo` in beats a minute, `tilt` in dB an octave around
    `TILT_PIVOT_HZ` (negative is dark); gains are linear, rhythms and drums are one bar of sixteenths. `legato` is the
    share of a lead note's time that it sounds, `echo_steps` the delay of the lead's echo in steps (0: none).
    """

    genre: str
    lead: str
    chords: str
    scale: tuple[int, ...]
    root: int
    lead_octave: int
    tempo: float
    tilt: float
    progression: tuple[int, ...]
    rhythm: str
    chord_rhythm: str
    bass_rhythm: str
    drums: dict[str, str]
    legato: float
    echo_steps: int
    lead_gain: float
    bass_gain: float
    drum_gain: float


def draw_styles(count: int, rng: np.random.Generator) -> list[Style]:
    """Draw `count` styles. Genres and lead voices go round: each is shared, and no pair comes twice in 30."""
    genres = rng.permutation(list(DRUMS)).tolist()
    leads = rng.permutation(list(VOICES)).tolist()
    styles = []
    for index in range(count):
        genre, lead = genres[index % len(genres)], leads[index % len(leads)]
        styles.append(
            Style(
                genre=genre,
                lead=lead,
                chords=str(rng.choice([voice for voice in VOICES if voice != lead])),
                scale=SCALES[str(rng.choice(list(SCALES)))],
                root=int(rng.integers(43, 55)),
                lead_octave=int(rng.integers(1, 3)),
                tempo=float(rng.uniform(*TEMPI[genre])),
                tilt=float(rng.uniform(-4.0, 3.0)),
                progression=PROGRESSIONS[rng.integers(len(PROGRESSIONS))],
                rhythm=str(rng.choice(RHYTHMS)),
                chord_rhythm=str(rng.choice(CHORD_RHYTHMS)),
                bass_rhythm=str(rng.choice(BASS_RHYTHMS)),
                drums={drum: str(rng.choice(DRUM_RHYTHMS[drum])) for drum in DRUMS[genre]},
                legato=float(rng.choice([0.65, 0.85, 1.0])),
                echo_steps=int(rng.choice([0, 3, 4])),
                lead_gain=float(rng.uniform(0.6, 1.0)),
                bass_gain=float(rng.choice([0.0, 0.3, 0.6])),
                drum_gain=float(rng.uniform(0.5, 0.9)),
            )
        )
    return styles


# --- voices: (frequency in Hz, length in samples, generator) -> samples with a peak near 1


def _seconds(samples: int) -> Audio:
    return np.arange(samples, dtype=np.float32) / RENDER_RATE


def _phase(frequency: float, samples: int) -> Audio:
    """Radians of a tone, kept below 4 pi, where float32 is exact enough for the highest partial."""
    return (2 * np.pi * np.mod(np.arange(samples) * (frequency / RENDER_RATE), 2.0)).astype(np.float32)


def _partials(frequency: float, samples: int, amplitudes: dict[float, float], vibrato: float = 0.0) -> Audio:
    """Additive synthesis: {multiple of the fundamental, in halves: amplitude}, without what would alias."""
    phase = _phase(frequency, samples)
    if vibrato:
        phase += vibrato * np.sin(2 * np.pi * 5.5 * _seconds(samples))
    audible = {k: a for k, a in amplitudes.items() if k * frequency < 0.45 * RENDER_RATE}
    tone = np.zeros_like(phase)
    for multiple, amplitude in audible.items():
        tone += amplitude * np.sin(multiple * phase)
    return tone / sum(audible.values())


def _organ(frequency: float, samples: int, _: np.random.Generator) -> Audio:
    return 1.6 * _partials(frequency, samples, {0.5: 0.6, 1: 1.0, 1.5: 0.4, 2: 0.8, 3: 0.5, 4: 0.5, 6: 0.3, 8: 0.3})


def _reed(frequency: float, samples: int, _: np.random.Generator) -> Audio:
    tone = _partials(frequency, samples, {k: 1 / k for k in range(1, 16, 2)}, vibrato=0.15)
    return 1.4 * tone * np.minimum(1, _seconds(samples) / 0.05)


def _strings(frequency: float, samples: int, _: np.random.Generator) -> Audio:
    saw = {float(k): 1 / k for k in range(1, 13)}
    tone = _partials(0.997 * frequency, samples, saw) + _partials(1.004 * frequency, samples, saw)
    return tone * np.minimum(1, _seconds(samples) / 0.15)


def _bell(frequency: float, samples: int, _: np.random.Generator) -> Audio:
    time = _seconds(samples)
    modulator = 2.5 * np.exp(-4 * time) * np.sin(_phase(3.5 * frequency, samples))
    return np.exp(-3 * time) * np.sin(_phase(frequency, samples) + modulator)


def _electric_piano(frequency: float, samples: int, _: np.random.Generator) -> Audio:
    time, phase = _seconds(samples), _phase(frequency, samples)
    return np.exp(-1.5 * time) * np.sin(phase + 1.6 * np.exp(-3 * time) * np.sin(phase))


def _pluck(frequency: float, samples: int, rng: np.random.Generator) -> Audio:
    """Karplus and Strong (1983): a burst of noise in a loop of one period, averaged at each turn."""
    turns = ceil(samples * frequency / RENDER_RATE) + 2
    period = ceil(RENDER_RATE / frequency)
    string = np.empty((turns, period), np.float32)
    string[0] = rng.uniform(-1, 1, period)
    for before, after in pairwise(string):
        after[1:] = 0.498 * (before[1:] + before[:-1])
        after[0] = 0.498 * (before[0] + before[-1])
    # The loop has a whole number of samples; reading it at a slightly different speed puts it in tune.
    # Averaging delays by half a sample a turn.
    position = np.arange(samples) * (frequency / RENDER_RATE * (period + 0.5))
    return np.interp(position, np.arange(string.size), string.ravel()).astype(np.float32)


VOICES: dict[str, Voice] = {
    "organ": _organ,
    "reed": _reed,
    "strings": _strings,
    "bell": _bell,
    "electric piano": _electric_piano,
    "pluck": _pluck,
}


def _bass(frequency: float, samples: int, _: np.random.Generator) -> Audio:
    return np.exp(-2 * _seconds(samples)) * _partials(frequency, samples, {1: 1.0, 2: 0.4, 3: 0.2})


def _drum(name: str, rng: np.random.Generator) -> Audio:
    """One hit with a peak near 1; noise made bright by differences and dull by running means."""
    time = _seconds(int(0.3 * RENDER_RATE))
    noise = rng.uniform(-1, 1, len(time)).astype(np.float32)
    if name == "kick":
        return np.exp(-14 * time) * np.sin(2 * np.pi * (45 * time + 3 * (1 - np.exp(-30 * time))))
    if name == "snare":
        return 0.6 * np.exp(-22 * time) * noise + 0.4 * np.exp(-30 * time) * np.sin(2 * np.pi * 190 * time)
    if name == "hat":
        return 0.4 * np.exp(-60 * time) * np.diff(noise, prepend=np.float32(0))
    return 0.8 * np.exp(-18 * time) * np.convolve(noise, np.full(4, 0.25, np.float32), mode="same")  # brush


# --- songs


def _add(mix: Audio, start: float, sound: Audio, gain: float, pan: float) -> None:
    """Mix `sound` in at `start` seconds; `pan` from -1 (left) to 1 (right)."""
    begin = int(start * RENDER_RATE)
    sound = sound[: max(0, mix.shape[1] - begin)]
    for channel, side in zip(mix, (1 - pan, 1 + pan), strict=True):
        channel[begin : begin + len(sound)] += np.float32(gain * side / 2) * sound


def _marks(rhythm: str) -> list[int]:
    return [step for step, mark in enumerate(rhythm) if mark == "x"]


def _melody(style: Style, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """Two bars of (step, scale degree, length in steps): a random walk on the style's rhythm."""
    onsets = _marks(style.rhythm * 2)
    degree = int(rng.integers(0, 5))
    notes = []
    for step, end in zip(onsets, [*onsets[1:], 2 * STEPS], strict=True):
        degree = int(np.clip(degree + rng.integers(-2, 3), -3, 9))
        if rng.random() > 0.12:
            notes.append((step, degree, end - step))
    return notes


def compose(style: Style, seconds: float, rng: np.random.Generator) -> tuple[Audio, float]:
    """Play a new song: samples (2, seconds * RENDER_RATE) at any level, and its tempo in beats a minute."""
    tempo = style.tempo * rng.uniform(0.93, 1.07)
    step_seconds = 60 / tempo / 4
    key = style.root + int(rng.integers(-3, 4))
    swing = SWING.get(style.genre, 0.0)
    phrases = [_melody(style, rng), _melody(style, rng)]
    kit = {name: _drum(name, rng) for name in style.drums}
    mix = np.zeros((2, round(seconds * RENDER_RATE)), np.float32)

    @cache
    def note(voice: str, pitch: int, steps: float) -> Audio:
        samples = int(steps * step_seconds * RENDER_RATE)
        time = _seconds(samples)
        ends = np.minimum(1, np.minimum(time / 0.005, (time[-1] - time) / 0.02))  # s; no clicks
        play = _bass if voice == "bass" else VOICES[voice]
        return ends * play(440 * 2 ** ((pitch - 69) / 12), samples, rng)

    def pitch_of(degree: int, octave: int) -> int:
        octaves, step = divmod(degree, len(style.scale))
        return key + 12 * (octave + octaves) + style.scale[step]

    def at(bar: int, step: int) -> float:
        return (bar * STEPS + step + swing * (step % 2)) * step_seconds

    def play_lead(bar: int, step: int, sound: Audio) -> None:
        _add(mix, at(bar, step), sound, style.lead_gain, 0.3)
        for turn in range(1, 3 if style.echo_steps else 1):
            _add(mix, at(bar, step + turn * style.echo_steps), sound, style.lead_gain * 0.5**turn, (-0.3) ** turn)

    for bar in range(ceil(seconds / (STEPS * step_seconds))):
        chord = style.progression[bar % len(style.progression)]
        if bar % 2 == 0:
            for step, degree, steps in phrases[bar // 4 % 2]:
                if bar % 8 != 6 or step < STEPS:  # the lead rests in the last bar of eight
                    play_lead(bar, step, note(style.lead, pitch_of(degree, style.lead_octave), steps * style.legato))
        for step in _marks(style.chord_rhythm):
            steps = min(STEPS - step, 8 if style.chord_rhythm.count("x") > 1 else STEPS)
            for degree in (chord, chord + 2, chord + 4):
                _add(mix, at(bar, step), note(style.chords, pitch_of(degree, 1), steps), 0.25, -0.4)
        for step in _marks(style.bass_rhythm) if style.bass_gain else ():
            _add(mix, at(bar, step), note("bass", pitch_of(chord, -1), 3), style.bass_gain, 0.0)
        for name, pattern in style.drums.items():
            for step in _marks(pattern):
                _add(mix, at(bar, step), kit[name], style.drum_gain, 0.0)
    return mix, tempo


def record(mix: Audio, rng: np.random.Generator) -> Audio:
    """Put a song (2, n) into a room and on a tape of its own, as recordings of one artist differ.

    RT60 0.15 to 1.2 s at a direct-to-reverberant ratio of 0 to 14 dB; white hiss 5 to 50 dB below the music.
    """
    rt60, ratio = rng.uniform(0.15, 1.2), 10 ** (-rng.uniform(0, 14) / 20)
    time = _seconds(int(rt60 * RENDER_RATE))
    tail = rng.standard_normal((2, len(time)), np.float32) * 10 ** (-3 * time / np.float32(rt60))
    tail *= ratio / np.sqrt((tail**2).sum(axis=1, keepdims=True))
    length = mix.shape[1]
    size = fft.next_fast_len(length + len(time), real=True)
    wet = fft.irfft(fft.rfft(mix, size) * fft.rfft(tail, size), size)[:, :length]
    hiss = rng.standard_normal(mix.shape, np.float32) * (mix.std() * 10 ** (-rng.uniform(5, 50) / 20))
    return mix + wet + hiss


def _tilt_gain(frequency: NDArray[np.float64], tilt: float) -> Audio:
    """Linear gain of a spectrum tilted by `tilt` dB an octave, which ends at 60 Hz and 10 kHz."""
    octaves = np.log2(frequency.clip(60, 10_000) / TILT_PIVOT_HZ)
    return (10 ** (tilt * octaves / 20)).astype(np.float32)


def brightness(mix: Audio, tilt: float) -> float:
    """Mean frequency (Hz, in octaves: its log2) of a song (2, n) tilted by `tilt`, weighted by amplitude.

    From 60 Hz to 8 kHz, which all files hold.
    """
    size = fft.next_fast_len(mix.shape[1], real=True)
    frequency = fft.rfftfreq(size, 1 / RENDER_RATE)
    heard = (frequency > 60) & (frequency < 8000)
    amplitude = np.abs(fft.rfft(mix.mean(axis=0), size)[heard]) * _tilt_gain(frequency[heard], tilt)
    return float(np.average(np.log2(frequency[heard]), weights=amplitude))


def master(mix: Audio, tilt: float, rate: int, channels: int) -> Audio:
    """Tilt the spectrum (dB an octave), resample, mix to 1 or 2 channels, fade the ends and set the level.

    mix: (2, n) at `RENDER_RATE`, n a whole number of tenths of a second. Returns (samples, channels) within
    +-1 at `rate` Hz, the RMS of their mono sum near `LEVEL_RMS`.
    """
    length = mix.shape[1] * rate // RENDER_RATE
    if channels == 1:
        mix = mix.mean(axis=0, keepdims=True)
    tenths = fft.next_fast_len(mix.shape[1] * 10 // RENDER_RATE, real=True)  # a length that is whole at both rates
    size = tenths * rate // 10
    spectrum = fft.rfft(mix, tenths * RENDER_RATE // 10)[:, : size // 2 + 1]
    spectrum *= _tilt_gain(np.arange(spectrum.shape[1]) * 10 / tenths, tilt)
    audio = fft.irfft(spectrum, size)[:, :length].T
    time = np.arange(length, dtype=np.float32)[:, None] / rate
    audio *= np.minimum(1, np.minimum(time / 0.01, (length / rate - time) / 0.5))
    audio *= LEVEL_RMS / np.sqrt(np.mean(audio.mean(axis=1) ** 2))
    return np.tanh(audio)  # rounds the rare peak that would clip
