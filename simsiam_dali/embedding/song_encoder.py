"""A trained encoder in Python, `simsiam_dali.load_encoder(path).embed_file("song.mp3")`; needs neither DALI nor shards.

A song is decoded and cut as packing does it, each segment goes through the same front end in torch (torchaudio's mel,
which the data graph equals), and the song's embedding is the mean over its segments', each scaled to length 1.
"""

import dataclasses
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
from simsiam_dali.embedding import export_config as recipe
from simsiam_dali.embedding import run as trained
from simsiam_dali.embedding.export_config import Recipe
from simsiam_dali.models.encoder import Encoder, song_embeddings
from simsiam_dali.packing.decode import decode
from simsiam_dali.packing.segments import SILENCE, Pcm, cut_segments, to_int16
from simsiam_dali.packing.song_audio import BLOCK, BadSong, Resampler

WEIGHTS = "encoder.safetensors"

SEGMENTS_AT_ONCE = 8


class LogMel(nn.Module):
    """Waveforms `(B, N)`, full scale = 1, to normalised log-mels `(B, n_mels, 1 + N // hop)`."""

    def __init__(self, of: Recipe) -> None:
        super().__init__()
        simsiam = of.config.encoder.simsiam
        self.mel = torchaudio.transforms.MelSpectrogram(
            of.rate, n_fft=simsiam.n_fft, hop_length=simsiam.hop_length, n_mels=simsiam.n_mels
        )
        self.mean, self.std = of.statistics["mean"], of.statistics["std"]

    def forward(self, wave: Tensor) -> Tensor:
        """As the class says."""
        decibels = 10 * self.mel(wave).clamp_min(10 ** (recipe.FLOOR_DB / 10)).log10()
        return (decibels - self.mean) / self.std


def front_end(of: Recipe) -> nn.Module:
    """Waveforms `(B, N)` to what the encoder embeds."""
    return LogMel(of) if of.input_name == "log_mel" else nn.Identity()


class SongEncoder:
    """Embeds songs, on `device`, in fp32."""

    def __init__(self, of: Recipe, encoder: Encoder, device: torch.device) -> None:
        self.recipe, self.device = of, device
        self.encoder = encoder.to(device)
        self.front_end = front_end(of).to(device)

    @property
    def embedding_dim(self) -> int:
        """Width of an embedding."""
        return self.encoder.embedding_dim

    def embed_file(self, path: str | Path) -> NDArray[np.float32]:
        """A song, in any format that can be packed, to its embedding `(embedding_dim,)`, not normalised.

        Raises UserError for a file that cannot be decoded or is silent.
        """
        try:
            _, vectors = decode(Path(path), self.recipe.packed_rate, lambda song: self._embed(song.blocks()))
        except BadSong as e:
            raise UserError(f"{path}: {e.reason}") from e
        return self._mean(vectors, str(path))

    def embed_wave(self, wave: NDArray[Any] | Tensor, rate: int) -> NDArray[np.float32]:
        """Audio `(samples,)` or `(channels, samples)`, float, full scale = 1, at `rate` Hz, to its embedding.

        Raises UserError for audio that is empty, silent or not finite.
        """
        pcm = np.asarray(wave, dtype=np.float32)
        pcm = pcm.mean(axis=0) if pcm.ndim == 2 else pcm
        if pcm.ndim != 1 or not np.isfinite(pcm).all():
            raise UserError(f"a wave is (samples,) or (channels, samples) of finite numbers, not {pcm.shape}")
        blocks = (pcm[at : at + BLOCK] for at in range(0, len(pcm), BLOCK))
        return self._mean(self._embed(resampled(blocks, rate, self.recipe.packed_rate)), "the wave")

    @torch.inference_mode()
    def _embed(self, blocks: Iterable[Pcm]) -> list[Tensor]:
        """The vectors of the segments that are not silent, `(segments, embedding_dim)` in parts."""
        vectors, waiting = [], []
        for segment in self._segments(blocks):
            waiting.append(segment)
            if len(waiting) == SEGMENTS_AT_ONCE:
                vectors.append(self._vectors(waiting))
                waiting = []
        if waiting:
            vectors.append(self._vectors(waiting))
        return vectors

    @torch.inference_mode()
    def _mean(self, vectors: list[Tensor], name: str) -> NDArray[np.float32]:
        if not vectors:
            raise UserError(f"{name}: is silent, or holds no audio")
        every = torch.cat(vectors)
        _, mean = song_embeddings(every, torch.zeros(len(every), dtype=torch.int64))
        return mean[0].numpy()

    def _segments(self, blocks: Iterable[Pcm]) -> Iterator[Tensor]:
        """The encoder's inputs as waveforms `(samples,)`: cut, and rounded to 16 bits, as they would be packed."""
        packed_rate, rate = self.recipe.packed_rate, self.recipe.rate
        for segment in cut_segments(blocks, max(1, round(self.recipe.segment_seconds * packed_rate))):
            if np.abs(segment.pcm).max() < SILENCE:
                continue
            pcm = to_int16(segment.pcm).astype(np.float32) / np.float32(32768)
            wave = torch.from_numpy(np.concatenate([*resampled([pcm], packed_rate, rate)]))
            start = max(0, round((len(wave) - self.recipe.samples) / 2)) if self.recipe.view_seconds else 0
            wave = wave[start : start + self.recipe.samples]
            yield nn.functional.pad(wave, (0, self.recipe.samples - len(wave)))

    def _vectors(self, waves: list[Tensor]) -> Tensor:
        return self.encoder.embed(self.front_end(torch.stack(waves).to(self.device))).float().cpu()


def resampled(blocks: Iterable[Pcm], rate_in: int, rate_out: int) -> Iterator[Pcm]:
    """Mono blocks at another rate."""
    if rate_in == rate_out:
        yield from blocks
        return
    resampler = Resampler(rate_in, rate_out)
    for block in blocks:
        yield from resampler(block)
    yield from resampler(None)


def load_encoder(
    path: str | Path,
    device: str | torch.device = "cpu",
    segment_seconds: float | None = None,
    view_seconds: float | None = None,
) -> SongEncoder:
    """The encoder in an exported folder, a checkpoint, a run's folder, or the run of that name in runs/.

    segment_seconds: how songs are cut; None = as those of the training were. view_seconds: hear only the middle of each
    segment; None = as exported, or all of it.
    Raises UserError for what is missing or damaged.
    """
    folder = Path(path)
    if (folder / recipe.CONFIG).exists():
        found = recipe.read(folder)
        encoder = found.encoder()
        try:
            encoder.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
        except (OSError, RuntimeError, safetensors.SafetensorError) as e:
            reason = " ".join(str(e).split())[:120]
            raise UserError(f"{folder / WEIGHTS} is missing or damaged ({reason}): export again") from e
    else:
        run = trained.read(str(path), "load_encoder")
        found, encoder = recipe.of_run(run), run.encoder()
    found = dataclasses.replace(
        found,
        segment_seconds=segment_seconds or found.segment_seconds,
        view_seconds=view_seconds or found.view_seconds,
    )
    found.check()
    return SongEncoder(found, encoder, torch.device(device))
