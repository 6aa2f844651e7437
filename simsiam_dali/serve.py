"""Listen to the library on a local page: python -m simsiam_dali.serve [EMBEDDINGS] --music DIR

Shows the songs of an embedding table as a map in the browser: search, play, nearest songs, paths, radio, a queue, and
ratings from 0 to 5. Ratings are kept in a CSV that simsiam_dali.pack --ratings reads, and queues as playlists. Only
this machine reaches the page, unless --host names another address; then its URL ends with a token.
"""

import argparse
import errno
import gc
import logging
import re
import secrets
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from simsiam_dali.common.errors import UserError, one_line_errors, printable
from simsiam_dali.config.cli import create_parser
from simsiam_dali.embedding.table import read_song_embeddings

_TOKEN = re.compile(r"[A-Za-z0-9_-]{8,200}")


def port_number(text: str) -> int:
    """The type of --port; 0 takes a free one."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line; the table in docs/commands.md is made from it."""
    parser = create_parser("serve", __doc__)
    add = parser.add_argument
    add("embeddings", nargs="?", type=Path, default=Path("embeddings.parquet"), metavar="EMBEDDINGS",
        help="table written by python -m simsiam_dali.embed (default: %(default)s)")  # fmt: skip
    add("--music", type=Path, metavar="DIR", help="the music folder (default: the one that was packed)")
    add("--host", default="127.0.0.1", metavar="ADDRESS",
        help="address to listen on (default: %(default)s, which only this machine reaches)")  # fmt: skip
    add("--port", type=port_number, default=8710, metavar="N",
        help="port to listen on, 0 = any free one (default: %(default)s)")  # fmt: skip
    add("--token", nargs="?", const="", metavar="TOKEN",
        help="require this token, 8 to 200 letters, digits, - and _; without a value a generated one (default: none on "
        "this machine's own address, a generated one on any other --host)")  # fmt: skip
    add("--playlists", type=Path, default=Path("playlists"), metavar="DIR",
        help="folder of the saved playlists (default: %(default)s)")  # fmt: skip
    add("--ratings", type=Path, default=Path("ratings.csv"), metavar="FILE",
        help="CSV that ratings are read from and written to (default: %(default)s)")  # fmt: skip
    return parser


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError if the address or the port is not available."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as e:
        in_use = e.errno == errno.EADDRINUSE
        what = "is in use: choose another --port" if in_use else f"is not available ({e.strerror})"
        raise UserError(f"port {port} of {host} {what}") from e
    return listening


def chosen_token(given: str | None, is_local: bool) -> str | None:
    """The token to ask for; None for none. Raises UserError for one that is short or does not go into a URL."""
    if given and not _TOKEN.fullmatch(given):
        raise UserError("--token has 8 to 200 letters, digits, - and _")
    if given is None and is_local:
        return None
    return given or secrets.token_urlsafe(24)


def run(args: argparse.Namespace) -> None:
    """Serve until Ctrl-C."""
    from simsiam_dali.serving.security import Address, is_loopback  # with the rest below, after the parser's --help

    token = chosen_token(args.token, is_loopback(args.host))
    listening = listen(args.host, args.port)
    gc.disable()  # until all songs are read: to look for garbage among them takes longer than to read them
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_song_embeddings, args.embeddings)
        import uvicorn  # while the table is read

        from simsiam_dali.serving.app import create_app
        from simsiam_dali.serving.library import ServedLibrary
        from simsiam_dali.serving.security import Guard

        songs = reading.result()
    music = (args.music or Path(songs.provenance.get("music", ""))).resolve()
    if not music.is_dir():
        raise UserError(f"no music folder {music}: name it with --music")
    address = Address(args.host, listening.getsockname()[1])
    library = ServedLibrary(args.embeddings, songs, music, args.ratings)
    app = Guard(create_app(library, args.playlists), address, token)
    query = f"?token={token}" if token else ""
    found = f"{len(library)} songs, {library.files_found()} of their files found in {printable(str(music))}"
    gc.freeze()
    gc.enable()
    print(f"{address.url}{query} serves {found}; Ctrl-C ends it", flush=True)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, lifespan="off", ws="none", http="h11",
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    # At Ctrl-C, songs that browsers are still reading are cut off: uvicorn would report each of them as an error.
    logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        print(file=sys.stderr)  # behind the ^C of the terminal
    finally:
        library.close()


@one_line_errors
def main() -> None:
    """The command."""
    run(build_parser().parse_args())


if __name__ == "__main__":
    main()
