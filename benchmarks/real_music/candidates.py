"""What `equal_time.py` compares: changes of the recipe of configs/real_music_*.yaml, and outputs of its encoders."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import halves
from equal_time_scores import (
    BASE,
    CONTRASTIVE,
    CONTRASTIVE_FOLDERS,
    CONTRASTIVE_FOLDERS_STAGES,
    CONTRASTIVE_STAGES,
    FOLDERS,
    FOLDERS_LAST,
    FOLDERS_LAST_STAGES,
    FOLDERS_STAGES,
    FOLDERS_TAGS,
    PEER,
    RESNET50,
    RESNET50_STAGES,
    RESNET50_UNTRAINED,
    STAGES,
    TAGS_ALONE,
)


@dataclass(frozen=True)
class Candidate:
    """kind: an encoder type, or lightly. settings: over the recipe's. segment_seconds: of the shards it learns from.

    embedding: another output of the encoders of the row `trained_as`, which is not trained again. untrained: of these
    encoders as they were before the first step.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "simsiam"
    segment_seconds: int = halves.SEGMENT_SECONDS
    embedding: str = ""
    trained_as: str = ""
    untrained: bool = False


AUGMENTATION = "encoder.simsiam.augmentation"
NOISE = {f"{AUGMENTATION}.noise_prob": 0.3}
SHORT = {"data.view_seconds": 2.5, f"{AUGMENTATION}.time_mask_param": 7}
NO_SHIFT = {f"{AUGMENTATION}.time_shift_prob": 0}
SHORT_NOISY = NOISE | SHORT | NO_SHIFT
JOINT = "encoder.joint"
FOLDERS_AS_TAGS = {f"{JOINT}.use_folder": True}
WITH_FOLDERS = FOLDERS_AS_TAGS | {f"{JOINT}.views_loss": "simsiam"}
FROM_STAGES = WITH_FOLDERS | {f"{JOINT}.tags_read": "stages"}
BOTTLENECKS = {"encoder.simsiam.backbone": "resnet50"}
WINDOWS = {"encoder.simsiam.embedding": "projection", "encoder.simsiam.embedding_seconds": 2.5}
CANDIDATES = {
    BASE: Candidate(),
    "with noise": Candidate(NOISE),
    "views of 2.5 s": Candidate(SHORT),
    "no time shift": Candidate(NO_SHIFT),
    "no frequency mask": Candidate({f"{AUGMENTATION}.frequency_mask_prob": 0}),
    "weight decay 1e-4": Candidate({"encoder.simsiam.weight_decay": 1e-4}),
    "projector of 3 layers": Candidate({"encoder.simsiam.projection_layers": 3}),
    "2.5 s noisy views": Candidate(SHORT_NOISY),
    "four views": Candidate({"data.views": 4}),
    "two short views beside": Candidate({"data.short_views": 2}),
    "with mixup": Candidate({f"{AUGMENTATION}.mixup_prob": 1.0}),
    "with resized crop": Candidate({f"{AUGMENTATION}.crop_prob": 1.0}),
    "segments of 60 s": Candidate(segment_seconds=60),
    "momentum target (BYOL)": Candidate(kind="byol"),
    CONTRASTIVE: Candidate(kind="contrastive"),
    "contrastive, 60 s segments": Candidate(kind="contrastive", segment_seconds=60),
    "SimSiam, 2.5 s noisy views of 60 s": Candidate(SHORT_NOISY, segment_seconds=60),
    "SimSiam, 60 s segments, two short views beside": Candidate(
        NOISE | NO_SHIFT | {"data.short_views": 2}, segment_seconds=60
    ),
    "contrastive, 2.5 s noisy views of 60 s": Candidate(SHORT_NOISY, "contrastive", 60),
    "contrastive, 2.5 s noisy views of 60 s, windows": Candidate(SHORT_NOISY | WINDOWS, "contrastive", 60),
    "joint, SimSiam's loss": Candidate({"encoder.joint.views_loss": "simsiam"}, "joint"),
    "joint, SimSiam's loss, 60 s segments": Candidate({"encoder.joint.views_loss": "simsiam"}, "joint", 60),
    "joint, 2.5 s noisy views of 60 s": Candidate(SHORT_NOISY, "joint", 60),
    "joint, 2.5 s noisy views of 60 s, windows": Candidate(SHORT_NOISY | WINDOWS, "joint", 60),
    TAGS_ALONE: Candidate(kind="simple"),
    PEER: Candidate(kind="lightly"),
    STAGES: Candidate(embedding="stages", trained_as=BASE),
    CONTRASTIVE_STAGES: Candidate(kind="contrastive", embedding="stages", trained_as=CONTRASTIVE),
    RESNET50: Candidate(BOTTLENECKS),
    RESNET50_STAGES: Candidate(BOTTLENECKS, embedding="stages", trained_as=RESNET50),
    RESNET50_UNTRAINED: Candidate(BOTTLENECKS, embedding="stages", trained_as=RESNET50, untrained=True),
    FOLDERS: Candidate(FROM_STAGES, "joint"),
    FOLDERS_STAGES: Candidate(FROM_STAGES, "joint", embedding="stages", trained_as=FOLDERS),
    FOLDERS_TAGS: Candidate(FROM_STAGES, "joint", embedding="stages+tags", trained_as=FOLDERS),
    FOLDERS_LAST: Candidate(WITH_FOLDERS, "joint"),
    FOLDERS_LAST_STAGES: Candidate(WITH_FOLDERS, "joint", embedding="stages", trained_as=FOLDERS_LAST),
    CONTRASTIVE_FOLDERS: Candidate(FOLDERS_AS_TAGS, "joint"),
    CONTRASTIVE_FOLDERS_STAGES: Candidate(FOLDERS_AS_TAGS, "joint", embedding="stages", trained_as=CONTRASTIVE_FOLDERS),
}
"""What a row of the table is called, and what it changes. Two crops of a segment are two places of a song: the longer
the segment, the farther apart. Noisy views have noise and no circular shift. Short views beside are of 2.5 s, with a
predictor of their own; windows: songs are embedded by the projection, in windows of a view's length. Embedded by
stages: by statistics of the maps before the last stage; and tags: beside them, the hidden layer of the tags' head."""
