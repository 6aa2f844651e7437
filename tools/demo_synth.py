"""Synthesis of short songs for the demo library: an artist is a `Style`, a song is a draw from it.

A song is composed on a grid of sixteenth notes (melody, chords, bass, drums), rendered with classic voices
(additive, FM, Karplus-Strong, noise) at 48 kHz in stereo, and then brought to a file's rate, channels and
level. Everything is a function of the generator that is passed in: a song depends on nothing but its seed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import ceil

import numpy as np
from numpy.typing import NDArray

Audio = NDArray[np.float64]
Voice = Callable[[float, Audio, np.random.Generator], Audio]

RENDER_RATE = 48_000  # Hz
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

# A genre is what one hears first: which drums there are, and how fast they go.
DRUMS = {
    "Ambient": {},
    "Electronic": {"kick": "x...x...x...x...", "hat": "..x...x...x...x.", "snare": "............x..x"},
    "Folk": {"brush": "x...x...x...x..."},
    "Jazz": {"kick": "x.........x.....", "brush": "x...x..xx...x..x"},
    "Rock": {"kick": "x.....x.x.......", "snare": "....x.......x...", "hat": "x.x.x.x.x.x.x.x."},
}
TEMPI = {
    "Ambient": (64, 96),
    "Electronic": (116, 140),
    "Folk": (84, 120),
    "Jazz": (76, 124),
    "Rock": (100, 176),
}
SWING = {"Jazz": 0.3}  # delay of every second step, in steps


@dataclass(frozen=True)
class Style:
    """What the songs of one artist have in common.

    `root` is a MIDI note, `lead_octave` in octaves above it, `tempo` in beats a minute, `tilt` in dB an
    octave around `TILT_PIVOT_HZ` (negative is dark); gains are linear, rhythms are one bar of sixteenths.
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
                lead_gain=float(rng.uniform(0.6, 1.0)),
                bass_gain=float(rng.choice([0.0, 0.5, 0.9])),
                drum_gain=float(rng.uniform(0.5, 0.9)),
            )
        )
    return styles


# --- voices: (frequency in Hz, times in s from the note's start, generator) -> samples with a peak near 1


def _partials(frequency: float, time: Audio, amplitudes: dict[float, float], vibrato: float = 0.0) -> Audio:
    """Additive synthesis: {multiple of the fundamental: amplitude}, without what would alias."""
    phase = 2 * np.pi * frequency * time + vibrato * np.sin(2 * np.pi * 5.5 * time)
    audible = {k: a for k, a in amplitudes.items() if k * frequency < 0.45 * RENDER_RATE}
    tone = np.zeros_like(time)
    for multiple, amplitude in audible.items():
        tone += amplitude * np.sin(multiple * phase)
    return tone / sum(audible.values())


def _organ(frequency: float, time: Audio, _: np.random.Generator) -> Audio:
    return 1.6 * _partials(frequency, time, {0.5: 0.6, 1: 1.0, 1.5: 0.4, 2: 0.8, 3: 0.5, 4: 0.5, 6: 0.3, 8: 0.3})


def _reed(frequency: float, time: Audio, _: np.random.Generator) -> Audio:
    tone = _partials(frequency, time, {k: 1 / k for k in range(1, 16, 2)}, vibrato=0.15)
    return 1.4 * tone * np.minimum(1, time / 0.05)


def _strings(frequency: float, time: Audio, _: np.random.Generator) -> Audio:
    saw = {float(k): 1 / k for k in range(1, 13)}
    tone = sum(_partials(frequency * detune, time, saw) for detune in (0.997, 1.004))
    return np.asarray(tone * np.minimum(1, time / 0.15))


def _bell(frequency: float, time: Audio, _: np.random.Generator) -> Audio:
    modulator = 2.5 * np.exp(-4 * time) * np.sin(2 * np.pi * 3.5 * frequency * time)
    return np.exp(-3 * time) * np.sin(2 * np.pi * frequency * time + modulator)


