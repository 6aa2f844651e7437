"""Scores on the validation songs during training: the loss, and kNN by artist, genre and rating.

kNN searches among training songs (`train.knn_segments` segments of them, rounded up to whole batches) for each
validation song; a song is the mean of its segments' clean views. Every validation uses the same views with the same
random draws.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.schema import Config
from simsiam_dali.data.format import Split
from simsiam_dali.data.loader import Batch, release_memory
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.evaluation.knn_scores import knn_labels, knn_rating, label_chance, rating_chance, scored_queries
from simsiam_dali.models.encoder import song_embeddings
from simsiam_dali.models.labels import first_label_ids
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training.data import Mode, TrainingData, seconds_of_views, view_seconds
from simsiam_dali.training.learner import Learner

COST = 0.1
"""Cost of validation as a share of training, at most, where `train.validate_every` is auto."""

TRAINING_PASSES = 3
"""Cost of a training step in forward passes: its own, and a backward pass of about two."""

KEPT_BYTES = 256 * 2**20
"""Host memory for the validation's views. What fits is computed once; what does not, each time."""


class Validation:
    """Scores the learner's encoder on the validation split, at `due` epochs.

    The views are kept in host memory, up to `KEPT_BYTES`: they are the same each time, and building their graphs again
    would take longer than scoring a small library.
    """

    def __init__(self, data: TrainingData, learner: Learner) -> None:
        self.data, self.learner = data, learner
        self.config, self.shards, self.world = data.config, data.shards, data.world
        self.kind = encoder_type(data.config)
        self.every = epochs_between(data.config, data.shards)
        self._kept: dict[tuple[Split, str], list[Batch]] = {}
        self._free = KEPT_BYTES
        self._song = torch.from_numpy(data.shards.segments["song"].to_numpy().copy())  # of each segment

    def due(self, epoch: int) -> bool:
        """Whether this epoch is scored: the untrained encoder, every `every`-th, and the last."""
        return epoch % self.every == 0 or epoch == self.config.encoder.epochs

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """`encoder/val_loss` and the kNN scores, NaN where no song has the label; empty without validation songs.

        Beside each kNN score are a guess's, `_chance`, and the number of validation songs that were scored, `_songs`.
        """
        if not self.shards.count("val"):
            return {}
        self.learner.share_statistics()
        self.learner.encoder.eval()
        score = {"encoder/val_loss": self._loss()} | self._neighbours()
        self.learner.encoder.train()
        return score

    def _loss(self) -> float:
        total, number = 0.0, 0
        for batch in self._batches("val", self.kind.batches, self.shards.count("val")):
            output = self.learner.validation_loss(batch)
            if output.has_loss:
                total += float(output.loss) * len(batch.segment)
                number += len(batch.segment)
        sums = self.world.gather((total, number))
        return sum(t for t, _ in sums) / (sum(n for _, n in sums) or math.nan)

    def _neighbours(self) -> dict[str, float]:
        songs, k = self.shards.songs, self.config.train.knn_k
        bank_songs, bank = self._songs("train", self.config.train.knn_segments)
        query_songs, queries = self._songs("val", self.shards.count("val"))
        score = {}
        for name, column in (("artist", "artists"), ("genre", "genres")):
            ids = first_label_ids(songs, column)
            bank_ids, query_ids = ids[bank_songs], ids[query_songs]
            score[f"knn/{name}"] = knn_labels(bank, bank_ids, queries, query_ids, k)
            score[f"knn/{name}_chance"] = label_chance(bank_ids, query_ids)
            score[f"knn/{name}_songs"] = float(scored_queries(bank_ids, query_ids).sum())
        ratings = torch.tensor(songs["rating"].to_numpy("float32"))
        bank_ratings, query_ratings = ratings[bank_songs], ratings[query_songs]
        error, correlation = knn_rating(bank, bank_ratings, queries, query_ratings, k)
        score["knn/rating_mae"], score["knn/rating_correlation"] = error, correlation
        score["knn/rating_mae_chance"] = rating_chance(bank_ratings, query_ratings)
        scored = 0.0 if math.isnan(error) else float((~query_ratings.isnan()).sum())
        score["knn/rating_mae_songs"] = scored
        return score

    def _songs(self, split: Split, segments: int) -> tuple[Tensor, Tensor]:
        """Songs `(S,)`, ascending, and embeddings `(S, D)` of the split's first segments, on every rank."""
        own: list[tuple[Tensor, Tensor]] = []
        for batch in self._batches(split, self.kind.embeds, segments):
            with self.learner.autocast():
                own.append((batch.segment.cpu(), self.learner.encoder.embed(batch.inputs[0]).float().cpu()))
        every = [batch for rank in self.world.gather(own) for batch in rank]  # of a rank none, if none of its decodes
        if not every:
            raise UserError(f"no {split} segment decodes: verify the shards (python -m simsiam_dali.pack --verify)")
        segment, embedding = (torch.cat(parts) for parts in zip(*every, strict=True))
        return song_embeddings(embedding, self._song[segment])

    def _batches(self, split: Split, mode: Mode, segments: int) -> Iterator[Batch]:
        """This rank's part of the split's first `segments`, on the learner's device; kept where they fit."""
        if (kept := self._kept.get((split, mode))) is not None:
            for batch in kept:
                yield batch.to(self.learner.device)
            return
        keep: list[Batch] = []
        size = 0
        for batch in self._computed(split, mode, segments):
            size += sum(x.nbytes for x in batch.inputs)
            if size <= self._free:
                keep.append(Batch(tuple(x.cpu().clone() for x in batch.inputs), batch.segment.clone()))
            else:  # all of it or nothing
                keep.clear()
            yield batch
        if size <= self._free:
            self._kept[split, mode] = keep
            self._free -= size
        release_memory()

    def _computed(self, split: Split, mode: Mode, segments: int) -> Iterable[Any]:
        torch.cuda.empty_cache()  # the graph needs memory beside the training's, and cannot ask torch for its cache
        loader = self.data.create_loader(split, mode)
        for batch in loader:
            if len(batch.segment):
                yield batch
            if loader.step * loader.batch_size * self.world.size >= segments:
                break


def epochs_between(config: Config, shards: ShardSet) -> int:
    """`train.validate_every`; for auto, the fewest epochs of which a validation takes at most `COST` of the time.

    Counted in passes through the encoder, not by the clock, so that a run and its repetition score the same epochs.
    """
    if config.train.validate_every != "auto":
        return config.train.validate_every
    views = 1.0
    if encoder_type(config).batches == "views":
        views = seconds_of_views(config, shards) / view_seconds(config, shards)
    training, validation = shards.count("train"), shards.count("val")
    passes = validation * (views + 1) + min(training, config.train.knn_segments)
    return max(1, math.ceil(passes / (COST * TRAINING_PASSES * views * training)))
