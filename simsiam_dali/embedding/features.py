"""Segment features: the trained embedding or a baseline.

The baselines are computed from the same clean views by the same data graph. `untrained` is epoch 0 of the same run: the
same encoder, seed and pretrained weights. `log-mel` is the mean and the standard deviation over time of each mel bin,
in dB; `mfcc` the same of 20 mel-frequency cepstral coefficients (orthonormal DCT-II of the log-mel in dB, no deltas).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import dct
from torch import Tensor

from simsiam_dali.config.schema import Config
from simsiam_dali.data.graph import LogMel
from simsiam_dali.embedding.run import TrainedRun
from simsiam_dali.evaluation.within_song import WithinSong
from simsiam_dali.models.encoder import Encoder, song_means
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training.learner import autocast_dtype

CHECKPOINT = "checkpoint"
BASELINES = ("untrained", "mfcc", "log-mel")

N_MFCC = 20


@dataclass(frozen=True)
class Features:
    """`compute` maps a batch of the graph's `mode`, on the device, to `(B, D)` float32 on the device.

    name: "checkpoint" or a baseline. dtype: of the computation. l2_normalised: whether segments' vectors are scaled to
    length 1 before a song's mean is taken, so that each segment counts the same.
    """

    name: str
    mode: Literal["clean", "raw"]
    compute: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float32
    l2_normalised: bool = False

    def of_songs(self, vectors: Tensor, song: Tensor) -> tuple[Tensor, Tensor, WithinSong | None]:
        """Segments' vectors `(N, D)` and songs `(N,)` to the songs `(S,)`, ascending, and their vectors `(S, D)`.

        And how the segments lie around them.
        """
        segments = F.normalize(vectors, dim=1) if self.l2_normalised else vectors
        songs, means = song_means(segments, song)
        return songs, means, WithinSong.of_segments(segments.numpy(), song.numpy())


def create_features(name: str, run: TrainedRun, log_mel: LogMel, device: torch.device) -> Features:
    """The features called `name`. Raises UserError when an untrained encoder's pretrained weights are gone."""
    config = run.config
    # A global setting, which an encoder needs: MFCCs would differ between a process with an encoder and one without.
    torch.set_float32_matmul_precision("high")
    if name in ("log-mel", "mfcc"):
        basis = torch.from_numpy(dct(np.eye(log_mel.n_mels), norm="ortho", axis=0)[:N_MFCC]).float().to(device)

        def mean_and_std(view: Tensor) -> Tensor:
            decibels = view * log_mel.std + log_mel.mean
            x = basis @ decibels if name == "mfcc" else decibels
            return torch.cat([x.mean(dim=2), x.std(dim=2, correction=0)], dim=1)

        return Features(name, "clean", mean_and_std)
    if name == CHECKPOINT:
        encoder = run.encoder()
    else:
        torch.manual_seed(config.train.seed)
        encoder = encoder_type(config).create().eval()
    return encoder_features(name, encoder, config, device)


def encoder_features(name: str, encoder: Encoder, config: Config, device: torch.device) -> Features:
    """The output of `encoder.embed` on `device`, in the training's precision and memory format."""
    torch.set_float32_matmul_precision("high")
    # cuDNN's autotuner may choose another algorithm in the next process, and a resumed table could differ in a bit.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    encoder = encoder.to(device).to(memory_format=layout)
    dtype = autocast_dtype(config.train.precision, device)

    def compute(data: Tensor) -> Tensor:
        with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return encoder.embed(data).float()

    return Features(name, encoder_type(config).embeds, compute, dtype, l2_normalised=True)
