"""The embedding table, `embeddings.parquet`: one row per song, or per segment, with its tags and its vector."""

import base64
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.files import atomic_write, refuse_failed_write
from simsiam_dali.common.replacement import finish_commit
from simsiam_dali.data.format import SCHEMAS, SONGS
from simsiam_dali.evaluation.knn import unit
from simsiam_dali.evaluation.within_song import WithinSong

FORMAT_VERSION = 1
_METADATA_KEY = b"simsiam_dali"
_WITHIN_KEY = b"simsiam_dali.within_song"
_TAGS = ("path", "title", "artists", "albums", "album_artist", "year", "genres", "rating", "duration", "split")


@dataclass(frozen=True)
class Embeddings:
    """Row i of `vectors (N, D)`, float32 and not normalised, belongs to row i of `table`.

    `table` has the song table's columns of tags, and `song`, the row there; of segments also `segment`, the row in the
    segment table, and `start` (s). `provenance` tells where the vectors come from: `features` ("checkpoint", or a
    baseline's name), `rows` ("songs" or "segments"), `encoder_type`, `embedding` (which output of the encoder),
    `checkpoint` (its path), `checkpoint_sha256`, `music` (the folder that `path` is relative to), `shards`
    (fingerprint), `view_seconds`, `table_version`, `mlflow_run` ("" without MLflow), `tracking_uri` and `precision`
    (a torch dtype, or several that a refresh joined; older tables lack it). `within`: how segments lie around their
    song's mean; None where no song has two, in tables of segments, and in older tables.
    """

    table: pd.DataFrame
    vectors: np.ndarray
    provenance: dict[str, str]
    within: WithinSong | None = None

    @classmethod
    def of_songs(
        cls,
        songs: pd.DataFrame,
        rows: np.ndarray,
        vectors: np.ndarray,
        provenance: dict[str, str],
        within: WithinSong | None = None,
    ) -> Self:
        """Vectors `(N, D)` of the songs at `rows (N,)` of the song table."""
        table = songs.iloc[rows][list(_TAGS)].reset_index(drop=True)
        table.insert(0, "song", rows.astype("int64"))
        return cls(table, vectors.astype(np.float32, copy=False), provenance, within)

    def unit(self) -> np.ndarray:
        """The vectors `(N, D)` by which songs are searched, of length 1: two songs are as near as their cosine says."""
        return unit(self.vectors, self.within)


def write_embeddings(path: Path, embeddings: Embeddings) -> None:
    """Write the file atomically, and its folder where there is none. Raises UserError when it cannot."""
    frame = embeddings.table
    types = {"song": pa.int64(), "segment": pa.int64(), "start": pa.float64()}
    types |= {name: SCHEMAS[SONGS].field(name).type for name in _TAGS}
    schema = pa.schema([(name, types[name]) for name in frame.columns])
    columns = pa.Table.from_pandas(frame, schema, preserve_index=False)
    width = embeddings.vectors.shape[1]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.vectors.reshape(-1), pa.float32()), width)
    own = {"format_version": FORMAT_VERSION, "within_song": embeddings.within is not None}
    metadata = {_METADATA_KEY: json.dumps({**own, **embeddings.provenance}).encode()}
    with refuse_failed_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            table = columns.append_column("embedding", vectors).replace_schema_metadata(metadata)
            # The vectors as they are: floats neither repeat nor compress, and to try costs readers half a second in
            # 100,000 songs.
            compression = dict.fromkeys(columns.column_names, "snappy") | {"embedding": "none"}
            options = {"use_dictionary": columns.column_names, "compression": compression}
            with pq.ParquetWriter(part, table.schema, **options) as writer:
                writer.write_table(table)
                if embeddings.within:  # beside the schema, of whose metadata a file holds two copies
                    writer.add_key_value_metadata({_WITHIN_KEY: _as_text(embeddings.within)})


