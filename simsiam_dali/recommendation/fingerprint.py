"""Whether two files hold the same recording: audio fingerprints of Haitsma and Kalker (ISMIR 2002), aligned in time.

A fingerprint has 32 bits for each frame: whether the difference between the energies of two neighbouring bands grows
or falls from one frame to the next. Codecs, bit rates and levels change few of them; of different music half differ.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.fft import rfft

from simsiam_dali.packing.decode import decode
from simsiam_dali.packing.encoding import Encoding, read_encoding
from simsiam_dali.packing.segments import Pcm
from simsiam_dali.packing.song_audio import BadSong, SongAudio

RATE = 5000  # Hz
FRAME = 2048  # samples, 0.41 s; section 4.2 of the paper has 0.37 s
HOP = 128  # samples, 26 ms: half a hop out of step, two frames still share 97% of their samples
EDGES = np.geomspace(300, 2000, 34)  # Hz, of 33 bands
SILENT = 1e-6
"""A frame with less than this share of the loudest frame's energy is silent: there the codecs' noise is compared."""

MAX_LAG = 6.0
"""Seconds by which one file may start later than the other."""
MIN_OVERLAP = 0.8
"""Share of the longer file's frames with sound that the other one must have too: a shortened version is another one."""
BLOCK = 3.0
"""Seconds of audio that are decided upon together, as in the paper."""
MAX_BIT_ERRORS = 0.35
"""Share of different bits below which two blocks are the same audio (section 3.3 of the paper)."""
MIN_BLOCKS = 0.9
"""Share of the blocks that must be the same: less in different songs of one composer, which share passages."""
MAX_MEAN_BIT_ERRORS = 0.2
"""Share of different bits of the whole: in benchmarks/duplicates.py at most 0.12 in copies, and 0.25 and more in
different songs, of which the closest share most of their music."""

_BLOCK_FRAMES = round(BLOCK * RATE / HOP)
_SEARCH_STEP = 8  # every so many frames are compared in the search for the lag: neighbouring frames overlap
_BIT_COUNT = np.array([number.bit_count() for number in range(1 << 16)], np.uint8)


@dataclass(frozen=True)
class Fingerprint:
    """bits: uint16 `(frames, 2)`, 32 bits a frame; loud: bool `(frames,)`, whether the frame is not silent."""

    bits: np.ndarray
    loud: np.ndarray


@dataclass(frozen=True)
class Match:
    """How two files compare where they fit best.

    bit_errors: share of different bits; same: share of the blocks below `MAX_BIT_ERRORS`; overlap: share of the longer
    file; lag: seconds by which the second file starts later in the recording. Silent frames do not count.
    """

    bit_errors: float
    same: float
    overlap: float
    lag: float

    @property
    def is_same_recording(self) -> bool:
        """Whether the whole and nearly all blocks agree, over most of the longer file."""
        agrees = self.bit_errors <= MAX_MEAN_BIT_ERRORS and self.same >= MIN_BLOCKS
        return agrees and self.overlap >= MIN_OVERLAP


@dataclass(frozen=True)
class ReadFile:
    """What two files are compared by; `seconds`: the decoded length."""

    fingerprint: Fingerprint
    encoding: Encoding
    seconds: float


def read_fingerprint(path: Path) -> ReadFile | str:
    """A file's fingerprint and encoding, or why it cannot be decoded."""
    try:
        audio, pcm = decode(path, RATE, _samples)
        return ReadFile(of_samples(pcm), read_encoding(path, audio.seconds), audio.seconds)
    except BadSong as e:
        return e.reason
    except OSError as e:
        return f"cannot be read: {e.strerror}"


def _samples(audio: SongAudio) -> Pcm:
    return np.concatenate([np.empty(0, np.float32), *audio.blocks()])


def of_samples(pcm: Pcm) -> Fingerprint:
    """The fingerprint of mono audio at `RATE`, float32 `(samples,)`; of less than two frames it has no frames."""
    starts = range(0, max(len(pcm) - FRAME + 1, 0), HOP)
    bins = np.round(EDGES * FRAME / RATE).astype(int)
    window = np.hanning(FRAME + 1)[:-1].astype(np.float32)
    energy = np.empty((len(starts), len(EDGES) - 1), np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(pcm, FRAME)[::HOP] if len(starts) else np.empty((0, FRAME))
    for at in range(0, len(starts), 1024):  # bounds the memory
        power = np.abs(rfft(frames[at : at + 1024] * window, axis=1)[:, : bins[-1]]) ** 2
        energy[at : at + 1024] = np.add.reduceat(power, bins[:-1], axis=1)
    bits = np.diff(np.diff(energy, axis=1), axis=0) > 0  # (frames - 1, 32)
    total = energy.sum(axis=1)[1:]
    packed = np.ascontiguousarray(np.packbits(bits, axis=1)).view(np.uint16)
    return Fingerprint(packed.reshape(len(bits), 2), total > SILENT * total.max(initial=0))


def compare(a: Fingerprint, b: Fingerprint) -> Match:
    """Two fingerprints at the lag, of at most `MAX_LAG`, where the fewest bits differ."""
    most = round(MAX_LAG * RATE / HOP)
    found = min((_bit_errors(a, b, lag, _SEARCH_STEP)[0], lag) for lag in range(-most, most + 1))
    return match_at(a, b, found[1])


def match_at(a: Fingerprint, b: Fingerprint, lag: int) -> Match:
    """`b` starting `lag` frames later in the recording than `a`."""
    mean, errors, loud = _bit_errors(a, b, lag, 1)
    blocks = max(len(errors) // _BLOCK_FRAMES, 1)
    parts = zip(np.array_split(errors, blocks), np.array_split(loud, blocks), strict=True)
    scored = [wrong[own].mean() / 32 < MAX_BIT_ERRORS for wrong, own in parts if own.any()]
    longer = max(a.loud.sum(), b.loud.sum(), 1)
    return Match(mean, float(np.mean(scored)) if scored else 0.0, float(loud.sum() / longer), lag * HOP / RATE)


def _bit_errors(a: Fingerprint, b: Fingerprint, lag: int, step: int) -> tuple[float, np.ndarray, np.ndarray]:
    """The share of different bits in frames that are loud in both, the different bits of each frame, and which are."""
    first, second = slice(max(lag, 0), None, step), slice(max(-lag, 0), None, step)
    count = min(len(a.bits[first]), len(b.bits[second]))
    errors = _BIT_COUNT[a.bits[first][:count] ^ b.bits[second][:count]].sum(axis=1, dtype=np.int64)
    loud = a.loud[first][:count] & b.loud[second][:count]
    frames = int(loud.sum())
    return (float((errors * loud).sum()) / (32 * frames) if frames else 1.0), errors, loud
