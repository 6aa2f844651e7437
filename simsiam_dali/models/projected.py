"""A ResNet on log-mel views and a projector, on whose output the self-supervised losses compare the views."""

from torch import Tensor, nn

from simsiam_dali.config.schema import SimSiamConfig
from simsiam_dali.models.encoder import Encoder
from simsiam_dali.models.resnet import create_backbone


class Projected(Encoder):
    """ResNet backbone and projector.

    pretrained: False where the weights will come from a checkpoint. Raises `UserError` when the weights that
    `settings.pretrained_backbone` names cannot be had or do not fit.
    """

    def __init__(self, settings: SimSiamConfig, pretrained: bool = True) -> None:
        super().__init__()
        self.settings = settings
        self.backbone, self.backbone_dim = create_backbone(
            settings.backbone, pretrained and settings.pretrained_backbone, settings.backbone_width, settings.pooling
        )
        self.projector = create_projector(self.backbone_dim, settings.projection_dim, settings.projection_layers)
        self.output_dim = settings.projection_dim
        self.embedding_dim = self.backbone_dim if settings.embedding == "backbone" else settings.projection_dim

    def features(self, view: Tensor) -> Tensor:
        """One view `(B, n_mels, T)` to the backbone's pooled output `(B, D)`."""
        return self.backbone(view.unsqueeze(1))

    def embed(self, view: Tensor) -> Tensor:
        """One view `(B, n_mels, T)` to its embedding `(B, embedding_dim)`, not normalised."""
        features = self.features(view)
        return features if self.settings.embedding == "backbone" else self.projector(features)


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
