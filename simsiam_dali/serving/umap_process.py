"""UMAP of a table in a process of its own: python -m simsiam_dali.serving.umap_process TABLE OUT

Started by `positions`. It takes the lowest priority, so that the page stays quick, and ends when its standard input
does, that is with the process that started it.
"""

import os
import sys
import threading
from pathlib import Path

from simsiam_dali.common.files import sha256_of
from simsiam_dali.embedding.table import read_song_embeddings
from simsiam_dali.evaluation.maps import project_umap
from simsiam_dali.serving.positions import scaled_to_one, write_map


def end_with_parent() -> None:
    """Exit when standard input is closed."""
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Write the map of a table."""
    table, out = map(Path, sys.argv[1:])
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.nice(19)
    key = sha256_of(table)
    write_map(out, scaled_to_one(project_umap(read_song_embeddings(table).unit(), seed=0)), key)


if __name__ == "__main__":
    main()
