"""Bring an embedding table up to date: decode what is new or changed, embed audio that is in no row, keep the rest."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from simsiam_dali.common.distributed import World
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import replace_settings
from simsiam_dali.data.shards import ShardSet, subset_of
from simsiam_dali.embedding.changes import Changes
from simsiam_dali.embedding.features import CHECKPOINT, create_features
from simsiam_dali.embedding.previous import Previous
from simsiam_dali.embedding.rebuild import Report, TableBuilder, same_songs
from simsiam_dali.embedding.records import NO_AUDIO, FileRecord, Records, of_rows, of_shards
from simsiam_dali.embedding.run import TrainedRun
from simsiam_dali.embedding.table import Embeddings, read_embeddings
from simsiam_dali.embedding.write import CleanViews, table_provenance, write_table
from simsiam_dali.packing.find import SongFile
from simsiam_dali.packing.pack import NothingPacked
from simsiam_dali.packing.pack_song import DecodeSettings, PackSettings
from simsiam_dali.packing.ratings import RatingsFile
from simsiam_dali.packing.temporary import TemporarySongs, in_one_split
from simsiam_dali.training.data import log_mel_settings, with_statistics


@dataclass(frozen=True)
class Decoded:
    """Files decoded into temporary shards (None where none could be), and the record of each."""

    shards: ShardSet | None
    records: dict[str, FileRecord]


def decode(files: list[SongFile], music: Path, settings: DecodeSettings, folder: Path) -> Decoded:
    """Pack files, whose names are relative to `music`, into `folder`, where an interrupted packing continues."""
    songs = TemporarySongs(music, files, in_one_split(PackSettings(**dataclasses.asdict(settings))))
    try:
        shards, _ = songs.packed(folder)
        records = of_shards(shards).files
    except NothingPacked as e:
        shards, records = None, of_rows(e.rows, [])
    for file in files:  # the shards' table leaves out what is no audio
        record = FileRecord(file.name, file.bytes, file.mtime_ns, "", NO_AUDIO)
        records.setdefault(file.name, record)
    return Decoded(shards, records)


def embed_unknown(
    shards: ShardSet, known: set[str], run: TrainedRun, device: torch.device, folder: Path
) -> tuple[dict[str, np.ndarray], Embeddings | None]:
    """The vectors `(D,)` of the songs of `shards` whose audio hash is not in `known`, by that hash; and their table.

    run: its config as it is for embedding (`embedding_config`). Stopped, the same call continues in `folder`.
    """
    unknown = ~shards.songs["audio_hash"].isin(known).to_numpy()
    if not unknown.any():
        return {}, None
    rows = np.flatnonzero(unknown[shards.segments["song"]])
    index, out = folder / "unknown", folder / "unknown.parquet"
    index.mkdir(exist_ok=True)
    part = subset_of(shards, rows, index)
    log_mel = with_statistics(log_mel_settings(run.config), **run.statistics)
    views = CleanViews(run.config, part, log_mel, World(0, 1, device))
    content = hashlib.sha256(json.dumps([shards.fingerprint, rows.tolist()]).encode()).hexdigest()
    provenance = table_provenance(CHECKPOINT, "songs", run, shards.manifest.music, content)
    write_table(create_features(CHECKPOINT, run, log_mel, device), views, provenance, out)
    made = read_embeddings(out)
    hashes = shards.songs["audio_hash"].iloc[made.table["song"]]
    return dict(zip(hashes, made.vectors, strict=True)), made


def in_precision_of(table: Embeddings, run: TrainedRun, device: torch.device) -> TrainedRun:
    """`run`, embedding in the precision of the table, so that all its songs have one; half precision on a GPU only.

    The training's precision where the table's is not known, or where its songs have several.
    """
    precision = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(table.provenance.get("precision", ""))
    if device.type == "cpu" and precision != "fp32":  # many times slower than float32 on most CPUs
        return run
    return dataclasses.replace(run, config=replace_settings(run.config, train__precision=precision))


def joined_precision(old: Embeddings | None, made: Embeddings | None) -> dict[str, str]:
    """What provenance says of the precision of a table with songs of both: that of each; nothing of an older table.

    So `embed --precision` calls a table up to date only where all its songs have that precision.
    """
    found = [table.provenance.get("precision", "") for table in (old, made) if table]
    names = {name for text in found for name in text.split(", ")}
    return {"precision": ", ".join(sorted(names))} if all(found) and names else {}


@dataclass(frozen=True)
class Refreshed:
    """The new table, or the old one where nothing of it has changed, and the records that belong to it.

    `refused`: files that were tried now and hold no song, with the reason.
    """

    songs: Embeddings
    records: Records
    report: Report
    refused: list[tuple[str, str]]


def refresh(
    previous: Previous,
    changes: Changes,
    files: Iterable[SongFile],
    music: Path,
    ratings: RatingsFile | None,
    device: torch.device,
    scratch: Path,
) -> Refreshed:
    """Decode and embed what has changed, and make the new table; nothing but `scratch` is written.

    files: all that were found in `music`. ratings: override those in the tags. Raises UserError when no song is left.
    """
    old, run, before = previous.songs, previous.run, previous.records.files
    settings = previous.records.settings
    decoded = decode(changes.decode, music, settings, scratch) if changes.decode else Decoded(None, {})
    known = {before[path].audio_hash for path in old.table["path"]} if old else set()
    vectors, made, durations = dict[str, np.ndarray](), None, dict[str, float]()
    if decoded.shards:
        run = in_precision_of(old, run, device) if old else run
        vectors, made = embed_unknown(decoded.shards, known, run, device, scratch)
        songs = decoded.shards.songs
        durations = dict(zip(songs["audio_hash"], songs["duration"], strict=True))
    # What is refused for a reason that may pass keeps what the table has of it.
    kept = {
        name: before[name]
        for name, record in decoded.records.items()
        if not record.audio_hash and record.retry and name in before
    }
    after = changes.known | {
        name: dataclasses.replace(record, audio_hash="", reason="none of its segments can be embedded", retry=True)
        if record.audio_hash and record.audio_hash not in known and record.audio_hash not in vectors
        else record
        for name, record in (decoded.records | kept).items()
    }
    if not any(record.audio_hash for record in after.values()):
        raise UserError(f"{music}: none of its files can be embedded")
    is_here = old is not None and Path(old.provenance["music"]).resolve() == music.resolve()
    tried = {name: after[name] for name in decoded.records} | {name: decoded.records[name] for name in kept}
    refused = [(record.path, record.reason) for record in tried.values() if not record.audio_hash]
    if old and is_here and after == before and ratings is None:
        return Refreshed(old, previous.records, Report(), refused)
    records = Records("", settings, after)
    provenance = table_provenance(CHECKPOINT, "songs", run, str(music), records.fingerprint)
    provenance |= joined_precision(old, made)
    within, paths = made.within if made else None, {file.name: file.path for file in files}
    builder = TableBuilder(old, before, after, vectors, within, durations, paths)
    new = builder.build(provenance, music, ratings)
    if old and is_here and same_songs(old, new):
        new = old
    records = dataclasses.replace(records, shards=new.provenance["shards"])
    return Refreshed(new, records, builder.report, refused)


def never_trained_on(songs: Embeddings, records: Records, run: TrainedRun, shards: ShardSet | None) -> int:
    """Number of songs in `songs` that were not among those of the training.

    shards: the training's. Where they are gone, or packed again, the songs in neither split are counted; a table in
    which no song has one, of `embed --music`, does not say, and 0 are.
    """
    if shards is None or shards.fingerprint != run.shards:
        unsplit = songs.table["split"] == ""
        return 0 if unsplit.all() else int(unsplit.sum())
    trained = set(shards.songs["audio_hash"])
    return sum(records.files[path].audio_hash not in trained for path in songs.table["path"])
