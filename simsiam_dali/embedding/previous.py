"""The table that a refresh starts from, its records, and the encoder that made it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from simsiam_dali.common.errors import UserError
from simsiam_dali.embedding.features import CHECKPOINT
from simsiam_dali.embedding.records import Records, of_shards, open_tables, read_records, records_path
from simsiam_dali.embedding.run import TrainedRun, read_run
from simsiam_dali.embedding.table import Embeddings, read_provenance, read_song_embeddings
from simsiam_dali.embedding.write import TABLE_VERSION, embedding_config
from simsiam_dali.models.registry import encoder_type


@dataclass(frozen=True)
class Previous:
    """`songs`: the table, None where there is none or it is made from nothing; `run`: its config is for embedding."""

    songs: Embeddings | None
    records: Records
    run: TrainedRun


def read_previous(
    table: Path,
    checkpoint: str,
    shards: Path | str | None,
    replace: bool = False,
    batch_size: int | None = None,
    threads: int | None = None,
) -> Previous:
    """What the table at `table` was made from, and by which encoder.

    checkpoint: as of `--checkpoint`, "" for the table's own. shards: those that a table without records was made from,
    None for the training's. Raises UserError, unless `replace`, for a table that cannot be continued: of another
    checkpoint, of segments, of a baseline, of another version, or of files that are not known.
    """
    made_by = _made_by(table, replace)
    run = read_run(checkpoint or made_by.get("checkpoint", ""))
    view_seconds, embedding, songs = None, None, None
    records = Records("", run.packing.decode, {})
    if made_by:
        try:
            _check(table, made_by, run)
            songs = read_song_embeddings(table)
            records = _records_of(table, songs, run, shards)
            view_seconds = float(made_by["view_seconds"])
            if made_by["embedding"] in encoder_type(run.config).outputs:
                embedding = made_by["embedding"]
        except UserError:
            if not replace:
                raise
            songs = None
    seconds = records.settings.segment_seconds
    if view_seconds is not None and f"{seconds:g}" == made_by["view_seconds"]:
        view_seconds = None  # as the table has it, it is rounded
    config = embedding_config(
        run.config, seconds, view_seconds, batch_size, threads, encoder__simsiam__embedding=embedding
    )
    return Previous(songs, records, dataclasses.replace(run, config=config))


def _made_by(table: Path, replace: bool) -> dict[str, str]:
    """The table's provenance; nothing without a table, and with `replace` for a file that is none."""
    try:
        return read_provenance(table) if table.exists() else {}
    except UserError:
        if not replace:
            raise
        return {}


def _check(table: Path, made_by: dict[str, str], run: TrainedRun) -> None:
    advice = f"embed again with python -m simsiam_dali.embed --out {table}, or give --replace to embed all songs here"
    if made_by.get("rows") != "songs":
        raise UserError(f"{table} has a row for each segment, not for each song: {advice}")
    if made_by.get("features") != CHECKPOINT:
        raise UserError(f"{table} holds the baseline {made_by.get('features')}, no encoder's vectors: {advice}")
    if made_by.get("checkpoint_sha256") != run.sha256:
        raise UserError(f"{table} was made by another checkpoint than {run.path}: {advice}")
    if made_by.get("table_version") != TABLE_VERSION:
        raise UserError(f"{table} was made by another version of this program: {advice}")


def _records_of(table: Path, songs: Embeddings, run: TrainedRun, shards: Path | str | None) -> Records:
    """The records beside the table, or else those of the shards that it was made from."""
    fingerprint = songs.provenance["shards"]
    records = read_records(records_path(table))
    if records is None or records.shards != fingerprint:
        location = shards or run.config.data.shards
        packed = open_tables(location)
        if packed.fingerprint != fingerprint:
            raise UserError(
                f"{location} holds other songs than {table} was made from, and there is no record of these:"
                " give --shards, or --replace to embed all songs again"
            )
        records = of_shards(packed)
    if not all(path in records.files and records.files[path].audio_hash for path in songs.table["path"]):
        raise UserError(f"{records_path(table)} is of another table: remove it, or give --replace to embed all songs")
    return records
