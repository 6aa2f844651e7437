"""What a training left behind, for the commands that use it. Nothing here needs DALI."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from simsiam_dali.common.errors import UserError, one_line
from simsiam_dali.config.load import load_config, replace_settings
from simsiam_dali.config.schema import Config, TrainConfig
from simsiam_dali.models.encoder import Encoder
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.packing.pack_song import PackSettings
from simsiam_dali.training import checkpoint


@dataclass(frozen=True)
class TrainedRun:
    """A run's checkpoint; `sha256` is its `identity`.

    `statistics`: the log-mel's `mean` and `std` over the training songs, dB. `packing`: how those songs were cut.
    `shards`: fingerprint of the set that they were in, "" where that is not known.
    """

    path: Path
    sha256: str
    config: Config
    statistics: dict[str, float]
    packing: PackSettings
    weights: dict[str, Tensor]
    mlflow_run: str | None
    shards: str = ""

    def encoder(self) -> Encoder:
        """The trained encoder, on the CPU, in evaluation mode. Raises UserError for weights of another encoder."""
        encoder = encoder_type(self.config).create(pretrained=False)
        try:
            encoder.load_state_dict(self.weights)
        except RuntimeError as e:
            raise UserError(f"{self.path} holds the weights of another encoder ({one_line(e)})") from e
        return encoder.eval()


def read_run(run: str, option: str = "--checkpoint", embedding: str | None = None) -> TrainedRun:
    """Read a checkpoint by its file, its run's folder or name, or "" for the newest run.

    option: what error messages call `run`. embedding: which output of a simsiam encoder; None = the training's. Raises
    UserError for what is missing or damaged, and for an output of an encoder of another type.
    """
    path = checkpoint.find(run, TrainConfig().runs_dir, option)
    saved = checkpoint.load(path, option)
    config = load_config(base=saved["config"])
    outputs = encoder_type(config).outputs
    if embedding and embedding not in outputs:
        has = "one output" if len(outputs) == 1 else f"the outputs {', '.join(outputs)}"
        raise UserError(f"--embedding: an encoder of type {config.encoder.encoder_type} has {has}")
    return TrainedRun(
        path=path,
        sha256=saved["identity"],
        config=replace_settings(config, encoder__simsiam__embedding=embedding),
        statistics=saved["log_mel"],
        packing=PackSettings(**saved["packing"]),
        weights=saved["learner"]["encoder"],
        mlflow_run=saved["mlflow_run"],
        shards=saved["shards"],
    )
