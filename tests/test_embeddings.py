"""The embedding table comes back as it was written."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from simsiam_dali.common.errors import UserError
from simsiam_dali.data.shards import open_shards
from simsiam_dali.embedding.table import Embeddings, read_embeddings, write_embeddings
from simsiam_dali.embedding.write import PartialResults


def test_round_trip(small_shards: Path, tmp_path: Path) -> None:
    shards = open_shards(small_shards)
    rows = np.arange(len(shards.songs))[::-1]
    vectors = np.random.default_rng(0).standard_normal((len(rows), 7)).astype(np.float32)
    written = Embeddings.of_songs(shards.songs, rows, vectors, {"encoder_type": "simple", "music": "/music"})
    write_embeddings(tmp_path / "new/e.parquet", written)
    read = read_embeddings(tmp_path / "new/e.parquet")
    np.testing.assert_array_equal(read.vectors, vectors)
    pd.testing.assert_frame_equal(read.table, written.table)
    assert read.provenance == written.provenance
    assert read.table["path"].tolist() == shards.songs["path"].tolist()[::-1]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["e.parquet"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no embeddings"):
        read_embeddings(tmp_path / "none.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "other.parquet").read_bytes()[:50])
    for name in ("other", "cut"):
        with pytest.raises(UserError, match="damaged or holds no embeddings"):
            read_embeddings(tmp_path / f"{name}.parquet")


def test_parts_are_put_in_the_order_of_the_rows_and_leave_no_vectors_behind(tmp_path: Path) -> None:
    rows = torch.randperm(23, generator=torch.Generator().manual_seed(0)) * 2
    vectors = rows[:, None] + torch.tensor([0.25, 0.5])
    with PartialResults(tmp_path / "partial", {"of": "this"}) as results:
        for own, of_own in zip(rows.split(5), vectors.split(5), strict=True):
            results.add(own, of_own, "train", None)
    with PartialResults(tmp_path / "partial", {"of": "this"}) as again:
        found, of_found = again.take()
        assert torch.equal(found, torch.arange(0, 46, 2))
        assert torch.equal(of_found, found[:, None] + torch.tensor([0.25, 0.5]))
        assert not any("vectors" in part for part in again.parts)
        assert len(again) == 23
