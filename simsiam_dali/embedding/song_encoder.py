"""A trained encoder in Python, `simsiam_dali.load_encoder(path).embed_file("song.mp3")`; needs neither DALI nor shards.

A song is decoded and cut as packing does it, each segment passes the same front end in torch (torchaudio's mel, which
equals the data graph's), and the song's embedding is the mean of its segments' embeddings, each scaled to length 1.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torchaudio
from numpy.typing import NDArray
from torch import Tensor, nn

from simsiam_dali.common.errors import UserError
from simsiam_dali.embedding.export_config import CONFIG, FLOOR_DB, ExportConfig
from simsiam_dali.embedding.run import read_run
from simsiam_dali.models.encoder import Encoder, song_embeddings
from simsiam_dali.packing.decode import decode
from simsiam_dali.packing.segments import SILENCE, Pcm, cut_segments, to_int16
from simsiam_dali.packing.song_audio import BLOCK, BadSong, resample

WEIGHTS = "encoder.safetensors"

SEGMENTS_AT_ONCE = 8


class LogMel(nn.Module):
    """Waveforms `(B, N)`, full scale = 1, to normalised log-mels `(B, n_mels, 1 + N // hop)`."""

    def __init__(self, config: ExportConfig) -> None:
        super().__init__()
        simsiam = config.config.encoder.simsiam
        self.mel = torchaudio.transforms.MelSpectrogram(
            config.rate, n_fft=simsiam.n_fft, hop_length=simsiam.hop_length, n_mels=simsiam.n_mels
        )
        self.mean, self.std = config.statistics["mean"], config.statistics["std"]

    def forward(self, wave: Tensor) -> Tensor:
        """See the class."""
        decibels = 10 * self.mel(wave).clamp_min(10 ** (FLOOR_DB / 10)).log10()
        return (decibels - self.mean) / self.std


def front_end(config: ExportConfig) -> nn.Module:
    """From waveforms `(B, N)` to the encoder's input."""
    return LogMel(config) if config.input_name == "log_mel" else nn.Identity()


class SongEncoder:
    """Embeds songs, on `device`, in fp32."""

    def __init__(self, config: ExportConfig, encoder: Encoder, device: torch.device) -> None:
        self.config, self.device = config, device
        self.encoder = encoder.to(device)
        self.front_end = front_end(config).to(device)

    @property
    def embedding_dim(self) -> int:
        """Width of an embedding."""
        return self.encoder.embedding_dim

    def embed_file(self, path: str | Path) -> NDArray[np.float32]:
        """The embedding `(embedding_dim,)`, not normalised, of a song in any format that can be packed.

        Raises UserError for a file that cannot be decoded or is silent.
        """
        try:
            _, vectors = decode(Path(path), self.config.packed_rate, lambda song: self._embed(song.blocks()))
        except BadSong as e:
            raise UserError(f"{path}: {e.reason}") from e
        return self._mean(vectors, str(path))

    def embed_wave(self, wave: NDArray[Any] | Tensor, rate: int) -> NDArray[np.float32]:
        """The embedding of audio `(samples,)` or `(channels, samples)`, float, full scale = 1, at `rate` Hz.

        Raises UserError for audio that is empty, silent or not finite.
        """
        pcm = np.asarray(wave, dtype=np.float32)
        pcm = pcm.mean(axis=0) if pcm.ndim == 2 else pcm
        if pcm.ndim != 1 or not np.isfinite(pcm).all():
            raise UserError(f"a wave must be (samples,) or (channels, samples) of finite numbers, not {pcm.shape}")
        blocks = (pcm[at : at + BLOCK] for at in range(0, len(pcm), BLOCK))
        return self._mean(self._embed(resample(blocks, rate, self.config.packed_rate)), "the wave")

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
        packed_rate, rate = self.config.packed_rate, self.config.rate
        for segment in cut_segments(blocks, max(1, round(self.config.segment_seconds * packed_rate))):
            if np.abs(segment.pcm).max() < SILENCE:
                continue
            pcm = to_int16(segment.pcm).astype(np.float32) / np.float32(32768)
            wave = torch.from_numpy(np.concatenate([*resample([pcm], packed_rate, rate)]))
            start = max(0, round((len(wave) - self.config.samples) / 2)) if self.config.view_seconds else 0
            wave = wave[start : start + self.config.samples]
            yield nn.functional.pad(wave, (0, self.config.samples - len(wave)))


def load_encoder(
    path: str | Path,
    device: str | torch.device = "cpu",
    segment_seconds: float | None = None,
    view_seconds: float | None = None,
) -> SongEncoder:
    """The encoder in an exported folder, a checkpoint, a run's folder, or the run of that name in runs/.

    segment_seconds: how songs are cut; None = as those of the training were. view_seconds: the middle of each segment
    that is embedded; None = as exported, or the whole segment. Raises UserError for what is missing or damaged.
    """
    folder = Path(path)
    if (folder / CONFIG).exists():
        config = ExportConfig.read(folder)
        encoder = config.encoder()
        try:
            encoder.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
        except (OSError, RuntimeError, safetensors.SafetensorError) as e:
            reason = " ".join(str(e).split())[:120]
            raise UserError(f"{folder / WEIGHTS} is missing or damaged ({reason}): export again") from e
    else:
        run = read_run(str(path), "load_encoder")
        config, encoder = ExportConfig.of_run(run), run.encoder()
    config = dataclasses.replace(
        config,
        segment_seconds=segment_seconds or config.segment_seconds,
        view_seconds=view_seconds or config.view_seconds,
    )
    config.check()
    return SongEncoder(config, encoder, torch.device(device))
