"""What an encoder has learned from the shards it was trained on, compared with how it began."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from simsiam_dali.common.distributed import World
from simsiam_dali.config.load import load_config
from simsiam_dali.data.shards import open_shards
from simsiam_dali.evaluation.knn_scores import knn_labels
from simsiam_dali.models.labels import first_label_ids
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training import checkpoint
from simsiam_dali.training.data import create_loader, log_mel_settings, with_statistics

SPLITS: tuple[Literal["train"], Literal["val"]] = ("train", "val")


@torch.no_grad()
def embedded(run_dir: Path, folder: Path, trained: bool, split: Literal["train", "val"]) -> tuple[Tensor, Tensor]:
    """Embeddings and songs of a split's whole segments by the encoder of `run_dir`, as it is or as it began."""
    saved = checkpoint.load(run_dir / checkpoint.FILE_NAME)
    shards = open_shards(folder)
    whole: dict[str, Any] = {"data.shards": folder, "data.view_seconds": shards.segment_seconds}
    whole["encoder.simsiam.embedding"] = "backbone"  # of which an untrained encoder tells the least
    settings = load_config(base=saved["config"], command_line=whole)
    log_mel = with_statistics(log_mel_settings(settings), **saved["log_mel"])
    torch.manual_seed(settings.train.seed)
    encoder = encoder_type(settings).create().eval()
    if trained:
        encoder.load_state_dict(saved["learner"]["encoder"])
    here = World(0, 1, torch.device("cpu"))
    mode = encoder_type(settings).embeds
    batches = list(create_loader(settings, shards, log_mel, here, split, mode))
    song_of = torch.from_numpy(shards.segments["song"].to_numpy().copy())
    return torch.cat([encoder.embed(b.inputs[0]) for b in batches]), song_of[torch.cat([b.segment for b in batches])]


def unseen_segments_of_the_artist(run_dir: Path, folder: Path, trained: bool) -> float:
    """Accuracy of 5-NN among the training segments for the artist of each validation segment."""
    artist = first_label_ids(open_shards(folder).songs, "artists")
    (bank, bank_songs), (query, query_songs) = (embedded(run_dir, folder, trained, split) for split in SPLITS)
    return knn_labels(bank, artist[bank_songs], query, artist[query_songs], k=5)


def same_artist_is_nearer(run_dir: Path, folder: Path, trained: bool) -> float:
    """How often another song of the artist is nearer than a song of another one (AUC), over the training segments."""
    x, song = embedded(run_dir, folder, trained, "train")
    artist = first_label_ids(open_shards(folder).songs, "artists")[song]
    unit = normalize(x, dim=1)
    cosine, same = unit @ unit.T, artist[:, None] == artist
    another_song = same & (song[:, None] != song)
    rates = [
        (near[own][:, None] > near[~of_artist]).float().mean()
        for near, own, of_artist in zip(cosine, another_song, same, strict=True)
        if own.any()
    ]
    return float(torch.stack(rates).mean())
