"""The playlists of the page, which `recommend --save` and `refresh` know too: see `recommendation.saved`."""

from collections.abc import Sequence
from pathlib import Path

from simsiam_dali.common.errors import UserError
from simsiam_dali.recommendation.choose import Request, choose
from simsiam_dali.recommendation.saved import read_saved, save
from simsiam_dali.serving.library import ServedLibrary


class Playlists:
    """The saved playlists of `folder`, which need not be there yet."""

    def __init__(self, folder: Path, library: ServedLibrary) -> None:
        self._folder, self._library = folder, library

    def names(self) -> list[str]:
        """Names of the playlists. Raises UserError where one is damaged."""
        return [saved.name for saved in read_saved(self._folder)]

    def songs(self, name: str) -> list[int] | None:
        """Rows of a playlist's songs, as they are chosen now; None where there is no such playlist."""

    def save(self, name: str, rows: Sequence[int], replace: bool) -> list[str]:
        """Save songs under a name; returns the names of the files. Raises UserError where that is refused."""
