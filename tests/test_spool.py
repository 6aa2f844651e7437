"""The list on the disk: what was put in comes out, and memory does not grow with it."""

import tracemalloc
from pathlib import Path

import pytest

from simsiam_dali.packing.assemble import Spool


def test_what_was_put_in_any_order_comes_out_in_place(tmp_path: Path) -> None:
    spool: Spool[dict[str, int]] = Spool(5, tmp_path)
    for place in (3, 0, 4, 2, 1):
        spool[place] = {"place": place}
    assert [item["place"] for item in spool] == [0, 1, 2, 3, 4]
    assert not list(tmp_path.iterdir())  # its file has no name


def test_an_empty_place_is_no_item(tmp_path: Path) -> None:
    spool: Spool[str] = Spool(2, tmp_path)
    spool[1] = "x"
    with pytest.raises(OSError, match="Invalid argument"):
        spool[0]


def test_memory_holds_places_not_items(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        spool: Spool[bytes] = Spool(1000, tmp_path)
        for place in range(1000):
            spool[place] = bytes([place % 256]) * 10_000
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
    assert spool[517] == bytes([517 % 256]) * 10_000
