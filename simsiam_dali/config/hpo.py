"""Settings of the search for better settings (simsiam_dali.hpo)."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from simsiam_dali.config.section import Section


def _no_loss(metric: Any) -> Any:
    if str(metric).endswith("loss"):
        raise ValueError("a loss cannot judge trials: SimSiam's is lowest when the encoder has collapsed")
    return metric


class PrunerConfig(Section):
    """When a trial is given up: by the median rule, at an epoch where it is worse than half of those before it."""

    kind: Literal["median", "none"] = Field("median", description="median rule, or none: every trial runs to its end")
    startup_trials: int = Field(5, ge=1, description="complete trials before any is pruned")
    warmup_epochs: int = Field(3, ge=1, description="epochs of a trial before it can be pruned")


Space = dict[str, dict[str, Any]]
"""Dotted key -> {low, high, log, around} or {choices}; `simsiam_dali.search.space` reads and checks it."""


class SpaceConfig(Section):
    """What is searched, for each encoder type. A space in a config file takes the place of the default."""

    simsiam: Space = Field(
        {
            "encoder.simsiam.learning_rate": {"low": 0.01, "high": 1.0, "log": True},
            "encoder.simsiam.weight_decay": {"low": 1e-5, "high": 1e-3, "log": True},
            "encoder.simsiam.predictor_hidden_dim": {"low": 64, "high": 1024, "log": True},
            "encoder.simsiam.augmentation.time_stretch_prob": {"low": 0.0, "high": 1.0},
            "encoder.simsiam.augmentation.time_stretch_range": {"around": 1.0, "low": 0.05, "high": 0.5},
            "encoder.simsiam.augmentation.pitch_shift_prob": {"low": 0.0, "high": 1.0},
            "encoder.simsiam.augmentation.pitch_shift_range": {"around": 0.0, "low": 0.5, "high": 5.0},
            "encoder.simsiam.augmentation.noise_prob": {"low": 0.0, "high": 1.0},
            "encoder.simsiam.augmentation.frequency_mask_prob": {"low": 0.0, "high": 1.0},
            "encoder.simsiam.augmentation.time_mask_prob": {"low": 0.0, "high": 1.0},
        },
        description="setting: {low, high, log} is a range of values (log: even in the logarithm);"
        " {around: c, low, high} searches w of a range setting [c - w, c + w]; {choices: [...]} are values of any type",
    )
    simple: Space = Field(
        {
            "encoder.simple.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
            "encoder.simple.weight_decay": {"low": 1e-6, "high": 1e-2, "log": True},
            "encoder.simple.contrastive_temperature": {"low": 0.05, "high": 1.0, "log": True},
            "encoder.simple.base_channels": {"low": 8, "high": 64, "log": True},
            "encoder.simple.use_year": {"choices": [True, False]},
            "encoder.simple.year_threshold": {"low": 0, "high": 5},
        },
        description="the same",
    )
    joint: Space = Field(
        {
            "encoder.simsiam.learning_rate": {"low": 0.01, "high": 1.0, "log": True},
            "encoder.simsiam.weight_decay": {"low": 1e-5, "high": 1e-3, "log": True},
            "encoder.joint.tag_weight": {"low": 0.05, "high": 5.0, "log": True},
            "encoder.joint.rating_weight": {"low": 0.05, "high": 5.0, "log": True},
            "encoder.joint.contrastive_temperature": {"low": 0.05, "high": 1.0, "log": True},
        },
        description="the same",
    )
    contrastive: Space = Field(
        {
            "encoder.simsiam.learning_rate": {"low": 0.01, "high": 1.0, "log": True},
            "encoder.simsiam.weight_decay": {"low": 1e-5, "high": 1e-3, "log": True},
            "encoder.contrastive.temperature": {"low": 0.05, "high": 1.0, "log": True},
        },
        description="the same",
    )
    byol: Space = Field(
        {
            "encoder.simsiam.learning_rate": {"low": 0.01, "high": 1.0, "log": True},
            "encoder.simsiam.weight_decay": {"low": 1e-5, "high": 1e-3, "log": True},
            "encoder.byol.momentum": {"choices": [0.9, 0.97, 0.99, 0.997]},
        },
        description="the same",
    )


class HpoConfig(Section):
    """The search for better settings (simsiam_dali.hpo)."""

    trials: int = Field(20, ge=1, description="total trials of the study, in all processes, failed ones included")
    epochs: int = Field(10, ge=1, description="epochs of a trial; the learning rate's cosine covers them")
    metric: Annotated[
        Literal["knn/artist", "knn/genre", "knn/rating_mae", "knn/rating_correlation"], BeforeValidator(_no_loss)
    ] = Field("knn/artist", description="online score on validation songs by which trials are judged")
    mean_epochs: int = Field(
        3, ge=1, description="a trial's value is its mean score over this many last epochs; one epoch is noisy"
    )
    storage: str = Field("sqlite:///hpo.db", description="Optuna's database")
    study_name: str | None = Field(
        None, description="name of the Optuna study; null = encoder type and the shards' fingerprint"
    )
    pruner: PrunerConfig = PrunerConfig()
    space: SpaceConfig = SpaceConfig()
