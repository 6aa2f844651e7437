"""The routes. Songs are rows of the table; a request names a song by its row and nothing by a path."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response, StreamingResponse

from simsiam_dali.common.errors import UserError
from simsiam_dali.serving import audio
from simsiam_dali.serving.library import ServedLibrary, as_bytes
from simsiam_dali.serving.security import App

STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

MIN_PATH = 3
"""Songs of the shortest path, as in recommendation.choose."""

Count = Annotated[int, Query(ge=1, le=500)]
Row = Annotated[int, Field(ge=0, lt=2**31)]


class Body(BaseModel):
    """A JSON body with these fields and no other."""

    model_config = ConfigDict(extra="forbid", strict=True)


class GivenRating(Body):
    """A rating from 0 to 1, or None to remove it."""

    song: Row
    rating: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None


class RadioRequest(Body):
    """Songs that follow `start`, none of the recordings of `without`."""

    start: Row
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0
    without: Annotated[list[Row], Field(max_length=100_000)] = []
    count: Annotated[int, Field(ge=1, le=500)] = 20


class SavedQueue(Body):
    """Songs to save as a playlist."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    songs: Annotated[list[Row], Field(min_length=1, max_length=100_000)]
    replace: bool = False


def create_app(library: ServedLibrary, playlists_dir: Path) -> App:
    """The application, without `security.Guard`."""
    # FastAPI's pages about the routes load scripts of other hosts.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_exception_handler(UserError, lambda _, error: _error(409, str(error)))
    app.add_exception_handler(audio.NotPlayable, lambda _, error: _error(404, str(error)))
    app.add_exception_handler(HTTPException, _http_error)
    # Pydantic's own text repeats the input, which may be no JSON (NaN).
    app.add_exception_handler(RequestValidationError, lambda _, __: _error(422, "the request is not understood"))
    _add_static(app)
    _add_library(app, library)
    _add_search(app, library)
    _add_audio(app, library)
    _add_playlists(app, library, playlists_dir)
    return app


def _error(status: int, text: str) -> Response:
    return _json({"error": text}, status)


def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, str(error.detail))


def _json(content: Any, status: int = 200) -> Response:
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return Response(text, status, media_type="application/json")


def _known(library: ServedLibrary, *rows: int) -> None:
    """Raise a 404 for a row that the table does not have."""
    if any(not 0 <= row < len(library) for row in rows):
        raise HTTPException(404, "no such song")


def _add_static(app: FastAPI) -> None:
    """The files of `static/`, read once: no request names a path."""

    def content(data: bytes, media_type: str) -> Response:
        return Response(data, media_type=media_type, headers={"cache-control": "no-cache"})

    for file in STATIC.iterdir():
        if file.suffix in TYPES:
            route: Callable[[], Response] = partial(content, file.read_bytes(), TYPES[file.suffix])
            path = "/" if file.name == "index.html" else f"/static/{file.name}"
            app.add_api_route(path, route, methods=["GET", "HEAD"], response_class=Response)


def _add_library(app: FastAPI, library: ServedLibrary) -> None:
    @app.get("/api/songs")
    def songs() -> Response:
        # What takes seconds begins once the page has what it shows first.
        after = BackgroundTask(library.prepare)
        return Response(library.page_data(), media_type="application/json", background=after)

    @app.get("/api/map")
    def map_state() -> Response:
        positions = library.positions
        return _json({"kind": positions.kind, "version": positions.version, "computing": positions.computing})

    @app.get("/api/positions")
    def points() -> Response:
        return Response(as_bytes(library.positions.points), media_type="application/octet-stream")

    @app.get("/api/clusters")
    def clusters() -> Response:
        return _json(library.search().clusters().tolist())

    @app.post("/api/ratings")
    def rate(given: GivenRating) -> Response:
        _known(library, given.song)
        rating = library.ratings.rate(given.song, given.rating)
        return _json({"song": given.song, "rating": None if math.isnan(rating) else round(rating, 3)})


def _add_search(app: FastAPI, library: ServedLibrary) -> None:
    @app.get("/api/nearest/{song}")
    def nearest(song: int, count: Count = 25) -> Response:
        _known(library, song)
        rows, cosine = library.search().nearest(song, count)
        return _json({"songs": rows, "similarity": cosine})

    @app.get("/api/path")
    def path(start: int, end: int, count: Annotated[int, Query(ge=MIN_PATH, le=200)] = 12) -> Response:
        _known(library, start, end)
        return _json({"songs": library.search().path(start, end, count)})

    @app.post("/api/radio")
    def radio(wanted: RadioRequest) -> Response:
        _known(library, wanted.start, *wanted.without)
        return _json({"songs": library.search().radio(wanted.start, wanted.seed, wanted.without, wanted.count)})

    @app.get("/api/explore")
    def explore(count: Count = 25) -> Response:
        return _json({"songs": library.search().explore(library.ratings.values, count)})


def _add_audio(app: FastAPI, library: ServedLibrary) -> None:
    @app.get("/audio/{song}")
    @app.head("/audio/{song}")
    def play(request: Request, song: int, wav: bool = False) -> Response:
        """The file, or with `wav` or for a format that browsers do not play the decoded audio."""
        _known(library, song)
        table = library.table
        file = audio.song_file(table["path"].iloc[song], library.music)
        found = audio.inspect(file, float(table["duration"].iloc[song]))
        if found.media_type and not wav:
            return FileResponse(found.path, media_type=found.media_type, headers={"cache-control": "no-cache"})
        return _transcoded(found, request.headers.get("range", ""))


def _transcoded(found: audio.Audio, wanted: str) -> Response:
    """The WAV, or the one part of it that a Range header asks for (RFC 9110, section 14.2)."""
    size = found.wav_bytes
    part = audio.byte_range(wanted, size)
    headers = {"accept-ranges": "bytes", "cache-control": "no-cache"}
    if part is not None and part[0] >= part[1]:
        return Response(status_code=416, headers={"content-range": f"bytes */{size}"})
    start, end = part or (0, size)
    if part:
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    headers["content-length"] = str(end - start)
    body = audio.wav_part(found, start, end)
    return StreamingResponse(body, 206 if part else 200, headers, media_type="audio/wav")


def _add_playlists(app: FastAPI, library: ServedLibrary, folder: Path) -> None:
    @app.get("/api/playlists")
    def names() -> Response:
        return _json({"names": library.search().playlist_names(folder)})

    @app.get("/api/playlists/{name}")
    def songs(name: str) -> Response:
        rows = library.search().playlist(folder, name, library.ratings.values)
        if rows is None:
            raise HTTPException(404, "no such playlist")
        return _json({"name": name, "songs": rows})

    @app.post("/api/playlists")
    def save(queue: SavedQueue) -> Response:
        _known(library, *queue.songs)
        files = library.search().save_playlist(folder, queue.name, queue.songs, queue.replace)
        return _json({"files": files})
