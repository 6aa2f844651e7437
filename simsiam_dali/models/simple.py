"""The baseline encoder: a 1-D CNN on the raw waveform.

It follows M5 of Dai et al., "Very Deep Convolutional Neural Networks for Raw Waveforms" (arXiv:1610.00087): a wide
first convolution as a learned filter bank, then only kernels of 3 (small filters as in SampleCNN, arXiv:1703.01789),
each with batch norm, ReLU and a pool of 4, the channels doubling as the rate falls. Time is pooled by mean and maximum,
as in Pons et al. (arXiv:1711.02520), who found waveform encoders to need far more songs than those on spectrograms.

Each layer's output, for base_channels C, and one frame's hop and receptive field in samples (ms at 16 kHz):

    filter bank    C x 160, stride 8             hop 8      field 160 (10 ms), both as long as the paper's at 8 kHz
    pool           C                             hop 32     field 184
    block 1 to 4   2C, 4C, 8C, 16C x 3, pool 4   hop 8192   field 13,784 (861 ms)
    pool of time   32C, mean beside maximum
    head           embedding_dim, linear
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from simsiam_dali.config.schema import Config, SimpleConfig
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.models.encoder import Encoder, EncoderType, LossFn, LossOutput, rows_on
from simsiam_dali.models.labels import SongLabels
from simsiam_dali.models.losses import MetadataContrastiveLoss

FILTER, STRIDE, POOL = 160, 8, 4
MIN_SAMPLES = 13_784  # one frame's receptive field: a shorter waveform leaves nothing to pool


class SimpleAudioEncoder(Encoder):
    """1-D CNN on the raw waveform; `base_channels` filters in the bank, 16 times as many channels at the end.

    Convolutions start from He's normal distribution (arXiv:1502.01852), batch norms as the identity, the head from
    torch's default for linear layers.
    """

    def __init__(self, embedding_dim: int = 2048, base_channels: int = 32) -> None:
        super().__init__()
        self.embedding_dim = self.output_dim = embedding_dim
        channels = [base_channels * 2**i for i in range(5)]
        self.filter_bank = _block(1, channels[0], FILTER, STRIDE)
        self.blocks = nn.Sequential(*(_block(c, 2 * c, kernel=3, stride=1) for c in channels[:-1]))
        self.head = nn.Linear(2 * channels[-1], embedding_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, wave: Tensor) -> Tensor:
        """Waveforms `(B, N)`, float, full scale = 1, to embeddings `(B, embedding_dim)`, not normalised.

        N may be any number of samples from `MIN_SAMPLES` up; raises `ValueError` below.
        """
        if wave.ndim != 2 or wave.shape[1] < MIN_SAMPLES:
            raise ValueError(f"a batch of waveforms is (B, N) with N at least {MIN_SAMPLES}, not {tuple(wave.shape)}")
        frames = self.blocks(self.filter_bank(wave.unsqueeze(1)))
        return self.head(torch.cat([frames.mean(dim=2), frames.amax(dim=2)], dim=1))

    def embed(self, wave: Tensor) -> Tensor:
        """The same as `forward`: nothing is put on top of the embedding to train it."""
        return self(wave)


def _block(in_channels: int, channels: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(in_channels, channels, kernel, stride, bias=False),  # the batch norm has the bias
        nn.BatchNorm1d(channels),
        nn.ReLU(inplace=True),
        nn.MaxPool1d(POOL),
    )


class SimpleType(EncoderType):
    """`encoder_type: simple`: the waveform, and the songs' tags as labels."""

    batches = "raw"
    embeds = "raw"
    min_samples = MIN_SAMPLES
    is_contrastive = True
    learns_from_tags = True
    sections: ClassVar[tuple[str, ...]] = ("simple",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.settings: SimpleConfig = config.encoder.simple
        self.variant = f"cnn{self.settings.base_channels}"
        self.tags = {"loss_type": self.settings.loss_type}

    def create(self, pretrained: bool = True) -> SimpleAudioEncoder:  # noqa: ARG002  (no pretrained weights exist)
        """See the base class."""
        return SimpleAudioEncoder(self.config.encoder.embedding_dim, self.settings.base_channels)

    def create_loss_fn(self, shards: ShardSet, device: torch.device) -> LossFn:
        """See the base class."""
        tag_loss = MetadataContrastiveLoss(self.settings)
        labels = SongLabels.from_songs(shards.songs, shards.segments["song"].to_numpy()).to(device)

        def loss_fn(outputs: Any, segment: Tensor) -> LossOutput:
            loss, anchors = tag_loss(outputs, *labels.of(rows_on(device, segment)))
            return LossOutput(loss, anchors > 0, outputs)

        return loss_fn
