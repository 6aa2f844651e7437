"""What is measured on the validation songs each epoch: the loss, and how well neighbours in the embedding share labels.

kNN searches among training songs (at most `train.knn_segments` segments of them) for each validation song; a song is
the mean of its segments' clean views. The loaders are made anew each time, so that every epoch sees the same draws.
"""

import ctypes
import gc
import math
from typing import Literal

import torch
from torch import Tensor

from simsiam_dali import factory, monitor
from simsiam_dali.config import Config
from simsiam_dali.data.pipeline import LogMel
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.distributed import World
from simsiam_dali.encoders import encoder_type
from simsiam_dali.labels import label_ids
from simsiam_dali.learner import Learner

Score = dict[str, float]


@torch.no_grad()
def evaluate(
    config: Config,
    shards: ShardSet,
    log_mel: LogMel,
    world: World,
    learner: Learner,
) -> Score:
    """`encoder/val_loss` and the kNN scores, NaN where no song has the label; empty without validation songs."""
    if not shards.count("val"):
        return {}
    encoder = learner.encoder.eval()

    kind = encoder_type(config)
    total, number = 0.0, 0
    for batch in factory.create_loader(config, shards, log_mel, world, "val", kind.batches):
        if len(batch.segment):
            scored = learner.score(batch)
            if scored.counts:
                total += float(scored.loss) * len(batch.segment)
                number += len(batch.segment)
    sums = world.gather((total, number))
    score = {"encoder/val_loss": sum(t for t, _ in sums) / (sum(n for _, n in sums) or math.nan)}

    segment_song = torch.from_numpy(shards.segments["song"].to_numpy().copy())

    def songs(split: Literal["train", "val"], segments: int) -> tuple[Tensor, Tensor]:
        loader = factory.create_loader(config, shards, log_mel, world, split, kind.embeds)
        rows, embeddings = [], []
        for batch in loader:
            if len(batch.segment):
                with learner.autocast():
                    embeddings.append(encoder.embed(batch.data).float().cpu())
                rows.append(batch.segment.cpu())
            if loader.step * loader.batch_size * world.size >= segments:
                break
        parts = world.gather((torch.cat(rows), torch.cat(embeddings)))
        segment, embedding = (torch.cat(x) for x in zip(*parts, strict=True))
        return monitor.song_embeddings(embedding, segment_song[segment])

    bank_songs, bank = songs("train", config.train.knn_segments)
    query_songs, queries = songs("val", shards.count("val"))
    k = config.train.knn_k
    for name, column in (("artist", "artists"), ("genre", "genres")):
        ids = label_ids(shards.songs, column)
        bank_ids, query_ids = ids[bank_songs], ids[query_songs]
        score[f"knn/{name}"] = monitor.knn_labels(bank, bank_ids, queries, query_ids, k)
        score[f"knn/{name}_chance"] = max(monitor.label_chance(bank_ids, query_ids))
    ratings = torch.tensor(shards.songs["rating"].to_numpy("float32"))
    bank_ratings, query_ratings = ratings[bank_songs], ratings[query_songs]
    error, correlation = monitor.knn_rating(bank, bank_ratings, queries, query_ratings, k)
    score["knn/rating_mae"], score["knn/rating_correlation"] = error, correlation
    score["knn/rating_mae_chance"] = monitor.rating_chance(bank_ratings, query_ratings)
    # DALI's pipelines are reference cycles: left to Python's own rhythm, those of some 25 epochs wait in memory.
    gc.collect()
    # glibc keeps the holes they leave, more of them every epoch (docs/reliability.md).
    ctypes.CDLL(None).malloc_trim(0)
    return score
