"""The peer: SimSiam put together from lightly's parts, trained on the same backbone, views and number of steps.

    python benchmarks/real_music/peer.py --config configs/real_music_cpu.yaml --shards A --embed B --out peer.parquet

From lightly come the projector (the paper's three layers), the predictor, the loss and the schedule; the loop is that
of lightly's SimSiam example, and the optimizer torch's SGD at the config's settings. The backbone, its first weights
and the views are ours, so that what differs is what the two projects make of them.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the package does, and before torch is imported

import halves
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead
from lightly.utils.scheduler import CosineWarmupScheduler
from torch import Tensor
from tqdm import trange

from simsiam_dali.common.distributed import World, choose_device
from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.config.load import load_config
from simsiam_dali.config.schema import Config
from simsiam_dali.data.graph import LogMel
from simsiam_dali.data.loader import measure_log_mel
from simsiam_dali.data.shards import ShardSet, open_shards
from simsiam_dali.embedding.features import encoder_features
from simsiam_dali.embedding.write import CleanViews, embedding_config, write_table
from simsiam_dali.models.encoder import Encoder
from simsiam_dali.models.resnet import create_backbone
from simsiam_dali.training.data import create_loader, log_mel_settings, with_threads


class Peer(Encoder):
    """Our backbone between lightly's heads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        own = config.encoder.simsiam
        self.backbone, dim = create_backbone(own.backbone, False, own.backbone_width, own.pooling)
        self.projector = SimSiamProjectionHead(dim, own.projection_dim, own.projection_dim)
        self.predictor = SimSiamPredictionHead(own.projection_dim, own.predictor_hidden_dim, own.projection_dim)
        self.embedding_dim, self.output_dim = dim, own.projection_dim

    def forward(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """One view `(B, n_mels, T)` to its projection without gradient, and its prediction."""
        z = self.projector(self.embed(view))
        return z.detach(), self.predictor(z)

    def embed(self, x: Tensor) -> Tensor:
        """One view `(B, n_mels, T)` to the backbone's output."""
        return self.backbone(x.unsqueeze(1))


def train(config: Config, shards: ShardSet, log_mel: LogMel, world: World) -> Peer:
    """As many steps as `simsiam_dali.train` takes with the same config."""
    torch.manual_seed(config.train.seed)
    own = config.encoder.simsiam
    loader = create_loader(config, shards, log_mel, world, "train", "views", shuffled=True)
    peer = Peer(config).to(world.device)
    peer = peer.to(memory_format=torch.channels_last)
    criterion = NegativeCosineSimilarity()
    base = (config.encoder.learning_rate or own.learning_rate) * config.encoder.batch_size / 256
    optimizer = torch.optim.SGD(peer.parameters(), lr=base, momentum=own.sgd_momentum, weight_decay=own.weight_decay)
    warmup, steps = round(own.warmup_epochs * len(loader)), config.encoder.epochs * len(loader)
    schedule = CosineWarmupScheduler(optimizer, warmup_epochs=warmup, max_epochs=steps)  # its epochs are our steps
    batches = loader.endless()
    for _ in (bar := trange(steps, unit="step", disable=None)):
        batch = next(batches)
        (z0, p0), (z1, p1) = map(peer, batch.inputs)
        loss = 0.5 * (criterion(z0, p1) + criterion(z1, p0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if bar.n % 10 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")
    return peer.eval()


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML settings")
    parser.add_argument("--shards", type=Path, required=True, metavar="DIR", help="songs to learn from")
    parser.add_argument("--embed", type=Path, required=True, metavar="DIR", help="songs to embed (shards as well)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the table of embeddings")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, order and draws (default: 0)")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="assignments", help="any setting")
    args = parser.parse_args()
    config = load_config(args.config, command_line={"train.seed": args.seed}, assignments=args.assignments)
    if config.encoder.simsiam.optimizer != "sgd":
        raise UserError("the peer takes encoder.simsiam.optimizer=sgd")
    device = choose_device(config.train.device)
    world = World(0, 1, device)
    shards, others = open_shards(args.shards), open_shards(args.embed)
    log_mel = log_mel_settings(config)
    if config.data.threads == "auto":
        config = with_threads(config, shards, log_mel, world)
    log_mel = measure_log_mel(
        create_loader(config, shards, log_mel, world, "train", "clean"), config.data.stats_segments
    )
    peer = train(config, shards, log_mel, world)

    clean = embedding_config(config, others.segment_seconds)
    provenance = halves.provenance(others, "lightly", "backbone")
    features = encoder_features("lightly", peer, clean, device)
    print(write_table(features, CleanViews(clean, others, log_mel, world), provenance, args.out))


if __name__ == "__main__":
    main()
