"""A server that stops while it still prepares the search and the map."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from helpers.served import open_library, write_library

from simsiam_dali.serving.library import ServedLibrary


@pytest.fixture
def library(tmp_path: Path) -> Iterator[ServedLibrary]:
    library = open_library(write_library(tmp_path, songs=12, seconds=0.3))
    yield library
    library.close()


def test_an_import_that_fails_as_the_server_stops_is_not_reported(
    library: ServedLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As scikit-learn's does once the interpreter's shutdown has begun."""
    monkeypatch.setitem(sys.modules, "simsiam_dali.serving.search", None)
    with pytest.raises(ImportError):
        library._prepare(Future())
    library.close()
    made: Future[Any] = Future()
    library._prepare(made)
    assert isinstance(made.exception(), ImportError)


def test_no_map_is_begun_after_the_server_stopped(library: ServedLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    library.close()
    library.positions._compute()  # its thread had started already
    library.positions.compute()
    assert not library.positions.computing
