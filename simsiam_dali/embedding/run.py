"""What a training left behind, for the commands that use it. Nothing here needs DALI."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config, replace_settings
from simsiam_dali.config.schema import Config, TrainConfig
from simsiam_dali.data.format import sha256_of
from simsiam_dali.models.encoder import Encoder
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.packing.pack_song import PackSettings
from simsiam_dali.training import checkpoint


@dataclass(frozen=True)
class TrainedRun:
    """A run's checkpoint.

    `statistics`: the log-mel's `mean` and `std` over the training songs, dB. `packing`: how those songs were cut.
    """

    path: Path
    sha256: str
    config: Config
    statistics: dict[str, float]
    packing: PackSettings
    weights: dict[str, Tensor]
    mlflow_run: str | None

    def with_settings(self, **values: object) -> "TrainedRun":
        """A copy with other settings, by dotted key with __ for the dot; None leaves a setting unchanged."""
        return dataclasses.replace(self, config=replace_settings(self.config, **values))

    def with_embedding(self, embedding: str) -> "TrainedRun":
        """A copy with that output of a simsiam encoder. Raises UserError for an encoder of another type."""
        kind = self.config.encoder.encoder_type
        if kind != "simsiam":
            raise UserError(f"--embedding is for simsiam: an encoder of type {kind} has one output")
        return self.with_settings(encoder__simsiam__embedding=embedding)

    def encoder(self) -> Encoder:
        """The trained encoder, on the CPU, in evaluation mode."""
        encoder = encoder_type(self.config).create(pretrained=False)
        encoder.load_state_dict(self.weights)
        return encoder.eval()


def read_run(run: str, option: str = "--checkpoint") -> TrainedRun:
    """Read a checkpoint by its file, its run's folder or name, or "" for the newest run.

    option: what error messages call `run`. Raises UserError for what is missing or damaged.
    """
    path = checkpoint.find(run, TrainConfig().runs_dir, option)
    saved = checkpoint.load(path, option)
    return TrainedRun(
        path=path,
        sha256=sha256_of(path),
        config=load_config(base=saved["config"]),
        statistics=saved["log_mel"],
        packing=PackSettings(**saved["packing"]),
        weights=saved["learner"]["encoder"],
        mlflow_run=saved["mlflow_run"],
    )
