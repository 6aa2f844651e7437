"""Lines for the user beside a progress bar."""

import sys

from tqdm import tqdm


def print_line(line: str) -> None:
    """Print above a progress bar, and at once: a file or pipe would show the lines of the last hours at the end."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()
