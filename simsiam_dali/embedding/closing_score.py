"""What a finished training came to: `nearest_song`'s sentence for its encoder, over the songs of its shards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from simsiam_dali.common.distributed import World
from simsiam_dali.config.schema import Config
from simsiam_dali.data.pipeline import LogMel
from simsiam_dali.data.shards import SPLITS, ShardSet, open_shards
from simsiam_dali.data.subset import part_of
from simsiam_dali.embed import embedding_config, finite
from simsiam_dali.embedding import run as trained
from simsiam_dali.embedding.features import CHECKPOINT, Features, create_features
from simsiam_dali.evaluation.nearest_song import BASELINES, labels_of, sentence
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training.data import create_loader, log_mel_settings, with_statistics

MOST_SEGMENTS = 20_000
"""Segments that are embedded, so that a large library makes its training no more than some minutes longer.

They are songs enough: of 3,000, the 95% interval of a share reaches 2 points to each side.
"""


def of_run(run_dir: Path, world: World) -> str:
    """The sentence for the run in `run_dir`, over its own shards; the same on every rank, which all must call it."""
    (run, *_) = world.gather(trained.read(str(run_dir)) if world.main else None)
    shards = open_shards(run.config.data.shards)
    if labels_of(shards.songs) is None:
        return ""
    config = embedding_config(run.config, shards.segment_seconds)
    log_mel = with_statistics(log_mel_settings(config), **run.statistics)
    features = [create_features(name, run, log_mel, world.device) for name in (CHECKPOINT, *BASELINES)]
    with some_songs(shards, MOST_SEGMENTS, run.config.train.seed) as part:
        songs, vectors = embed_songs(features, config, part, log_mel, world)
    drawn_from = len(shards.songs) if part is not shards else 0
    return sentence(shards.songs.iloc[songs], vectors, encoder_type(config).learns_from_tags, drawn_from)


@contextmanager
def some_songs(shards: ShardSet, most: int, seed: int) -> Iterator[ShardSet]:
    """The set, or of one with more than `most` segments a part: all songs of artists (or genres) drawn by `seed`.

    Songs drawn one by one would mostly have lost their partners.
    """
    if len(shards.segments) <= most:
        yield shards
        return
    found = labels_of(shards.songs)
    first = np.array([own[0] if own else -1 for own in found[1]] if found else [-1] * len(shards.songs))
    size = np.bincount(shards.segments["song"], minlength=len(first))
    drawn = np.random.default_rng(seed).permutation(first.max() + 1)
    segments = np.bincount(first[first >= 0], size[first >= 0], minlength=len(drawn))
    kept = drawn[np.cumsum(segments[drawn]) <= most]
    songs = np.isin(first, kept) & (first >= 0)
    with TemporaryDirectory(prefix="simsiam-dali-") as folder:
        yield part_of(shards, np.flatnonzero(songs[shards.segments["song"]]), Path(folder))


def embed_songs(
    features: Sequence[Features], config: Config, shards: ShardSet, log_mel: LogMel, world: World
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rows `(S,)` of the song table that have a segment in `shards`, and each feature's vectors `(S, D)`, by name."""
    song_of = torch.from_numpy(shards.segments["song"].to_numpy().copy())
    made: dict[str, np.ndarray] = {}
    songs = torch.empty(0)
    for mode in dict.fromkeys(f.mode for f in features):
        own = [f for f in features if f.mode == mode]
        rows: list[Tensor] = []
        vectors: dict[str, list[Tensor]] = {f.name: [] for f in own}
        for split in SPLITS:
            if not shards.count(split):
                continue
            for batch in create_loader(config, shards, log_mel, world, split, mode):
                if len(batch.segment):
                    rows.append(batch.segment.cpu())
                    for f in own:
                        vectors[f.name].append(f.of(batch.data).cpu())
        ranks = world.gather((rows, vectors))
        segment = torch.cat([x for of_rank, _ in ranks for x in of_rank])
        for f in own:
            each = finite(torch.cat([x for _, of_rank in ranks for x in of_rank[f.name]]))
            songs, means = f.of_songs(each, song_of[segment])
            made[f.name] = means.numpy()
    return songs.numpy(), {f.name: made[f.name] for f in features}
