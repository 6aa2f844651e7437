"""SimSiam on log-mel views: Chen & He, "Exploring Simple Siamese Representation Learning", arXiv:2011.10566.

The encoder f is a ResNet and a projector, h is the predictor (section 3 and figure 1 of the paper):

    z1, z2 = f(view1), f(view2)        p1, p2 = h(z1), h(z2)

The loss and its stop-gradient are in `losses.SimSiamLoss`.
"""

from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn

from simsiam_dali.common.errors import UserError
from simsiam_dali.models.encoder import Encoder

Backbone = Literal["resnet18", "resnet34", "resnet50"]
Embedding = Literal["backbone", "projection"]
Pooling = Literal["mean", "mean_max"]

WIDTH = 64
"""Channels of the first stage of torchvision's ResNets; each stage after it doubles them."""


class SimSiam(Encoder):
    """ResNet backbone, projector and predictor.

    `pretrained` is False (random weights), True (torchvision's ImageNet weights, downloaded once) or the path
    of a state dict of the same torchvision ResNet. `embedding` chooses what `embed` returns. `fix_predictor_lr`
    keeps the predictor's learning rate where it began.
    Raises `UserError` when the pretrained weights cannot be had or do not fit.
    """

    def __init__(
        self,
        backbone: Backbone = "resnet50",
        projection_dim: int = 2048,
        projection_layers: int = 2,
        predictor_hidden_dim: int = 512,
        pretrained: bool | str | Path = False,
        embedding: Embedding = "backbone",
        fix_predictor_lr: bool = True,
        width: int = WIDTH,
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__()
        self.embedding, self.fix_predictor_lr = embedding, fix_predictor_lr
        self.backbone, self.backbone_dim = create_backbone(backbone, pretrained, width, pooling)
        self.projector = create_projector(self.backbone_dim, projection_dim, projection_layers)
        self.projection_dim = projection_dim
        self.predictor = create_predictor(projection_dim, predictor_hidden_dim)

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Two views `(B, n_mels, T)`, normalised log-mel, to p1, p2, z1, z2, each `(B, projection_dim)`.

        The views pass one after the other, never concatenated, so that each has batch-norm statistics of its
        own, as in the published code. In training mode B must be at least 2.
        """
        z1 = self.projector(self.features(view1))
        z2 = self.projector(self.features(view2))
        return self.predictor(z1), self.predictor(z2), z1, z2

    def features(self, view: Tensor) -> Tensor:
        """One view `(B, n_mels, T)` to the backbone's pooled output `(B, backbone_dim)`."""
        return self.backbone(view.unsqueeze(1))

    def embed(self, view: Tensor) -> Tensor:
        """One view `(B, n_mels, T)` to its embedding `(B, embedding_dim)`, not normalised."""
        features = self.features(view)
        return features if self.embedding == "backbone" else self.projector(features)

    @property
    def embedding_dim(self) -> int:
        """Width of what `embed` returns."""
        return self.backbone_dim if self.embedding == "backbone" else self.projection_dim

    @property
    def output_dim(self) -> int:
        """Width of the projections."""
        return self.projection_dim

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups; `fix_lr` marks the predictor, whose learning rate is then not decayed.

        The predictor has to keep adapting to the latest representations (section 4.2, table 1c).
        """
        encoder = [*self.backbone.parameters(), *self.projector.parameters()]
        return [
            {"params": encoder, "fix_lr": False},
            {"params": list(self.predictor.parameters()), "fix_lr": self.fix_predictor_lr},
        ]


class MeanMax(nn.Module):
    """Mean and maximum over the last map, one after the other: `(B, C, H, W)` to `(B, 2 C, 1, 1)`.

    The mean tells how much of a pattern there is, the maximum whether there is any: Niizumi et al., "BYOL for Audio",
    arXiv:2204.07402, section IV-B, has both for the same reason.
    """

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return torch.cat([x.mean(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)], dim=1)


class _Resnet(torchvision.models.ResNet):
    """torchvision's ResNet with `width` channels in its first stage instead of 64."""

    def __init__(self, block: Any, layers: list[int], width: int) -> None:
        self.width = width
        super().__init__(block, layers, zero_init_residual=True)

    def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> nn.Sequential:
        if planes == WIDTH != self.width:  # the first stage: torchvision has just made a stem of 64 channels
            self.inplanes = self.width
            self.conv1 = nn.Conv2d(3, self.width, kernel_size=7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(self.width)
        return super()._make_layer(block, planes * self.width // WIDTH, *args, **options)


_STAGES: dict[Backbone, tuple[Any, list[int]]] = {
    "resnet18": (torchvision.models.resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": (torchvision.models.resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": (torchvision.models.resnet.Bottleneck, [3, 4, 6, 3]),
}


def create_backbone(
    name: Backbone, pretrained: bool | str | Path, width: int = WIDTH, pooling: Pooling = "mean"
) -> tuple[nn.Module, int]:
    """A torchvision ResNet with a one-channel stem and no classifier, and the width of its output."""
    # Each residual block starts as the identity, as in the published code; pretrained weights replace this.
    resnet = _Resnet(*_STAGES[name], width)
    dim = _STAGES[name][0].expansion * 8 * width
    resnet.fc = nn.Identity()
    if pretrained and width != WIDTH:
        raise UserError(f"pretrained_backbone: there are weights for a backbone_width of {WIDTH} only, not {width}")
    if pretrained is True:
        _load(resnet, _imagenet_weights(name), f"torchvision's {name}")
    elif pretrained:
        _load(resnet, _local_weights(Path(pretrained)), str(pretrained))

    # Convolving three equal channels is convolving one with the weights summed over the input channel.
    stem = nn.Conv2d(1, width, kernel_size=7, stride=2, padding=3, bias=False)
    with torch.no_grad():
        stem.weight.copy_(resnet.conv1.weight.sum(dim=1, keepdim=True))
    resnet.conv1 = stem
    if pooling == "mean_max":
        resnet.avgpool, dim = MeanMax(), 2 * dim
    return resnet, dim


def create_projector(in_dim: int, dim: int, layers: int) -> nn.Sequential:
    """Two or three layers of width `dim`; no ReLU after the last and no affine in its batch norm."""
    if layers not in (2, 3):
        raise ValueError(f"projection_layers is {layers}: 2 or 3")
    hidden: list[nn.Module] = []
    for width in [in_dim, dim][: layers - 1]:
        hidden += [nn.Linear(width, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(inplace=True)]
    return nn.Sequential(
        *hidden,
        nn.Linear(dim, dim, bias=False),  # output layer
        nn.BatchNorm1d(dim, affine=False),
    )


def create_predictor(dim: int, hidden_dim: int) -> nn.Sequential:
    """A bottleneck; no batch norm and no ReLU on its output (BN there is unstable: section 4.4)."""
    return nn.Sequential(
        nn.Linear(dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, dim),  # output layer
    )


def _imagenet_weights(name: Backbone) -> dict[str, Tensor]:
    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as e:  # no network, no space; a download cut short has a wrong hash
        reason = " ".join(str(e).split())
        raise UserError(
            f"pretrained_backbone: torchvision's {name} weights could not be downloaded ({reason}); "
            "give the path of a local state-dict file instead, or false"
        ) from e


def _local_weights(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise UserError(f"pretrained_backbone: no such file: {path}") from e
    except Exception as e:  # unpickling arbitrary bytes may raise anything (see the pickle module's page)
        raise UserError(f"pretrained_backbone: {path} is not a state dict saved by torch.save") from e
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(
            f"pretrained_backbone: {path} holds more than a state dict (names and tensors); "
            "give a file saved with torch.save(resnet.state_dict(), path)"
        )
    return state


def _load(resnet: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load every weight but the classifier's; `UserError` names the first that does not fit."""
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    own = resnet.state_dict()
    wrong = sorted(
        name
        for name in own.keys() | state.keys()
        # files older than torch 0.4.1 lack these counters, and load_state_dict supplies them
        if not name.endswith("num_batches_tracked")
        and (name not in own or name not in state or own[name].shape != state[name].shape)
    )
    if wrong:
        raise UserError(
            f"pretrained_backbone: {source} does not fit encoder.simsiam.backbone: {len(wrong)} weights "
            f"missing, unknown or of another shape, the first is {wrong[0]}; give weights of the same ResNet"
        )
    resnet.load_state_dict(state)
