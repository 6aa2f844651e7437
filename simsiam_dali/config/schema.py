"""The typed config tree. Each setting is defined here once: type, default, range, unit.

`docs/config.md` is generated from the descriptions.
"""

import functools
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from simsiam_dali.config.hpo import HpoConfig
from simsiam_dali.config.section import Probability, Section

Embedding = Literal["backbone", "projection", "stages", "stages+tags"]

Address = Annotated[str, Field(pattern=r"^s3://[^/]+")]


class AugmentationConfig(Section):
    """The augmentations; each view of each sample draws its own. Probability 0 is off."""

    time_shift_prob: Probability = Field(1.0, description="circular shift in time")
    time_shift_range: tuple[float, float] = Field((0.0, 1.0), description="shift, as a fraction of the view")
    time_stretch_prob: Probability = Field(0.5, description="change of tempo without change of pitch")
    time_stretch_range: tuple[float, float] = Field((0.8, 1.2), description="rate; above 1 is faster")
    pitch_shift_prob: Probability = Field(0.5, description="change of pitch without change of tempo")
    pitch_shift_range: tuple[float, float] = Field((-2.0, 2.0), description="semitones")
    noise_prob: Probability = Field(0.3, description="white Gaussian noise")
    noise_snr_range: tuple[float, float] = Field((15.0, 30.0), description="SNR against the view's own RMS, dB")
    gain_prob: Probability = Field(0.8, description="volume change")
    gain_range: tuple[float, float] = Field((-6.0, 6.0), description="dB")
    reverb_prob: Probability = Field(0.2, description="late reverberation of a room (Polack's energy model)")
    reverb_rt60_range: tuple[float, float] = Field((0.2, 1.2), description="RT60, time to decay by 60 dB, s")
    reverb_drr_range: tuple[float, float] = Field((0.0, 12.0), description="direct-to-reverberant energy ratio, dB")
    mixup_prob: Probability = Field(0.0, description="another segment of the batch is mixed in, as log-mel mixup")
    mixup_range: tuple[float, float] = Field((0.0, 0.4), description="the other segment's share of the power (BYOL-A)")
    crop_prob: Probability = Field(0.0, description="random resized crop of the log-mel")
    crop_range: tuple[float, float] = Field((0.6, 1.0), description="share of the frames and of the mel bins it keeps")
    spec_augment: bool = Field(True, description="frequency and time masks (SpecAugment, arXiv:1904.08779)")
    frequency_mask_prob: Probability = Field(0.5, description="one band of mel bins set to the mean")
    frequency_mask_param: int = Field(27, ge=0, description="largest width F, mel bins")
    time_mask_prob: Probability = Field(0.5, description="one stretch of frames set to the mean")
    time_mask_param: int = Field(100, ge=0, description="largest width T, frames")

    @model_validator(mode="after")
    def _physical(self) -> typing.Self:
        if not 0.25 <= self.time_stretch_range[0] <= self.time_stretch_range[1] <= 2:
            raise ValueError("time_stretch_range: rates lie between 0.25 and 2")
        if max(map(abs, self.pitch_shift_range)) > 12:
            raise ValueError("pitch_shift_range: at most 12 semitones up or down")
        if not 0 <= self.time_shift_range[0] <= self.time_shift_range[1] <= 1:
            raise ValueError("time_shift_range: fractions lie between 0 and 1")
        if not 0 <= self.mixup_range[0] <= self.mixup_range[1] <= 1:
            raise ValueError("mixup_range: shares lie between 0 and 1")
        if not 0 < self.crop_range[0] <= self.crop_range[1] <= 1:
            raise ValueError("crop_range: parts are above 0, and at most 1")
        if self.reverb_rt60_range[0] <= 0:
            raise ValueError("reverb_rt60_range: RT60 is above 0 s")
        return self


class DataConfig(Section):
    """Where the segments come from and how they are read."""

    shards: Path | Address = Field(
        Path("shards"), description="folder written by simsiam_dali.pack, or a copy of it on S3: s3://bucket/prefix"
    )
    sample_rate: int = Field(16000, ge=4000, le=192000, description="rate at the mel front end, Hz")
    view_seconds: float | None = Field(None, gt=0, description="length of a view, s; null = the whole segment")
    views: int = Field(2, ge=2, le=8, description="number of augmented views of a segment")
    view_crops: Literal["same", "independent"] = Field(
        "same", description="views shorter than the segment: all cropped at one place, or each at its own"
    )
    short_views: int = Field(
        0,
        ge=0,
        le=8,
        description="number of extra short views, each cropped at its own place; short views predict the projections of"
        " the full-length views, and are never predicted",
    )
    short_view_seconds: float = Field(2.5, gt=0, description="length of a short view, s; read with short_views")
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="DALI's CPU threads per process; auto measures for some seconds, and sets prefetch too"
    )
    prefetch: int = Field(2, ge=1, description="batches DALI prepares ahead")
    shuffle_buffer: int = Field(1024, ge=1, description="segments the reader shuffles among (they stay encoded)")
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="share of the segments that may fail to decode before the run stops"
    )
    stats_segments: int = Field(256, ge=1, description="segments on which the log-mel's mean and std are measured")