def _electric_piano(frequency: float, time: Audio, _: np.random.Generator) -> Audio:
    modulator = 1.6 * np.exp(-3 * time) * np.sin(2 * np.pi * frequency * time)
    return np.exp(-1.5 * time) * np.sin(2 * np.pi * frequency * time + modulator)


def _pluck(frequency: float, time: Audio, rng: np.random.Generator) -> Audio:
    """Karplus and Strong (1983): a burst of noise in a loop of one period, averaged at each turn."""
    turns = ceil(len(time) * frequency / RENDER_RATE) + 2
    period = ceil(RENDER_RATE / frequency)
    string = np.empty((turns, period))
    string[0] = rng.uniform(-1, 1, period)
    for turn in range(1, turns):
        string[turn] = 0.498 * (string[turn - 1] + np.roll(string[turn - 1], 1))
    # The loop has a whole number of samples; reading it at a slightly different speed puts it in tune.
    # Averaging delays by half a sample a turn.
    position = time * frequency * (period + 0.5)
    return np.interp(position, np.arange(string.size), string.ravel())


VOICES: dict[str, Voice] = {
    "organ": _organ,
    "reed": _reed,
    "strings": _strings,
    "bell": _bell,
    "electric piano": _electric_piano,
    "pluck": _pluck,
}


def _bass(frequency: float, time: Audio, _: np.random.Generator) -> Audio:
    return np.exp(-2 * time) * _partials(frequency, time, {1: 1.0, 2: 0.4, 3: 0.2})


def _drum(name: str, rng: np.random.Generator) -> Audio:
    """One hit with a peak near 1; noise made bright by differences and dull by running means."""
    time = np.arange(int(0.3 * RENDER_RATE)) / RENDER_RATE
    noise = rng.uniform(-1, 1, len(time))
    if name == "kick":
        return np.exp(-14 * time) * np.sin(2 * np.pi * (45 * time + 3 * (1 - np.exp(-30 * time))))
    if name == "snare":
        return 0.6 * np.exp(-22 * time) * noise + 0.4 * np.exp(-30 * time) * np.sin(2 * np.pi * 190 * time)
    if name == "hat":
        return 0.3 * np.exp(-60 * time) * np.diff(noise, prepend=0)
    return 0.8 * np.exp(-18 * time) * np.convolve(noise, np.full(6, 1 / 6), mode="same")  # brush


# --- songs


def _add(mix: Audio, start: float, sound: Audio, gain: float, pan: float) -> None:
    """Mix `sound` in at `start` seconds; `pan` from -1 (left) to 1 (right)."""
    begin = int(start * RENDER_RATE)
    sound = sound[: max(0, mix.shape[1] - begin)]
    mix[:, begin : begin + len(sound)] += gain * np.array([[1 - pan], [1 + pan]]) / 2 * sound


