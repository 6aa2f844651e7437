"""A trained encoder in Python, `simsiam_dali.load_encoder(path).embed_file("song.mp3")`; needs neither DALI nor shards.

A song is decoded and cut as packing does it, each segment passes the same front end in torch (torchaudio's mel, which
equals the data graph's), and the song's embedding is the mean of its segments' embeddings, each scaled to length 1.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torchaudio
from numpy.typing import NDArray
from torch import Tensor, nn

from simsiam_dali.common.errors import UserError, one_line
from simsiam_dali.config.load import load_config
from simsiam_dali.embedding.run import TrainedRun, read_run
from simsiam_dali.models.encoder import song_embeddings
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.packing.decode import decode
from simsiam_dali.packing.pack_song import PackSettings
from simsiam_dali.packing.segments import SILENCE, Pcm, cut_segments, to_int16
from simsiam_dali.packing.song_audio import BLOCK, BadSong, resample

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "encoder.safetensors"

SEGMENTS_AT_ONCE = 8


class LogMel(nn.Module):
    """Waveforms `(B, N)`, full scale = 1, to normalised log-mels `(B, n_mels, 1 + N // hop)`."""

    def __init__(self, run: TrainedRun) -> None:
        super().__init__()
        simsiam, rate = run.config.encoder.simsiam, run.config.data.sample_rate
        self.mel = torchaudio.transforms.MelSpectrogram(
            rate, n_fft=simsiam.n_fft, hop_length=simsiam.hop_length, n_mels=simsiam.n_mels
        )
        self.decibels = torchaudio.transforms.AmplitudeToDB("power")
        self.mean, self.std = run.statistics["mean"], run.statistics["std"]

    def forward(self, wave: Tensor) -> Tensor:
        """See the class."""
        return (self.decibels(self.mel(wave)) - self.mean) / self.std


class SongEncoder:
    """Embeds songs, on `device`, in fp32.

    segment_seconds: how songs are cut; None = as those of the training were. view_seconds: the middle of each segment
    that is embedded; None = the whole segment. Raises UserError for a view that is too long or too short.
    """

    def __init__(
        self,
        run: TrainedRun,
        segment_seconds: float | None = None,
        view_seconds: float | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        for name, seconds in (("segment_seconds", segment_seconds), ("view_seconds", view_seconds)):
            if seconds is not None and not 0 < seconds < math.inf:
                raise UserError(f"{name} is {seconds:g}, but must be more than 0")
        kind = encoder_type(run.config)
        self.run, self.view_seconds, self.device = run, view_seconds, torch.device(device)
        self.segment_seconds = segment_seconds or run.packing.segment_seconds
        self.rate = run.config.data.sample_rate  # of the front end, Hz
        self.packed_rate = run.packing.sample_rate or self.rate  # at which songs are cut
        self.samples = round((view_seconds or self.segment_seconds) * self.rate)  # of the encoder's input
        if view_seconds and view_seconds > self.segment_seconds:
            raise UserError(f"view_seconds is {view_seconds:g}, but segments are {self.segment_seconds:g} s long")
        if self.samples < kind.min_samples:
            least = kind.min_samples / self.rate
            raise UserError(f"the encoder needs at least {least:.2f} s of audio, not {self.samples / self.rate:g}")
        self.encoder = run.encoder().to(self.device)
        self.embedding_dim = self.encoder.embedding_dim
        self.input_name = "log_mel" if kind.embeds == "clean" else "waveform"
        self.front_end = (LogMel(run) if kind.embeds == "clean" else nn.Identity()).to(self.device)

    def embed_file(self, path: str | Path) -> NDArray[np.float32]:
        """The embedding `(embedding_dim,)`, not normalised, of a song in any format that can be packed.

        Raises UserError for a file that cannot be decoded or is silent.
        """
        try:
            _, vectors = decode(Path(path), self.packed_rate, lambda song: self._embed(song.blocks()))
        except BadSong as e:
            raise UserError(f"{path}: {e.reason}") from e
        return self._mean(vectors, str(path))

    def embed_wave(self, wave: NDArray[Any] | Tensor, rate: float) -> NDArray[np.float32]:
        """The embedding of audio `(samples,)` or `(channels, samples)`, float, full scale = 1, at `rate` Hz.

        Raises UserError for audio that is empty, silent or not finite, for integers and for `(samples, channels)`.
        """
        if not 0 < rate < math.inf or rate != int(rate):
            raise UserError(f"rate is {rate:g}, but must be a whole number of Hz")
        if isinstance(wave, Tensor):
            wave = wave.detach().cpu()
            wave = wave.float() if wave.is_floating_point() else wave  # NumPy has no bfloat16
        pcm = np.asarray(wave)
        if not np.issubdtype(pcm.dtype, np.floating):
            raise UserError(f"a wave must be of floats, full scale = 1, not {pcm.dtype}: divide int16 by 32768")
        pcm = pcm.astype(np.float32)
        if pcm.ndim == 2 and pcm.shape[0] > pcm.shape[1] > 0:
            raise UserError(f"a wave must be (channels, samples), not {pcm.shape}: transpose it")
        pcm = pcm.mean(axis=0) if pcm.ndim == 2 else pcm
        if pcm.ndim != 1 or not np.isfinite(pcm).all():
            raise UserError(f"a wave must be (samples,) or (channels, samples) of finite numbers, not {pcm.shape}")
        blocks = (pcm[at : at + BLOCK] for at in range(0, len(pcm), BLOCK))
        return self._mean(self._embed(resample(blocks, int(rate), self.packed_rate)), "the wave")

    @torch.inference_mode()
    def _embed(self, blocks: Iterable[Pcm]) -> list[Tensor]:
        """The vectors of the segments that are not silent, `(segments, embedding_dim)` in parts."""
        segments, vectors = self._segments(blocks), []
        while batch := list(itertools.islice(segments, SEGMENTS_AT_ONCE)):
            inputs = self.front_end(torch.stack(batch).to(self.device))
            vectors.append(self.encoder.embed(inputs).float().cpu())
        return vectors

    @torch.inference_mode()
    def _mean(self, vectors: list[Tensor], name: str) -> NDArray[np.float32]:
        if not vectors:
            raise UserError(f"{name}: is silent, or holds no audio")
        segments = torch.cat(vectors)
        _, mean = song_embeddings(segments, torch.zeros(len(segments), dtype=torch.int64))
        return mean[0].numpy()

    def _segments(self, blocks: Iterable[Pcm]) -> Iterator[Tensor]:
        """The encoder's inputs as waveforms `(samples,)`: cut, and rounded to 16 bits, as they would be packed."""
        packed_rate, rate = self.packed_rate, self.rate
        for segment in cut_segments(blocks, max(1, round(self.segment_seconds * packed_rate))):
            if np.abs(segment.pcm).max() < SILENCE:
                continue
            pcm = to_int16(segment.pcm).astype(np.float32) / np.float32(32768)
            wave = torch.from_numpy(np.concatenate([*resample([pcm], packed_rate, rate)]))
            start = max(0, round((len(wave) - self.samples) / 2)) if self.view_seconds else 0
            wave = wave[start : start + self.samples]
            yield nn.functional.pad(wave, (0, self.samples - len(wave)))


