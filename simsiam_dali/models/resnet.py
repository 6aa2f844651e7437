"""torchvision's ResNets with one input channel, any width and no classifier."""

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from simsiam_dali.common.errors import UserError

Backbone = Literal["resnet18", "resnet34", "resnet50"]
Pooling = Literal["mean", "mean_max"]

WIDTH = 64
"""Channels of the first stage of torchvision's ResNets; each stage after it doubles them."""


class MeanMax(nn.Module):
    """Mean and maximum over the last map, one after the other: `(B, C, H, W)` to `(B, 2 C, 1, 1)`.

    The mean tells how much of a pattern there is, the maximum whether there is any: Niizumi et al., "BYOL for Audio",
    arXiv:2204.07402, section IV-B, has both for the same reason.
    """

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return torch.cat([x.mean(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)], dim=1)


def statistics(x: Tensor) -> Tensor:
    """Of a map `(B, C, F, T)`, `(B, 4 C)` float32: four statistics of each channel, each scaled to length 1.

    Mean; standard deviation over time of the mean over frequency; maximum; root mean square of the change from frame to
    frame. Scaled, or the maps with the largest values would decide alone which songs are near. Statistics over time are
    those of speaker embeddings (Snyder et al., "X-Vectors", ICASSP 2018).
    """
    # In float32, whatever autocast left, but without a copy of the map: the stem's is the largest of the encoder.
    mean, of_frames = (x.mean(dim=dims, dtype=torch.float32) for dims in ((2, 3), 2))
    # As a length, whose gradient is bounded where a channel is silent; that of the root of a variance is not.
    deviation = torch.linalg.vector_norm(of_frames - of_frames.mean(dim=2, keepdim=True), dim=2)
    change = torch.linalg.vector_norm(x[..., 1:] - x[..., :-1], dim=(2, 3), dtype=torch.float32)
    parts = (mean, deviation, x.amax(dim=(2, 3)).float(), change)
    return torch.cat([F.normalize(own, dim=1) for own in parts], dim=1)


class Resnet(torchvision.models.ResNet):
    """torchvision's ResNet with `width` channels in its first stage instead of 64."""

    def __init__(self, block: Any, layers: list[int], width: int) -> None:
        self.width = width
        self.map_channels = width * (1 + 7 * block.expansion)
        """Of the stem's map, and those of the first three stages."""
        super().__init__(block, layers, zero_init_residual=True)

    def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> nn.Sequential:
        if planes == WIDTH != self.width:  # the first stage: torchvision has just made a stem of 64 channels
            self.inplanes = self.width
            self.conv1 = nn.Conv2d(3, self.width, kernel_size=7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(self.width)
        return super()._make_layer(block, planes * self.width // WIDTH, *args, **options)

    def stage_statistics(self, view: Tensor) -> Tensor:
        """The `statistics` of log-mels `(B, 1, n_mels, T)`, and of the maps that they become but for the last stage's.

        `(B, 4 (n_mels + map_channels))`; the log-mel's channels are its mel bins. The last map is nearest to the loss,
        which has it forget what the augmentations change; earlier ones often serve other questions better: Bordes et
        al., "Guillotine Regularization", arXiv:2206.13378.
        """
        return self._before_last_stage(view)[1]

    def pooled_and_statistics(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled last map `(B, D)`, as `forward` returns it, and the `stage_statistics`, in one pass."""
        x, statistics_of_stages = self._before_last_stage(view)
        return self.fc(torch.flatten(self.avgpool(self.layer4(x)), 1)), statistics_of_stages

    def _before_last_stage(self, view: Tensor) -> tuple[Tensor, Tensor]:
        x = self.relu(self.bn1(self.conv1(view)))
        found = [statistics(view.transpose(1, 2)), statistics(x)]
        x = self.maxpool(x)
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
            found.append(statistics(x))
        return x, torch.cat(found, dim=1)


_STAGES: dict[Backbone, tuple[Any, list[int]]] = {
    "resnet18": (torchvision.models.resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": (torchvision.models.resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": (torchvision.models.resnet.Bottleneck, [3, 4, 6, 3]),
}


def create_backbone(
    name: Backbone, pretrained: bool | str | Path, width: int = WIDTH, pooling: Pooling = "mean"
) -> tuple[Resnet, int]:
    """A torchvision ResNet with a one-channel stem and no classifier, and the width of its output."""
    # Each residual block starts as the identity, as in the published code; pretrained weights replace this.
    resnet = Resnet(*_STAGES[name], width)
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
