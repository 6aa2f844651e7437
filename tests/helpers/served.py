"""A served library for the tests, and requests to its application in this process."""

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from helpers.evaluation_tables import planted, song_table
from helpers.small_music import sound, write_audio
from simsiam_dali.common.files import sha256_of
from simsiam_dali.embedding.table import Embeddings, read_song_embeddings, write_embeddings
from simsiam_dali.serving.app import create_app
from simsiam_dali.serving.library import ServedLibrary
from simsiam_dali.serving.positions import write_map
from simsiam_dali.serving.security import Address, Guard, Message

SUFFIXES = (".flac", ".mp3", ".ogg", ".wav", ".m4a")
ADDRESS = Address("127.0.0.1", 8710)
HOST = "127.0.0.1:8710"
ORIGIN = f"http://{HOST}"


def write_library(folder: Path, songs: int = 30, seconds: float = 2.0) -> Path:
    """`embeddings.parquet` of songs that are in `music/`, of 5 formats in turn and in 6 clusters; returns its path."""
    table, music = song_table(songs), folder.resolve() / "music"
    table["path"] = [Path(path).with_suffix(SUFFIXES[i % 5]).as_posix() for i, path in enumerate(table["path"])]
    for seed, path in enumerate(table["path"]):
        write_audio(music / path, sound(seed, seconds))
    out = folder / "embeddings.parquet"
    vectors = planted(np.arange(songs) % 6, noise=0.6)
    write_embeddings(out, Embeddings(table, vectors, {"music": str(music), "rows": "songs"}))
    return out


def with_map(table: Path) -> Path:
    """Keep some positions as the UMAP of a table: to compute it takes half a minute, and it comes at some moment."""
    points = np.random.default_rng(0).uniform(-1, 1, (len(read_song_embeddings(table).table), 2))
    write_map(table.with_name(f".{table.name}.map.npz"), points.astype(np.float32), sha256_of(table))
    return table


def open_library(table: Path) -> ServedLibrary:
    """The library as the command opens it, with `ratings.csv` beside the table."""
    songs = read_song_embeddings(table)
    return ServedLibrary(table, songs, Path(songs.provenance["music"]), table.with_name("ratings.csv"))


@dataclass(frozen=True)
class Answer:
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def header(self, name: str) -> str:
        """The value of a header, "" where there is none."""
        return dict(self.headers).get(name.encode(), b"").decode()

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Requests to an application, as raw as ASGI allows."""

    def __init__(self, table: Path, token: str | None = None, address: Address = ADDRESS) -> None:
        self.library = open_library(table)
        self.app = Guard(create_app(self.library, table.with_name("playlists")), address, token)
        self._runner = asyncio.Runner()

    def close(self) -> None:
        self._runner.close()
        self.library.close()

    def request(
        self,
        method: str,
        path: str,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
        query: str = "",
        without_origin: bool = False,
    ) -> Answer:
        """A request; without a Host or Origin header among `headers` it has the right ones."""
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
        names = {name for name, _ in raw}
        if b"host" not in names:
            raw.append((b"host", HOST.encode()))
        if b"origin" not in names and not without_origin and method not in ("GET", "HEAD"):
            raw.append((b"origin", ORIGIN.encode()))
        return self._runner.run(self._request(method, path, raw, body, query))

    def get(self, path: str, query: str = "", **headers: str) -> Answer:
        return self.request("GET", path, headers.items(), query=query)

    def post(self, path: str, content: object, **headers: str) -> Answer:
        return self.request(
            "POST", path, [("content-type", "application/json"), *headers.items()], json.dumps(content).encode()
        )

    async def _request(
        self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes, query: str
    ) -> Answer:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": path.encode("utf-8", "replace"), "root_path": "", "query_string": query.encode(),
            "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8710),
        }  # fmt: skip
        sent: list[Any] = []
        incoming = iter([{"type": "http.request", "body": body, "more_body": False}])
        ended = asyncio.Event()

        async def receive() -> Message:
            if (message := next(incoming, None)) is not None:
                return message
            await ended.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                ended.set()

        await self.app(scope, receive, send)
        assert sent, "no answer"
        return Answer(sent[0]["status"], sent[0]["headers"], b"".join(m.get("body", b"") for m in sent[1:]))
