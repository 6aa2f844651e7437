"""SimSiam on log-mel views: Chen & He, "Exploring Simple Siamese Representation Learning", arXiv:2011.10566.

The encoder f is a ResNet and a projector, h is the predictor (section 3 and figure 1 of the paper):

    z1, z2 = f(view1), f(view2)        p1, p2 = h(z1), h(z2)

The loss and its stop-gradient are in `losses.simsiam_loss`.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from simsiam_dali.config.schema import Config
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.models.encoder import LossFn, LossOutput
from simsiam_dali.models.losses import simsiam_loss
from simsiam_dali.models.view_encoder import ViewEncoder, ViewEncoderType


class SimSiam(ViewEncoder):
    """ResNet backbone, projector and predictor; arguments as of `ViewEncoder`."""

    def __init__(self, config: Config, pretrained: bool = True) -> None:
        super().__init__(config, pretrained)
        self.short_views = config.data.short_views
        self.predictor = create_predictor(self.settings.projection_dim, self.settings.predictor_hidden_dim)
        self.short_predictor = create_short_predictor(config)

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Views `(B, n_mels, T)`, normalised log-mel, to the p of each and the z of each, `(B, projection_dim)`.

        The views pass one after the other, never concatenated, so that each has batch-norm statistics of its
        own, as in the published code. In training mode B must be at least 2. Short views come after the others; they
        have a p, and no z: they are no target.
        """
        z = [self.projector(self.features(view)) for view in views]
        return *self.predict(z), *z[: len(z) - self.short_views]

    def predict(self, z: list[Tensor]) -> list[Tensor]:
        """The prediction from each projection `(B, projection_dim)`."""
        return predictions(z, len(z) - self.short_views, self.predictor, self.short_predictor)

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups; `fix_lr` marks the predictors, whose learning rate is then not decayed."""
        return param_groups(self, self.settings.fix_predictor_lr)


def predictions(z: list[Tensor], views: int, predictor: nn.Module, short_predictor: nn.Module | None) -> list[Tensor]:
    """The prediction from each projection `(B, D)`: the first `views` by the predictor, those of short views by theirs.

    A predictor that both lengths share makes the training unstable (arXiv:2602.05845, which has one for each kind of
    view).
    """
    of_short = map(short_predictor, z[views:]) if short_predictor else ()
    return [*map(predictor, z[:views]), *of_short]


def param_groups(encoder: nn.Module, fix_predictor_lr: bool) -> list[dict[str, Any]]:
    """An optimizer group of the encoder and one of its predictors, without the weights that no gradient reaches.

    The predictors have to keep adapting to the latest representations (section 4.2, table 1c).
    """
    of_predictors: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            of_predictors[name.startswith(("predictor.", "short_predictor."))].append(parameter)
    return [
        {"params": of_predictors[False], "fix_lr": False},
        {"params": of_predictors[True], "fix_lr": fix_predictor_lr},
    ]


def create_short_predictor(config: Config) -> nn.Sequential | None:
    """The predictor of the short views; None where there are none."""
    settings = config.encoder.simsiam
    if not config.data.short_views:
        return None
    return create_predictor(settings.projection_dim, settings.predictor_hidden_dim)


def create_predictor(dim: int, hidden_dim: int) -> nn.Sequential:
    """A bottleneck; no batch norm and no ReLU on its output (BN there is unstable: section 4.4)."""
    return nn.Sequential(
        nn.Linear(dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, dim),  # output layer
    )


class SimSiamType(ViewEncoderType):
    """`encoder_type: simsiam`: augmented views, no labels."""

    warn_of_collapse = True
    sections: ClassVar[tuple[str, ...]] = ("simsiam",)
    loss_type = "negative_cosine"

    def create(self, pretrained: bool = True) -> SimSiam:
        """See the base class."""
        return SimSiam(self.config, pretrained)

    def create_loss_fn(self, shards: ShardSet, device: torch.device) -> LossFn:  # noqa: ARG002  (no labels)
        """See the base class."""
        has_loss, short = torch.ones((), dtype=torch.bool, device=device), self.config.data.short_views

        def loss_fn(outputs: Any, segment: Tensor) -> LossOutput:  # noqa: ARG001
            views = (len(outputs) - short) // 2
            p, z = outputs[:-views], outputs[-views:]
            return LossOutput(simsiam_loss(p, z), has_loss, z[0])

        return loss_fn