def _melody(style: Style, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """Two bars of (step, scale degree, length in steps): a random walk on the style's rhythm."""
    onsets = [step for step, mark in enumerate(style.rhythm * 2) if mark == "x"]
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
    key = style.root + int(rng.integers(-2, 3))
    swing = SWING.get(style.genre, 0.0)
    phrases = [_melody(style, rng), _melody(style, rng)]
    kit = {name: _drum(name, rng) for name in DRUMS[style.genre]}
    mix = np.zeros((2, round(seconds * RENDER_RATE)))

    @cache
    def note(voice: str, pitch: int, steps: int) -> Audio:
        time = np.arange(int(steps * step_seconds * RENDER_RATE)) / RENDER_RATE
        ends = np.minimum(1, np.minimum(time / 0.005, (time[-1] - time) / 0.02))  # s; no clicks
        play = _bass if voice == "bass" else VOICES[voice]
        return ends * play(440 * 2 ** ((pitch - 69) / 12), time, rng)

    def pitch_of(degree: int, octave: int) -> int:
        octaves, place = divmod(degree, len(style.scale))
        return key + 12 * (octave + octaves) + style.scale[place]

    def at(bar: int, step: int) -> float:
        return (bar * STEPS + step + swing * (step % 2)) * step_seconds

    for bar in range(ceil(seconds / (STEPS * step_seconds))):
        chord = style.progression[bar % len(style.progression)]
        if bar % 2 == 0:
            for step, degree, steps in phrases[bar // 4 % 2]:
                if bar % 8 != 6 or step < STEPS:  # the lead rests in the last bar of eight
                    pitch = pitch_of(degree, style.lead_octave)
                    _add(mix, at(bar, step), note(style.lead, pitch, steps), style.lead_gain, 0.3)
        for step in (i for i, mark in enumerate(style.chord_rhythm) if mark == "x"):
            steps = min(STEPS - step, 8 if style.chord_rhythm.count("x") > 1 else STEPS)
            for degree in (chord, chord + 2, chord + 4):
                _add(mix, at(bar, step), note(style.chords, pitch_of(degree, 1), steps), 0.25, -0.4)
        for step in (0, 6, 8, 14):
            _add(mix, at(bar, step), note("bass", pitch_of(chord, -1), 4), style.bass_gain, 0.0)
        for name, pattern in DRUMS[style.genre].items():
            for step in (i for i, mark in enumerate(pattern) if mark == "x"):
                _add(mix, at(bar, step), kit[name], style.drum_gain, 0.0)
    return mix, tempo


def record(mix: Audio, rng: np.random.Generator) -> Audio:
    """Put a song (2, n) into a room of its own and on a tape of its own, as recordings of one artist differ.

    RT60 0.15 to 0.9 s at a direct-to-reverberant ratio of 2 to 14 dB; hiss 18 to 40 dB below the music. This is what an
    encoder has to hear past, and what a plain spectral average cannot.
    """
    rt60, ratio = rng.uniform(0.15, 0.9), 10 ** (-rng.uniform(2, 14) / 20)
    time = np.arange(int(rt60 * RENDER_RATE)) / RENDER_RATE
    tail = rng.normal(size=(2, len(time))) * 10 ** (-3 * time / rt60)
    tail *= ratio / np.sqrt((tail**2).sum(axis=1, keepdims=True))
    length = mix.shape[1]
    size = 1 << (length + len(time)).bit_length()
    wet = np.fft.irfft(np.fft.rfft(mix, size) * np.fft.rfft(tail, size), size)[:, :length]
    hiss = rng.normal(size=mix.shape) * mix.std() * 10 ** (-rng.uniform(18, 40) / 20)
    return mix + wet + hiss


def master(mix: Audio, tilt: float, rate: int, channels: int) -> Audio:
    """Tilt the spectrum (dB an octave), resample, mix to 1 or 2 channels, fade the ends and set the level.

    mix: (2, n) at `RENDER_RATE`, n a whole number of tenths of a second. Returns (samples, channels) within
    +-1 at `rate` Hz, the RMS of their mono sum near `LEVEL_RMS`.
    """
    length = mix.shape[1] * rate // RENDER_RATE
    spectrum = np.fft.rfft(mix)[:, : length // 2 + 1]
    octaves = np.log2(np.fft.rfftfreq(length, 1 / rate).clip(60, 10_000) / TILT_PIVOT_HZ)
    audio = np.fft.irfft(spectrum * 10 ** (tilt * octaves / 20), length).T
    if channels == 1:
        audio = audio.mean(axis=1, keepdims=True)
    time = np.arange(length)[:, None] / rate
    audio *= np.minimum(1, np.minimum(time / 0.01, (length / rate - time) / 0.5))
    audio *= LEVEL_RMS / np.sqrt(np.mean(audio.mean(axis=1) ** 2))
    return np.tanh(audio)  # rounds the rare peak that would clip
