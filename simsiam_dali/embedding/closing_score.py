"""The score that a training prints at its end: `nearest_song`'s sentence about its encoder, over its own songs."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from simsiam_dali.common.distributed import World
from simsiam_dali.data.loader import release_memory
from simsiam_dali.data.shards import ShardSet, open_shards, subset_of
from simsiam_dali.embedding.features import CHECKPOINT, Features, create_features
from simsiam_dali.embedding.run import read_run
from simsiam_dali.embedding.write import CleanViews, check_finite, embedding_config
from simsiam_dali.evaluation.knn import unit
from simsiam_dali.evaluation.nearest_song import BASELINES, labels_of, sentence
from simsiam_dali.evaluation.within_song import WithinSong
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training.data import log_mel_settings, with_statistics

MAX_SEGMENTS = 20_000
"""Segments that are embedded, so that the score of a large library takes a few minutes at most.

With their 3,000 songs or so, the 95% interval of a share reaches 2 points to each side.
"""


def closing_score(run_dir: Path, world: World, location: Path | str) -> str:
    """The sentence about the run in `run_dir`; empty where no songs share a label, and on all ranks but the first.

    location: of its shards, which may have moved since the checkpoint was written. All ranks must call it.
    """
    release_memory()  # of the training
    (run, *_) = world.gather(read_run(str(run_dir)) if world.main else None)
    shards = open_shards(location)
    if labels_of(shards.songs) is None:
        return ""
    config = embedding_config(run.config, shards.segment_seconds)
    log_mel = with_statistics(log_mel_settings(config), **run.statistics)
    features = [create_features(name, run, log_mel, world.device) for name in (CHECKPOINT, *BASELINES)]
    with sample_songs(shards, MAX_SEGMENTS, run.config.train.seed) as part:
        if part.rows is not None and not len(part.rows):  # every song is longer than the limit
            return ""
        songs, vectors = embed_songs(features, CleanViews(config, part, log_mel, world))
    if not world.main:
        return ""
    unit_vectors = {name: unit(means, within) for name, (means, within) in vectors.items()}
    drawn_from = len(shards.songs) if part is not shards else 0
    return sentence(shards.songs.iloc[songs], unit_vectors, encoder_type(config).learns_from_tags, drawn_from)


@contextmanager
def sample_songs(shards: ShardSet, most: int, seed: int) -> Iterator[ShardSet]:
    """The set itself, or a part with at most `most` segments: all songs of artists (or genres) drawn with `seed`.

    Songs drawn one by one would mostly have no partner in the sample. What does not fit is skipped. Only of an
    artist with more than half of the segments are songs drawn, so that strangers are left to tell apart from.
    """
    if len(shards.segments) <= most:
        yield shards
        return
    found = labels_of(shards.songs)
    first = np.array([own[0] if own else -1 for own in found[1]] if found else [-1] * len(shards.songs))
    size = np.bincount(shards.segments["song"], minlength=len(first))
    rng = np.random.default_rng(seed)
    drawn = []
    by_label = np.split(np.argsort(first, kind="stable"), np.cumsum(np.bincount(first + 1)))  # songs without one first
    for label in rng.permutation(first.max() + 1):
        own = by_label[label + 1]
        if size[own].sum() > most // 2:
            own = rng.permutation(own)
            own = own[fitting(size[own], most // 2)]
        drawn.append(own)
    kept = fitting([size[own].sum() for own in drawn], most)
    songs = np.isin(np.arange(len(first)), np.concatenate([drawn[i] for i in kept] or [[]]))
    with TemporaryDirectory(prefix="simsiam-dali-") as folder:
        yield subset_of(shards, np.flatnonzero(songs[shards.segments["song"]]), Path(folder))


def fitting(sizes: Iterable[int], most: int) -> list[int]:
    """Indices of sizes, taken in order, whose sum is at most `most`; one that does not fit any more is skipped."""
    kept = []
    for index, size in enumerate(sizes):
        if size <= most:
            kept.append(index)
            most -= size
    return kept


def embed_songs(
    features: Sequence[Features], views: CleanViews
) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, WithinSong | None]]]:
    """Rows `(S,)` of the song table that have a segment; by the name of each of `features`, `(S, D)` and `within`.

    Nothing on all ranks but the first.
    """
    made: dict[str, tuple[np.ndarray, WithinSong | None]] = {}
    songs, segment_song = torch.empty(0), torch.tensor(views.shards.segments["song"].to_numpy())
    for mode in dict.fromkeys(f.mode for f in features):
        own = [f for f in features if f.mode == mode]
        batches: list[tuple[Tensor, list[Tensor]]] = []  # segments, and the vectors of each of `own`
        for _, loader in views.loaders(mode):
            for batch in loader:
                if len(batch.segment):
                    batches.append((batch.segment.cpu(), [f.compute(batch.inputs[0]).cpu() for f in own]))
        batches = [batch for rank in views.world.gather(batches) for batch in rank]
        if not views.world.main:
            continue
        song = segment_song[torch.cat([segment for segment, _ in batches])]
        for i, f in enumerate(own):
            songs, means, within = f.of_songs(check_finite(torch.cat([vectors[i] for _, vectors in batches])), song)
            made[f.name] = means.numpy(), within
    return songs.numpy(), {f.name: made[f.name] for f in features if f.name in made}
