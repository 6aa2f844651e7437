"""The `config.json` of an exported encoder: how a song becomes the encoder's input, without DALI."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config
from simsiam_dali.config.schema import Config
from simsiam_dali.embedding.run import TrainedRun
from simsiam_dali.models.encoder import Encoder
from simsiam_dali.models.registry import encoder_type

FORMAT_VERSION = 1
CONFIG = "config.json"

FLOOR_DB = -100.0
"""The log-mel's least value: `AmplitudeToDB(amin=1e-10)`."""


@dataclass(frozen=True)
class ExportConfig:
    """How a song becomes the encoder's input. Of `config`, only `encoder` and `data.sample_rate` are used.

    statistics: `mean` and `std` of the log-mel, dB. segment_seconds: how songs are cut. packed_rate: the sample rate at
    which they are cut, Hz, before resampling to the front end's. view_seconds: the length of the middle of a segment
    that is embedded; None = the whole segment.
    """

    config: Config
    statistics: dict[str, float]
    segment_seconds: float
    packed_rate: int
    view_seconds: float | None
    checkpoint_sha256: str

    @property
    def rate(self) -> int:
        """Sample rate of the front end, Hz."""
        return self.config.data.sample_rate

    @property
    def samples(self) -> int:
        """Length of the encoder's input, at the front end's rate."""
        return round((self.view_seconds or self.segment_seconds) * self.rate)

    @property
    def input_name(self) -> str:
        """The encoder's input: `log_mel` or `waveform`."""
        return "log_mel" if encoder_type(self.config).embeds == "clean" else "waveform"

    def encoder(self) -> Encoder:
        """The encoder, without its weights, in evaluation mode."""
        return encoder_type(self.config).create(pretrained=False).eval()

    def check(self) -> None:
        """Raise UserError for views that are too long, or too short for the encoder."""
        kind = encoder_type(self.config)
        if self.view_seconds and self.view_seconds > self.segment_seconds:
            raise UserError(f"view_seconds is {self.view_seconds:g}, but segments are {self.segment_seconds:g} s long")
        if self.samples < kind.min_samples:
            least = kind.min_samples / self.rate
            raise UserError(f"the encoder needs at least {least:.2f} s of audio, not {self.samples / self.rate:g}")

    def to_json(self) -> dict[str, Any]:
        """The content of `config.json`; nothing in it is about the songs or this machine."""
        simsiam = self.config.encoder.simsiam
        encoder = self.config.encoder.model_dump(mode="json")
        encoder["simsiam"]["pretrained_backbone"] = False  # it may be a path, and the weights have replaced it
        log_mel = {
            "n_fft": simsiam.n_fft,
            "hop_length": simsiam.hop_length,
            "n_mels": simsiam.n_mels,
            "window": "hann, periodic",
            "mel_scale": "htk, filters not normalised, 0 Hz to Nyquist",
            "power": 2,
            "floor_db": FLOOR_DB,
            **self.statistics,
        }
        return {
            "format_version": FORMAT_VERSION,
            "encoder_type": self.config.encoder.encoder_type,
            "input": self.input_name,
            "sample_rate": self.rate,
            "log_mel": log_mel if self.input_name == "log_mel" else None,
            "segment_seconds": self.segment_seconds,
            "packed_rate": self.packed_rate,
            "view_seconds": self.view_seconds,
            "song": "mean of the segments' embeddings, each scaled to length 1",
            "encoder": encoder,
            "checkpoint_sha256": self.checkpoint_sha256,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        tree = {"encoder": content["encoder"], "data": {"sample_rate": content["sample_rate"]}}
        log_mel = content["log_mel"] or {"mean": 0.0, "std": 1.0}
        names = ("segment_seconds", "packed_rate", "view_seconds", "checkpoint_sha256")
        return cls(
            config=load_config(base=tree),
            statistics={name: log_mel[name] for name in ("mean", "std")},
            **{name: content[name] for name in names},
        )

    @classmethod
    def of_run(cls, run: TrainedRun) -> Self:
        """Songs are cut as those of the training were."""
        rate = run.packing.sample_rate or run.config.data.sample_rate
        return cls(run.config, run.statistics, run.packing.segment_seconds, rate, None, run.sha256)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read it from an exported folder. Raises UserError for one that this program does not read."""
        try:
            content = json.loads((folder / CONFIG).read_bytes())
            if content["format_version"] == FORMAT_VERSION:
                return cls.from_json(content)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{folder / CONFIG} is not the config of an exported encoder: export again") from e
        version = content["format_version"]
        raise UserError(f"{folder} has format version {version}, this program reads {FORMAT_VERSION}")
