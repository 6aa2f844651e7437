"""The embedding table, `embeddings.parquet`: one row a song, or a segment, with its tags and its vector."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from simsiam_dali.common.errors import UserError
from simsiam_dali.data.format import SCHEMAS, SONGS

FORMAT_VERSION = 1
_ABOUT = b"simsiam_dali"
_TAGS = ("path", "title", "artists", "albums", "album_artist", "year", "genres", "rating", "duration", "split")


@dataclass(frozen=True)
class Embeddings:
    """Row i of `vectors (N, D)`, float32 and not normalised, belongs to row i of `table`.

    `table` has the columns of the song table that tell about the music, and `song`, the row there; of segments also
    `segment`, the row in the segment table, and `start` (s). `about` says where the vectors come from: `features`
    ("checkpoint", or the floor's name), `rows` ("songs" or "segments"), `encoder_type`, `embedding` (which output of
    the encoder), `checkpoint` (its path), `checkpoint_sha256`, `music` (the folder that `path` is relative to),
    `shards` (fingerprint), `view_seconds`, `mlflow_run` ("" without MLflow) and `tracking_uri`.
    """

    table: pd.DataFrame
    vectors: np.ndarray
    about: dict[str, str]


def of_songs(songs: pd.DataFrame, rows: np.ndarray, vectors: np.ndarray, about: dict[str, str]) -> Embeddings:
    """Vectors `(N, D)` of the songs at `rows (N,)` of the song table."""
    table = songs.iloc[rows][list(_TAGS)].reset_index(drop=True)
    table.insert(0, "song", rows.astype("int64"))
    return Embeddings(table, vectors.astype(np.float32, copy=False), about)


def of_segments(
    songs: pd.DataFrame, segments: pd.DataFrame, rows: np.ndarray, vectors: np.ndarray, about: dict[str, str]
) -> Embeddings:
    """Vectors `(N, D)` of the segments at `rows (N,)` of the segment table."""
    each = of_songs(songs, segments["song"].to_numpy()[rows], vectors, about)
    each.table.insert(1, "segment", rows.astype("int64"))
    each.table.insert(2, "start", segments["start"].to_numpy()[rows])
    return each


def write(path: Path, embeddings: Embeddings) -> None:
    """Write beside `path`, then rename: `path` is the old file or the new one. Raises UserError when it cannot."""
    table = embeddings.table
    types = {"song": pa.int64(), "segment": pa.int64(), "start": pa.float64()}
    types |= {name: SCHEMAS[SONGS].field(name).type for name in _TAGS}
    fields = [pa.field(name, types[name]) for name in table.columns]
    arrays = [pa.array(table[f.name].tolist() if pa.types.is_list(f.type) else table[f.name], f.type) for f in fields]
    width = embeddings.vectors.shape[1]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.vectors.reshape(-1), pa.float32()), width)
    about = {"format_version": FORMAT_VERSION, **embeddings.about}
    schema = pa.schema([*fields, pa.field("embedding", vectors.type)], {_ABOUT: json.dumps(about).encode()})
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_arrays([*arrays, vectors], schema=schema), part)
        part.replace(path)
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror or e})") from e


def read(path: Path) -> Embeddings:
    """Read what `write` wrote. Raises UserError for a file that is missing or something else."""
    about, table = _read(path, pq.read_table)
    vectors = table["embedding"].combine_chunks()
    frame = table.drop_columns(["embedding"]).to_pandas()
    for name in ("artists", "albums", "genres"):
        frame[name] = [list(texts) for texts in frame[name]]
    frame["year"] = table["year"].to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    numbers = vectors.flatten().to_numpy(zero_copy_only=False)
    return Embeddings(frame, numbers.reshape(len(frame), vectors.type.list_size), about)


def read_about(path: Path) -> dict[str, str]:
    """`about` alone, without the vectors; raises as `read` does."""
    return _read(path, pq.read_schema)[0]


def _read(path: Path, how: Callable[[Path], Any]) -> tuple[dict[str, str], Any]:
    """`about`, and what `how` reads: the table, or only its schema."""
    try:
        table = how(path)
        schema = table.schema if isinstance(table, pa.Table) else table
        about = json.loads(schema.metadata[_ABOUT])
        version = about.pop("format_version")
    except FileNotFoundError:
        raise UserError(f"no embeddings {path}: make them with python -m simsiam_dali.embed") from None
    except (OSError, pa.ArrowException, TypeError, KeyError, ValueError) as e:
        raise UserError(f"{path} is damaged or holds no embeddings: make them with python -m simsiam_dali.embed") from e
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}: embed again")
    return about, table


def read_songs(path: Path) -> Embeddings:
    """A table that has each song once, with finite vectors. Raises UserError for any other."""
    songs = read(path)
    if not len(songs.table):
        raise UserError(f"{path} holds no songs")
    if "segment" in songs.table or songs.table["song"].duplicated().any():
        raise UserError(f"{path} has a row for each segment, and one a song is needed: embed without --per-segment")
    if not np.isfinite(songs.vectors).all():
        raise UserError(f"{path} has vectors that are not finite: embed again")
    return songs