def read_embeddings(path: Path) -> Embeddings:
    """Read an embedding table. Raises UserError for a file that is missing or something else."""
    provenance, (table, within) = _read(path, lambda file: (file.read(), _within(file)))
    vectors = table["embedding"].combine_chunks()
    frame = table.drop_columns(["embedding"]).to_pandas()
    for name in ("artists", "albums", "genres"):
        frame[name] = [list(texts) for texts in frame[name]]
    frame["year"] = table["year"].to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    numbers = vectors.flatten().to_numpy(zero_copy_only=False)
    return Embeddings(frame, numbers.reshape(len(frame), vectors.type.list_size), provenance, within)


def _as_text(within: WithinSong) -> bytes:
    """In base64, since others may read a parquet file's metadata as text."""
    content = io.BytesIO()
    np.savez(content, axes=within.axes, rest=within.rest, freedom=within.freedom)
    return base64.b64encode(content.getvalue())


def _within(file: pq.ParquetFile) -> WithinSong | None:
    """`Embeddings.within` of a file. Raises ValueError or KeyError where it is damaged."""
    text = file.metadata.metadata.get(_WITHIN_KEY)
    if text is None:
        return None
    with np.load(io.BytesIO(base64.b64decode(text))) as found:
        within = WithinSong(found["axes"], found["rest"], int(found["freedom"]))
    dims = file.schema_arrow.field("embedding").type.list_size
    if within.axes.shape[1:] != (dims,) or within.rest.shape != (dims,):
        raise ValueError("of other vectors")
    return within


def read_provenance(path: Path) -> dict[str, str]:
    """`Embeddings.provenance` alone, without the vectors; raises as `read_embeddings` does."""
    return _read(path, lambda _: None)[0]


def _read(path: Path, reader: Callable[[pq.ParquetFile], Any]) -> tuple[dict[str, str], Any]:
    """The provenance, and what `reader` reads."""
    finish_commit(path)
    try:
        with pq.ParquetFile(path) as file:
            provenance = json.loads(file.schema_arrow.metadata[_METADATA_KEY])
            version = provenance.pop("format_version")
            lost = provenance.pop("within_song", False) and _WITHIN_KEY not in file.metadata.metadata
            content = reader(file)
    except FileNotFoundError:
        raise UserError(f"no embeddings {path}: make them with python -m simsiam_dali.embed") from None
    except (OSError, pa.ArrowException, TypeError, KeyError, ValueError, zipfile.BadZipFile) as e:
        raise UserError(f"{path} is damaged or holds no embeddings: make them with python -m simsiam_dali.embed") from e
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}: embed again")
    if lost:
        raise UserError(
            f"{path} was written again by another program, which left out how to compare songs: embed again"
        )
    return provenance, content


def read_song_embeddings(path: Path) -> Embeddings:
    """Read a table of songs, each once, with finite vectors. Raises UserError for any other."""
    songs = read_embeddings(path)
    if not len(songs.table):
        raise UserError(f"{path} holds no songs")
    if "segment" in songs.table or songs.table["song"].duplicated().any():
        raise UserError(f"{path} has a row for each segment, not for each song: embed without --per-segment")
    if not np.isfinite(songs.vectors).all():
        raise UserError(f"{path} has vectors that are not finite: embed again")
    return songs


def read_same_songs(path: Path, songs: Embeddings) -> Embeddings:
    """Another table, in the order of `songs`. Raises UserError when it is of other songs."""
    other = read_song_embeddings(path)
    shards = songs.provenance.get("shards"), other.provenance.get("shards")
    if all(shards) and shards[0] != shards[1]:
        raise UserError(
            f"{path} is of other shards than the embeddings, or from before a refresh: make it again from the same"
            " songs, or move it away to go on without it"
        )
    if songs.provenance.get("table_version") != other.provenance.get("table_version"):
        # Else one of them may be compared by a rule that the other has not.
        raise UserError(f"{path} and the embeddings are of different versions of this program: make both again")
    row = {song: i for i, song in enumerate(other.table["song"])}
    if set(row) != set(songs.table["song"]):
        raise UserError(
            f"{path} has {len(row)} songs, not the {len(songs.table)} of the embeddings: make it from the same songs"
        )
    order = [row[song] for song in songs.table["song"]]
    return replace(other, table=other.table.iloc[order].reset_index(drop=True), vectors=other.vectors[order])
