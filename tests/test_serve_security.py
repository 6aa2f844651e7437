"""What the server refuses: other names, other sites, no token, files that are not the table's, and nonsense."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.served import HOST, Client, with_map, write_library

from simsiam_dali.serving.security import MAX_BODY, POLICY, Address, is_loopback

TOKEN = "a-token-of-the-tests"
ROUTES = {
    "GET": (
        "/", "/static/main.js", "/static/style.css", "/api/songs", "/api/map", "/api/positions", "/api/clusters",
        "/api/nearest/1", "/api/path", "/api/explore", "/api/playlists", "/api/playlists/mine", "/audio/0", "/audio/1",
    ),
    "POST": ("/api/ratings", "/api/radio", "/api/playlists"),
}  # fmt: skip
ALL_ROUTES = [(method, path) for method, paths in ROUTES.items() for path in paths]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_map(write_library(tmp_path_factory.mktemp("served"), seconds=0.3))


@pytest.fixture(scope="module")
def client(table: Path) -> Iterator[Client]:
    client = Client(table)
    yield client
    client.close()


@pytest.fixture(scope="module")
def guarded(table: Path) -> Iterator[Client]:
    client = Client(table, token=TOKEN)
    yield client
    client.close()


def test_answers_have_the_policy_and_no_cors_headers(client: Client) -> None:
    for method, path in [*ALL_ROUTES, ("GET", "/nothing")]:
        answer = client.request(method, path, [("host", "other.example")] if path == "/nothing" else [])
        assert answer.header("content-security-policy") == POLICY
        assert answer.header("x-content-type-options") == "nosniff"
        assert answer.header("referrer-policy") == "no-referrer"
        assert not [name for name, _ in answer.headers if name.startswith(b"access-control-")]


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/static/", "/static/index.html", "/api/"])
def test_there_are_no_routes_beside_those_of_the_page(client: Client, path: str) -> None:
    assert client.get(path).status == 404


@pytest.mark.parametrize(
    "host",
    ["evil.example:8710", "127.0.0.1", "127.0.0.1:80", "127.0.0.1:8710.evil.example", "localhost.evil.example:8710", "",
     "[::1", ":8710", "127.0.0.1:8710@evil.example", "0.0.0.0:8710"],
)  # fmt: skip
def test_a_wrong_host_is_refused_on_every_route(client: Client, host: str) -> None:
    assert {client.request(method, path, [("host", host)]).status for method, path in ALL_ROUTES} == {421}


@pytest.mark.parametrize("host", ["127.0.0.1:8710", "localhost:8710", "[::1]:8710"])
def test_the_names_of_this_machine_are_accepted(client: Client, host: str) -> None:
    assert client.get("/", host=host).status == 200


def test_two_host_headers_are_refused(client: Client) -> None:
    assert client.request("GET", "/", [("host", HOST), ("host", HOST)]).status == 421


@pytest.mark.parametrize(
    ("listening", "host", "accepted"),
    [("0.0.0.0", "192.168.1.5:8710", True), ("0.0.0.0", "rebound.example:8710", False),
     ("192.168.1.5", "192.168.1.5:8710", True), ("192.168.1.5", "localhost:8710", False),
     ("nas.local", "nas.local:8710", True), ("::1", "[::1]:8710", True), ("NAS.local", "nas.local:8710", True),
     ("nas.local", "NAS.Local:8710", True), ("FE80::A", "[fe80::a]:8710", True), ("LocalHost", "127.0.0.1:8710", True)],
)  # fmt: skip
def test_a_server_of_another_address_accepts_its_own_names(listening: str, host: str, accepted: bool) -> None:
    assert Address(listening, 8710).accepts(host) == accepted


def test_the_case_of_a_host_does_not_count(table: Path) -> None:
    client = Client(table, address=Address("NAS.local", 8710))
    body = {"song": 0, "rating": None}
    assert client.get("/", host="nas.local:8710").status == 200
    for host, origin in (("nas.local", "nas.local"), ("NAS.local", "nas.local"), ("nas.local", "NAS.local")):
        headers = {"host": f"{host}:8710", "origin": f"http://{origin}:8710"}
        assert client.post("/api/ratings", body, **headers).status == 200
    client.close()


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:8710", "http://127.0.0.1:80", ""])
@pytest.mark.parametrize("path", ROUTES["POST"])
def test_a_write_of_another_origin_is_refused(client: Client, path: str, origin: str) -> None:
    before = client.get("/api/songs").json()["rating"]
    body = b'{"song": 0, "rating": 1}'
    assert client.request("POST", path, [("origin", origin)], body).status == 403
    assert client.get("/api/songs").json()["rating"] == before


def test_a_write_without_an_origin_is_refused(client: Client) -> None:
    assert {client.request("POST", path, without_origin=True).status for path in ROUTES["POST"]} == {403}


@pytest.mark.parametrize(("method", "path"), ALL_ROUTES)
@pytest.mark.parametrize(
    "cookie", [None, "simsiam_dali_8710=wrong", f"other={TOKEN}", "simsiam_dali_8710=", "\xff=;;,"]
)
def test_without_the_token_every_route_is_refused(guarded: Client, method: str, path: str, cookie: str | None) -> None:
    headers = [("cookie", cookie)] if cookie else []
    assert guarded.request(method, path, headers).status == 401


@pytest.mark.parametrize("query", ["", "token=", "token=wrong", f"token={TOKEN}x", f"Token={TOKEN}", f"x={TOKEN}"])
def test_a_wrong_token_in_the_url_is_refused(guarded: Client, query: str) -> None:
    answer = guarded.get("/", query=query)
    assert answer.status == 401
    assert not answer.header("set-cookie")


def test_the_first_visit_sets_a_cookie_that_opens_the_rest(guarded: Client) -> None:
    first = guarded.get("/", query=f"token={TOKEN}")
    assert first.status == 200
    cookie, *attributes = first.header("set-cookie").split("; ")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(attributes)
    for path in ("/", "/static/main.js", "/api/songs", "/audio/0"):
        assert guarded.get(path, cookie=f"a=b; {cookie}").status == 200
    assert guarded.get("/api/songs", query=f"token={TOKEN}").status == 401  # on the page only: an URL may be shared


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
     ("192.168.1.5", False), ("nas.local", False), ("LocalHost", True)],
)  # fmt: skip
def test_which_hosts_need_a_token(host: str, local: bool) -> None:
    assert is_loopback(host) == local


@pytest.mark.parametrize(
    "path",
    ["/audio/../../etc/passwd", "/audio//etc/passwd", "/audio/%2e%2e%2fembeddings.parquet", "/audio/-1", "/audio/30",
     "/audio/1e0", "/static/../app.py", "/static//etc/passwd", "/static/../../embeddings.parquet", "//etc/passwd",
     "/static/..\\app.py", "/audio/0/../../x", "/audio/99999999999999999999"],
)  # fmt: skip
def test_paths_lead_to_no_file(client: Client, path: str) -> None:
    assert client.get(path).status in (404, 422)


@pytest.mark.parametrize("name", ["../mine", "/absolute/mine", ".hidden", "a/b", "", "a\0b", "\ud800", "x" * 201, " x"])
def test_a_playlist_stays_in_its_folder(client: Client, table: Path, name: str) -> None:
    before = sorted(os.walk(table.parent))
    assert client.post("/api/playlists", {"name": name, "songs": [1, 2]}).status in (409, 422)
    assert sorted(os.walk(table.parent)) == before


def test_a_link_out_of_the_music_folder_is_refused(tmp_path: Path) -> None:
    table = write_library(tmp_path, songs=3, seconds=0.3)
    music = tmp_path / "music"
    client = Client(table)
    files = [music / path for path in client.library.table["path"]]
    outside = files[0].rename(tmp_path / "secret.flac")
    files[0].symlink_to(outside)
    files[1].rename(music / "moved.mp3")
    files[1].symlink_to(music / "moved.mp3")
    assert client.get("/audio/0").status == 404
    assert b"leads out" in client.get("/audio/0").body
    assert client.get("/audio/1").status == 200  # a link inside
    files[0].unlink()
    files[0].symlink_to(files[0])
    assert client.get("/audio/0").status == 404
    files[2].unlink()
    files[2].mkdir()
    assert client.get("/audio/2").status == 404
    client.close()


def test_a_large_body_is_refused(client: Client) -> None:
    assert client.request("POST", "/api/ratings", [("content-length", str(MAX_BODY + 1))]).status == 413
    assert client.request("POST", "/api/ratings", [("content-length", "1e9")]).status == 413
    assert client.request("POST", "/api/radio", [], b"[" * (MAX_BODY + 1)).status == 413


STRANGE = (
    "", "\0", "..", "../" * 9, "%00", "\ud83d\ude00", "é", "9" * 400, "-0", "NaN", "1e999", "{}", "'", "\r\n",
    "x" * 5000,
)  # fmt: skip
METHODS = (*["GET"] * 6, *["POST"] * 5, "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "get", "X")
NAMES = (
    "start", "end", "count", "wav", "song", "rating", "seed", "without", "name", "songs", "replace", "token", "é",
)  # fmt: skip
NUMBERS = (
    "0", "1", "29", "30", "-1", "500", "501", "0.5", "null", "true", "NaN", "Infinity", "-1e400", '"1"', "[]", "{}",
    "9" * 30,
)  # fmt: skip
VALUES = (
    *NUMBERS, "[1,2]", "[1,-2]", '"a"', '"../a"', '"\\ud800"', '"\\u0000"', "[" * 2000, '"' + "n" * 300 + '"',
)  # fmt: skip
FORMS = {
    "/api/ratings": '{"song":%s,"rating":%s}',
    "/api/radio": '{"start":%s,"without":[%s]}',
    "/api/playlists": '{"songs":[%s],"name":%s}',
}
RANGES = ("0-", "-1", "5-2", "0-0", "0-9", "-0", "-", "a-b", "0-1,3-4", "9" * 30 + "-", "-" + "9" * 18, "1000000-")
CONTENT_TYPES = (*["application/json"] * 4, "text/plain", "multipart/form-data", "")
HEADERS = ("host", "origin", "cookie", "content-length", "if-range", "accept", "x")
HEADER_VALUES = ("", "a", HOST, "null", "0", "-5", "é", "x" * 3000, "a=b;;=", "\x00")


def fuzzed(rng: random.Random) -> tuple[str, str, list[tuple[str, str]], bytes, str]:
    """A request of which each part is right, a little wrong, or nonsense."""
    method, path = rng.choice(METHODS), rng.choice(rng.choice(list(ROUTES.values())))
    if rng.random() < 0.4:
        parts = path.split("/")
        parts[rng.randrange(len(parts))] = rng.choice(STRANGE)
        path = "/" + "/".join(parts)
    values = (*NUMBERS, "", "%", "%ff", "+")
    query = "&".join(f"{rng.choice(NAMES)}={rng.choice(values)}" for _ in range(rng.randrange(4)))
    query = f"start=1&end={rng.choice(['1', '2', 'x'])}" if rng.random() < 0.1 else query
    body = "{" + ",".join(f'"{rng.choice(NAMES)}":{rng.choice(VALUES)}' for _ in range(rng.randrange(5))) + "}"
    if path in FORMS and rng.random() < 0.7:
        body = FORMS[path] % (rng.choice(VALUES), rng.choice(VALUES))
    headers: list[tuple[str, str]] = []
    if method != "GET" and rng.random() < 0.9:
        headers.append(("content-type", rng.choice(CONTENT_TYPES)))
    if rng.random() < 0.3:
        headers.append(("range", f"{rng.choice(['bytes=', 'bytes = ', 'x='])}{rng.choice(RANGES)}"))
    if rng.random() < 0.2:
        headers.append((rng.choice(HEADERS), rng.choice(HEADER_VALUES)))
    raw = body.encode() if rng.random() < 0.9 else rng.randbytes(rng.randrange(60))
    return method, path, headers, raw if method != "GET" else b"", query


def test_ten_thousand_requests_of_nonsense_are_no_error(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    """No exception leaves the application (a server would answer 500 with a traceback), and no status is 500."""
    rng = random.Random(0)
    counts: dict[int, int] = {}
    for _ in range(10_000):
        wanted = fuzzed(rng)
        answer = client.request(*wanted)
        assert answer.status < 500, wanted
        counts[answer.status] = counts.get(answer.status, 0) + 1
    assert not caplog.records
    # It reaches beyond the first checks: songs are played in parts, found, rated and refused for many reasons.
    assert {200, 206, 403, 404, 405, 409, 413, 416, 421, 422} <= counts.keys()
    assert counts[200] > 500
