"""SimSiam and two teachers on one backbone: the songs' tags, and the listener's ratings where there are any.

A step's loss is SimSiam's, plus `tag_weight` times the contrastive loss by tags, plus `rating_weight` times the squared
error of the rating that is read from the embedding. Songs without tags or ratings still teach by their views. Each
teacher has a head of its own, so that the backbone's output need not be what either of them compares.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from simsiam_dali.config.schema import Config, SimSiamConfig
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.models.encoder import LossFn, Scored
from simsiam_dali.models.labels import SongLabels
from simsiam_dali.models.losses import MetadataContrastiveLoss, rating_loss, simsiam_loss
from simsiam_dali.models.simsiam import SimSiam, SimSiamType

TAG_HIDDEN, TAG_DIM = 256, 128


class Joint(SimSiam):
    """SimSiam with a head for the tags and one for the rating, both on the backbone's output."""

    def __init__(self, settings: SimSiamConfig, pretrained: bool = True) -> None:
        super().__init__(settings, pretrained)
        self.tag_head = nn.Sequential(
            nn.Linear(self.backbone_dim, TAG_HIDDEN, bias=False),
            nn.BatchNorm1d(TAG_HIDDEN),
            nn.ReLU(inplace=True),
            nn.Linear(TAG_HIDDEN, TAG_DIM),
        )
        self.rating_head = nn.Linear(self.backbone_dim, 1)

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Views `(B, n_mels, T)` to the p and the z of each, `(B, projection_dim)`, as SimSiam's, and two more of each.

        t `(B, TAG_DIM)` is what the tags compare, r `(B,)` the rating; the p of all views come first, then all z, t, r.
        """
        features = [self.features(view) for view in views]
        z = [self.projector(h) for h in features]
        ratings = (self.rating_head(h).squeeze(1) for h in features)
        return *map(self.predictor, z), *z, *map(self.tag_head, features), *ratings

    def param_groups(self) -> list[dict[str, Any]]:
        """SimSiam's; the heads go with the encoder."""
        encoder, predictor = super().param_groups()
        encoder["params"] += [*self.tag_head.parameters(), *self.rating_head.parameters()]
        return [encoder, predictor]


class JointType(SimSiamType):
    """`encoder_type: joint`: augmented views, and whatever tags and ratings the songs have."""

    is_contrastive = True
    learns_from_tags = True
    sections: ClassVar[tuple[str, ...]] = ("simsiam", "joint")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.tags["loss_type"] = "negative_cosine+metadata_contrastive+rating"

    def create(self, pretrained: bool = True) -> Joint:
        """See the base class."""
        return Joint(self.settings, pretrained)

    def create_loss_fn(self, shards: ShardSet, device: torch.device) -> LossFn:
        """See the base class."""
        has_loss = torch.ones((), dtype=torch.bool, device=device)
        own = self.config.encoder.joint
        tag_loss = MetadataContrastiveLoss(own)
        song = shards.segments["song"].to_numpy()
        labels = SongLabels.from_songs(shards.songs, song).to(device)
        rating = torch.tensor(shards.songs["rating"].to_numpy("float32")[song], device=device)  # NaN is unrated

        def score(outputs: Any, segment: Tensor) -> Scored:
            views = len(outputs) // 4
            p, z, t, r = (outputs[start : start + views] for start in range(0, len(outputs), views))
            if device.type == "cuda" and segment.device.type == "cpu":
                segment = segment.pin_memory()  # the host need not wait for a copy from pinned memory
            segment = segment.to(device, non_blocking=True)
            by_tags, _ = tag_loss(torch.cat(t), *(torch.cat([label] * views) for label in labels.of(segment)))
            by_rating = rating_loss(torch.cat(r), rating[segment].repeat(views))
            loss = simsiam_loss(p, z) + own.tag_weight * by_tags + own.rating_weight * by_rating
            return Scored(loss, has_loss, z[0])

        return score
