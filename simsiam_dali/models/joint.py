"""Joint training of one backbone: from the views, from tags and from ratings.

A step's loss is that of the views (SimSiam's or the contrastive one), plus `tag_weight` times the contrastive loss by
tags, plus `rating_weight` times the squared error of the rating that is read from the embedding. Songs without tags or
ratings still teach by their views. Each teacher has a head of its own, so that the backbone's output need not be what
either of them compares.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam_dali.config.schema import Config
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.models.encoder import LossFn, LossOutput, rows_on
from simsiam_dali.models.labels import SongLabels
from simsiam_dali.models.losses import MetadataContrastiveLoss, nt_xent, rating_loss, simsiam_loss
from simsiam_dali.models.simsiam import create_predictor, create_short_predictor, param_groups, predictions
from simsiam_dali.models.view_encoder import ViewEncoder, ViewEncoderType

TAG_HIDDEN, TAG_DIM = 256, 128


class Joint(ViewEncoder):
    """Backbone and projector, a head for the tags and one for the rating, and with SimSiam's loss its predictor."""

    def __init__(self, config: Config, pretrained: bool = True) -> None:
        super().__init__(config, pretrained)
        self.tags_read = config.encoder.joint.tags_read
        self.tag_head = nn.Sequential(
            nn.Linear(self.backbone_dim, TAG_HIDDEN, bias=False),
            nn.BatchNorm1d(TAG_HIDDEN),
            nn.ReLU(inplace=True),
            nn.Linear(TAG_HIDDEN, TAG_DIM),
        )
        if self.tags_read == "stages":
            # Standardised: a few of the statistics vary a hundred times as much as most.
            first = nn.Linear(self.stages_dim, TAG_HIDDEN, bias=False)
            self.tag_head = nn.Sequential(nn.BatchNorm1d(self.stages_dim), first, *self.tag_head[1:])
        if self.settings.embedding == "stages+tags":
            self.embedding_dim = self.stages_dim + TAG_HIDDEN
        self.rating_norm = nn.BatchNorm1d(self.backbone_dim, affine=False)
        self.rating_head = nn.Linear(self.backbone_dim, 1)
        self.register_load_state_dict_pre_hook(_supply_rating_norm)
        self.short_views = config.data.short_views
        self.predictor: nn.Module | None = None
        self.short_predictor: nn.Module | None = None
        if config.encoder.joint.views_loss == "simsiam":
            self.predictor = create_predictor(self.settings.projection_dim, self.settings.predictor_hidden_dim)
            self.short_predictor = create_short_predictor(config)

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Views `(B, n_mels, T)` to the z of each `(B, projection_dim)`, then the t, the r, and with a predictor the p.

        t `(B, TAG_DIM)` is what the tags compare, r `(B,)` the rating, p `(B, projection_dim)` SimSiam's prediction.
        """
        features, read = zip(*map(self._features_and_read, views), strict=True)
        z = [self.projector(h) for h in features]
        ratings = [self._rating(h) for h in features]
        p = predictions(z, len(z) - self.short_views, self.predictor, self.short_predictor) if self.predictor else ()
        return *z, *map(self.tag_head, read), *ratings, *p

    def _features_and_read(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """One view `(B, n_mels, T)` to the backbone's pooled output and to what the tag head reads."""
        if self.tags_read == "stages":
            return self.backbone.pooled_and_statistics(view.unsqueeze(1))
        features = self.features(view)
        return features, features

    def _embed(self, view: Tensor) -> Tensor:
        if self.settings.embedding != "stages+tags":
            return super()._embed(view)
        stages = self.backbone.stage_statistics(view.unsqueeze(1))
        # Its hidden layer, as a projector's input is taken and not its output.
        tags = self.tag_head[:-1](stages if self.tags_read == "stages" else self.features(view))
        return torch.cat([stages, F.normalize(tags.float(), dim=1)], dim=1)

    def _rating(self, h: Tensor) -> Tensor:
        """The backbone's output `(B, backbone_dim)` to ratings `(B,)` in 0..1, by a linear layer and a sigmoid.

        The output is batch-normalised and L2-normalised first: its norm is not bounded otherwise, the curvature of the
        squared error exceeds what the learning rate of the other losses allows, and training diverges at the first
        rated song. The sigmoid bounds the error, whatever the learning rate.
        """
        x = F.normalize(self.rating_norm(h), dim=1)
        return torch.sigmoid(self.rating_head(x).squeeze(1))

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups; the predictor's learning rate is not decayed, as in SimSiam."""
        return param_groups(self, self.settings.fix_predictor_lr)


def _supply_rating_norm(joint: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Let a checkpoint from before `rating_norm` load: embeddings do not depend on it."""
    for name, value in joint.get_submodule("rating_norm").state_dict().items():
        state.setdefault(f"{prefix}rating_norm.{name}", value)


class JointType(ViewEncoderType):
    """`encoder_type: joint`: augmented views, and whatever tags and ratings the songs have."""

    is_contrastive = True
    learns_from_tags = True
    outputs: ClassVar[tuple[str, ...]] = (*ViewEncoderType.outputs, "stages+tags")
    sections: ClassVar[tuple[str, ...]] = ("simsiam", "joint", "contrastive")
    loss_type = "views+metadata_contrastive+rating"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        # With SimSiam's loss only the views teach the projector, whatever the tags and ratings do for the backbone.
        self.warn_of_collapse = config.encoder.joint.views_loss == "simsiam"

    def create(self, pretrained: bool = True) -> Joint:
        """See the base class."""
        return Joint(self.config, pretrained)

    def create_loss_fn(self, shards: ShardSet, device: torch.device) -> LossFn:
        """See the base class."""
        has_loss = torch.ones((), dtype=torch.bool, device=device)
        own, long = self.config.encoder.joint, self.config.data.views
        views = long + self.config.data.short_views
        temperature = self.config.encoder.contrastive.temperature
        tag_loss = MetadataContrastiveLoss(own)
        song = shards.segments["song"].to_numpy()
        labels = SongLabels.from_songs(shards.songs, song).to(device)
        rating = torch.tensor(shards.songs["rating"].to_numpy("float32")[song], device=device)  # NaN is unrated

        def loss_fn(outputs: Any, segment: Tensor) -> LossOutput:
            z, t, r, *p = (outputs[start : start + views] for start in range(0, len(outputs), views))
            segment = rows_on(device, segment)
            by_views = simsiam_loss(p[0], z[:long]) if p else nt_xent(z, temperature)
            by_tags, _ = tag_loss(torch.cat(t), *(torch.cat([label] * views) for label in labels.of(segment)))
            by_rating = rating_loss(torch.cat(r), rating[segment].repeat(views))
            return LossOutput(by_views + own.tag_weight * by_tags + own.rating_weight * by_rating, has_loss, z[0])

        return loss_fn