class OptimizerConfig(Section):
    """How an encoder type is optimized; each type has its own defaults."""

    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="optimizer")
    learning_rate: float = Field(
        0.03, gt=0, description="learning rate; sgd: for 256 segments a step, scaled by batch / 256; adamw: not scaled"
    )
    sgd_momentum: float = Field(0.9, ge=0, lt=1, description="momentum (read by sgd only)")
    weight_decay: float = Field(5e-4, ge=0, description="L2 for sgd, decoupled for adamw")
    warmup_epochs: float = Field(0.0, ge=0, description="linear lr warm-up, epochs; then half a cosine to 0")


class SimSiamConfig(OptimizerConfig):
    """The SimSiam encoder, its spectrogram and its augmentations."""

    backbone: Literal["resnet18", "resnet34", "resnet50"] = Field("resnet50", description="torchvision ResNet")
    backbone_width: int = Field(64, ge=8, multiple_of=8, description="channels of the first stage; 64 = torchvision's")
    pooling: Literal["mean", "mean_max"] = Field(
        "mean", description="global pooling of the last map; mean_max concatenates mean and maximum, twice as wide"
    )
    pretrained_backbone: bool | Path = Field(
        False, description="true = torchvision's ImageNet weights, or a local state_dict file"
    )
    embedding: Embedding = Field(
        "stages",
        description="what a song's vector is; stages = statistics of the log-mel and of all feature maps but the last"
        " stage's; backbone = the pooled last map; stages+tags (joint only) = stages and the tags' hidden layer",
    )
    embedding_seconds: float | None = Field(
        None, gt=0, description="length of a view's windows, which are embedded and averaged, s; null = the whole view"
    )
    projection_dim: int = Field(2048, ge=1, description="width of the projector's layers")
    projection_layers: Literal[2, 3] = Field(2, description="layers of the projector (the paper has 3)")
    predictor_hidden_dim: int = Field(512, ge=1, description="the predictor's bottleneck")
    n_mels: int = Field(128, ge=8, description="mel bins")
    n_fft: int = Field(2048, ge=64, description="STFT window, samples")
    hop_length: int = Field(512, ge=1, description="STFT hop, samples")
    fix_predictor_lr: bool = Field(True, description="no lr decay for the predictor (SimSiam, section 4.2)")
    augmentation: AugmentationConfig = AugmentationConfig()


class TagPairsConfig(Section):
    """Which segments are a positive pair of the contrastive loss, by their songs' tags."""

    use_artist: bool = Field(True, description="segments by one artist are a positive pair")
    use_album: bool = Field(True, description="segments of one album are a positive pair")
    use_year: bool = Field(True, description="segments from years close together are a positive pair")
    year_threshold: int = Field(2, ge=0, description="largest difference between the years of a positive pair, years")
    use_folder: bool = Field(False, description="segments of songs in one folder are a positive pair, tagged or not")
    contrastive_temperature: float = Field(0.5, gt=0, description="temperature of the softmax over similarities")

    @model_validator(mode="after")
    def _something_to_go_by(self) -> typing.Self:
        if not (self.use_artist or self.use_album or self.use_year or self.use_folder):
            raise ValueError("use_artist, use_album, use_year, use_folder are all false: nothing makes a positive pair")
        return self


class SimpleConfig(TagPairsConfig, OptimizerConfig):
    """The baseline: a 1-D CNN on the waveform, which learns from tags."""

    optimizer: Literal["sgd", "adamw"] = Field("adamw", description="optimizer")
    learning_rate: float = Field(
        0.001, gt=0, description="learning rate; adamw: not scaled; sgd: for 256 segments a step, scaled by batch / 256"
    )
    weight_decay: float = Field(1e-4, ge=0, description="L2 for sgd, decoupled for adamw")
    base_channels: int = Field(32, ge=1, description="channels of the first layer; each block doubles them")
    loss_type: Literal["metadata_contrastive"] = Field("metadata_contrastive", description="what it learns from")


class ContrastiveConfig(Section):
    """A contrastive loss on SimSiam's views (SimCLR); everything else is read from encoder.simsiam."""

    temperature: float = Field(0.2, gt=0, description="temperature of the softmax over similarities")


class ByolConfig(Section):
    """SimSiam's views and networks with a momentum target (BYOL); everything else is read from encoder.simsiam."""

    momentum: float = Field(0.99, ge=0, lt=1, description="decay of the moving average that gives the target's weights")


class JointConfig(TagPairsConfig):
    """Tags and ratings as teachers beside the views; everything else is read from encoder.simsiam."""

    views_loss: Literal["simsiam", "contrastive"] = Field(
        "contrastive", description="loss on the views; contrastive uses encoder.contrastive.temperature"
    )
    tags_read: Literal["backbone", "stages"] = Field(
        "backbone", description="what the tags' head reads: the pooled last map, or the statistics of embedding: stages"
    )
    tag_weight: float = Field(0.5, ge=0, description="weight of the contrastive loss by tags; the views' loss has 1")
    rating_weight: float = Field(0.5, ge=0, description="weight of the squared error of the songs' ratings (0 to 1)")
    contrastive_temperature: float = Field(0.1, gt=0, description="temperature of the softmax over similarities")