def load_encoder(
    path: str | Path,
    device: str | torch.device = "cpu",
    segment_seconds: float | None = None,
    view_seconds: float | None = None,
) -> SongEncoder:
    """The encoder in an exported folder, a checkpoint, a run's folder, or the run of that name in runs/ ("" = newest).

    segment_seconds, view_seconds: as of `SongEncoder`; None = as exported. Raises UserError for what is missing or
    damaged.
    """
    if (Path(path) / CONFIG).exists():
        run = read_export(Path(path))
        view_seconds = run.config.data.view_seconds if view_seconds is None else view_seconds
    else:
        run = read_run(str(path), "load_encoder")
    return SongEncoder(run, segment_seconds, view_seconds, device)


def read_export(folder: Path) -> TrainedRun:
    """The run in an exported folder, with the view that it was exported with (None = the whole segment).

    Raises UserError for a folder that this program does not read.
    """
    try:
        content = json.loads((folder / CONFIG).read_bytes())
        if content["format_version"] != FORMAT_VERSION:
            version = content["format_version"]
            raise UserError(f"{folder} has format version {version}, this program reads {FORMAT_VERSION}")
        data = {name: content[name] for name in ("sample_rate", "view_seconds")}
        log_mel = content["log_mel"] or {"mean": 0.0, "std": 1.0}
        return TrainedRun(
            path=folder,
            sha256=content["checkpoint_sha256"],
            config=load_config(base={"encoder": content["encoder"], "data": data}),
            statistics={name: log_mel[name] for name in ("mean", "std")},
            packing=PackSettings(content["packed_rate"], content["segment_seconds"]),
            weights=safetensors.torch.load_file(folder / WEIGHTS),
            mlflow_run=None,
        )
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as e:
        raise UserError(f"{folder} is damaged or no exported encoder ({one_line(e)}): export again") from e
