"""A ResNet on log-mel views and a projector, on whose output the self-supervised losses compare the views."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.schema import Config, SimSiamConfig
from simsiam_dali.data.graph import LogMel
from simsiam_dali.models.encoder import Encoder, EncoderType
from simsiam_dali.models.resnet import create_backbone


class ViewEncoder(Encoder):
    """ResNet backbone and projector, by the config's `encoder.simsiam`.

    pretrained: False where the weights will come from a checkpoint. Raises `UserError` when the weights that
    `settings.pretrained_backbone` names cannot be read or downloaded, or do not fit.
    """

    def __init__(self, config: Config, pretrained: bool = True) -> None:
        super().__init__()
        self.settings = settings = config.encoder.simsiam
        log_mel = LogMel(config.data.sample_rate, settings.n_fft, settings.hop_length, settings.n_mels)
        self.window = log_mel.frames(settings.embedding_seconds) if settings.embedding_seconds else None  # frames
        self.backbone, self.backbone_dim = create_backbone(
            settings.backbone, pretrained and settings.pretrained_backbone, settings.backbone_width, settings.pooling
        )
        self.projector = create_projector(self.backbone_dim, settings.projection_dim, settings.projection_layers)
        self.output_dim = settings.projection_dim
        self.stages_dim = 4 * (settings.n_mels + self.backbone.map_channels)
        widths = {"backbone": self.backbone_dim, "projection": settings.projection_dim, "stages": self.stages_dim}
        self.embedding_dim = widths.get(settings.embedding, 0)  # 0: an output of a subclass

    def features(self, view: Tensor) -> Tensor:
        """One view `(B, n_mels, T)` to the backbone's pooled output `(B, D)`."""
        return self.backbone(view.unsqueeze(1))

    def embed(self, view: Tensor) -> Tensor:
        """One view `(B, n_mels, T)` to its embedding `(B, embedding_dim)`, not normalised.

        With `settings.embedding_seconds` it is the mean of the embeddings of the windows that fit into the view, back
        to back, each scaled to length 1: an encoder that learned from short views is asked about short ones.
        """
        if self.window is None or view.shape[2] < self.window:
            return self._embed(view)
        batch, n_mels, frames = view.shape
        number = frames // self.window
        windows = view[:, :, : number * self.window].reshape(batch, n_mels, number, self.window).transpose(1, 2)
        embedded = F.normalize(self._embed(windows.reshape(-1, n_mels, self.window)), dim=1)
        return embedded.reshape(batch, number, -1).mean(dim=1)

    def _embed(self, view: Tensor) -> Tensor:
        if self.settings.embedding == "stages":
            return self.backbone.stage_statistics(view.unsqueeze(1))
        features = self.features(view)
        return features if self.settings.embedding == "backbone" else self.projector(features)


class ViewEncoderType(EncoderType):
    """What the encoder types on views have in common."""

    batches = "views"
    embeds = "clean"
    outputs: ClassVar[tuple[str, ...]] = ("backbone", "projection", "stages")
    loss_type: ClassVar[str]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.settings: SimSiamConfig = config.encoder.simsiam
        if self.settings.embedding not in self.outputs:
            raise UserError(
                f"encoder.simsiam.embedding: an encoder of type {config.encoder.encoder_type} has no output"
                f" {self.settings.embedding}, but {', '.join(self.outputs)}"
            )
        self.variant = self.settings.backbone
        pretrained = str(bool(self.settings.pretrained_backbone)).lower()
        self.tags = {"loss_type": self.loss_type, "backbone": self.settings.backbone, "pretrained": pretrained}

    @classmethod
    def reads(cls, key: str) -> bool:
        """See the base class. The embedding's width follows from `encoder.simsiam.embedding`."""
        return key != "encoder.embedding_dim" and super().reads(key)


def create_projector(in_dim: int, dim: int, layers: int) -> nn.Sequential:
    """Two or three layers of width `dim`; no ReLU after the last and no affine in its batch norm."""
    hidden: list[nn.Module] = []
    for width in [in_dim, dim][: layers - 1]:
        hidden += [nn.Linear(width, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(inplace=True)]
    return nn.Sequential(
        *hidden,
        nn.Linear(dim, dim, bias=False),  # output layer
        nn.BatchNorm1d(dim, affine=False),
    )