class EncoderConfig(Section):
    """Which encoder, and the settings every encoder shares."""

    encoder_type: str = Field("simsiam", description="encoder and loss: simsiam, joint, contrastive, byol or simple")
    embedding_dim: int = Field(
        2048, ge=1, description="width of simple's embedding; the others' follows from encoder.simsiam.embedding"
    )
    epochs: int = Field(100, ge=1, description="passes over the training segments")
    final_training_epochs: Annotated[int, Field(ge=1)] | None = Field(
        None, description="epochs of the final training with hpo's best settings; null = epochs"
    )
    batch_size: int = Field(128, ge=2, description="segments per step and process")
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="learning rate; null = encoder.simple's for simple, encoder.simsiam's for the others"
    )
    simple: SimpleConfig = SimpleConfig()
    simsiam: SimSiamConfig = SimSiamConfig()
    joint: JointConfig = JointConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    byol: ByolConfig = ByolConfig()


class TrainConfig(Section):
    """Run settings: device, precision, memory, logging, checkpoints.

    `seed`, `micro_batch` and `sync_bn` change what is learned; precision, compile and memory format only its rounding.
    """

    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto takes the GPU when there is one")
    seed: int = Field(0, ge=0, lt=2**31, description="random seed of weights, order and augmentations")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="autocast; auto = bf16 where the GPU has it, else fp16 with a scaler; fp32 on a CPU;"
        " fp32 on a GPU may use TF32",
    )
    micro_batch: Literal["auto"] | Annotated[int, Field(ge=2)] = Field(
        "auto",
        description="segments that pass the encoder at once, a divisor of encoder.batch_size; gradients are added up,"
        " and batch norm is over each micro-batch; auto = the most that fit into memory",
    )
    activation_checkpointing: bool = Field(
        False, description="recompute the ResNet's activations in the backward pass: less memory, more time"
    )
    channels_last: bool = Field(True, description="NHWC memory format")
    compile: bool = Field(False, description="torch.compile the encoder: the first step can take minutes longer")
    sync_bn: bool = Field(False, description="batch-norm statistics over all GPUs (torchrun)")
    runs_dir: Path = Field(Path("runs"), description="folder in which each run makes its own folder")
    run_name: str | None = Field(None, description="name of the run's folder; null = encoder type, backbone and time")
    log_every: int = Field(10, ge=1, description="steps between reads of metrics from the device")
    checkpoint_every: int = Field(0, ge=0, description="steps between checkpoints in an epoch; 0 = only after it")
    validate_every: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="epochs between validations; auto = so that they take at most a tenth of the time"
    )
    profile: int = Field(0, ge=0, description="steps to trace into runs/<name>/trace.json.gz, after some warm-up")
    knn_k: int = Field(10, ge=1, description="neighbours of the online kNN score")
    knn_segments: int = Field(2000, ge=1, description="training segments of that score, rounded up to whole batches")

    closing_score: bool = Field(
        True,
        description="at the end, print for how many songs the nearest one is by the same artist, also with the"
        " untrained encoder and MFCCs; uses up to 20,000 segments",
    )

    def micro_batch_of(self, batch_size: int) -> int:
        """The micro-batch of steps of `batch_size` segments; all of them while it is auto."""
        return batch_size if self.micro_batch == "auto" else self.micro_batch


class MlflowConfig(Section):
    """Experiment tracking."""

    enabled: bool = Field(True, description="false trains without importing mlflow")
    tracking_uri: str = Field("sqlite:///mlflow.db", description="a database file or a server, http://host:5000")
    experiment_name: str = Field("music_recommendation", description="MLflow experiment")
    auto_tags: tuple[Literal["encoder_type", "loss_type", "experiment_variant", "backbone", "pretrained"], ...] = Field(
        ("encoder_type", "loss_type", "experiment_variant", "backbone", "pretrained"),
        description="tags set from the config on every run",
    )
    log_checkpoint: bool = Field(True, description="keep a copy of the final checkpoint with the run")


class Config(Section):
    """The whole tree."""

    data: DataConfig = DataConfig()
    encoder: EncoderConfig = EncoderConfig()
    train: TrainConfig = TrainConfig()
    mlflow: MlflowConfig = MlflowConfig()
    hpo: HpoConfig = HpoConfig()

    def to_yaml(self) -> str:
        """The resolved config as YAML that `load_config` reads back to an equal tree."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _section(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def setting_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting as (dotted key, pydantic FieldInfo), in the order of the tree."""
    for name, field in section.model_fields.items():
        if inner := _section(field.annotation):
            yield from setting_fields(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def flat(config: Config) -> dict[str, Any]:
    """Every setting under its dotted key."""
    return {key: functools.reduce(getattr, key.split("."), config) for key, _ in setting_fields()}
