"""Put the newest results into docs/experiments*.md: python benchmarks/real_music/tables.py --write

Each table stands on one of the pages, between two comments of its name. A result is the last file of its name in
benchmarks/results/real_music. One of them is drawn too.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import equal_time_scores
import figure
import halves
import pretrained
import shipped
import training_songs
from equal_time_scores import newest

from simsiam_dali.common.errors import UserError, one_line_errors

PAGES = tuple(halves.ROOT / "docs" / name for name in ("experiments.md", "experiments_equal_time.md"))
NOT_CHOSEN_ON = ("equal-time-report", "equal-time-held-out", "equal-time-fourth")
DRAWN, DRAWING = "within-songs-unheard", PAGES[0].with_name("real_music_differences.svg")
WITHIN_SONGS = ("within-songs-report", "within-songs-unheard")
COMPARISONS = (*WITHIN_SONGS, "within-songs-fifth", "equal-time-unheard", *NOT_CHOSEN_ON, "equal-time-choose")


@dataclass(frozen=True)
class Table:
    """results: the names of what it is made from. lines: from these, in their order."""

    results: tuple[str, ...]
    lines: Callable[..., Iterable[str]]


TABLES = {
    **{name: Table((name,), equal_time_scores.page_lines) for name in COMPARISONS},
    **{
        f"{name}-before": Table((name, name.replace("within-songs", "equal-time")), equal_time_scores.across_lines)
        for name in WITHIN_SONGS
    },
    "longer": Table(("longer", "within-songs-unheard"), equal_time_scores.longer_lines),
    "longer-losses": Table(("longer",), equal_time_scores.page_lines),
    "pretrained-unheard": Table(("pretrained-unheard", "within-songs-unheard"), pretrained.page_lines),
    "pretrained-fifth": Table(("pretrained-fifth", "within-songs-fifth"), pretrained.page_lines),
    "training-songs": Table(("training-songs", "within-songs-unheard"), training_songs.page_lines),
    "shipped": Table(("shipped", "within-songs-unheard"), shipped.page_lines),
    "together": Table(NOT_CHOSEN_ON, equal_time_scores.together_lines),
}


def with_tables(pages: Iterable[str]) -> list[str]:
    """The pages with the newest results' tables. Raises UserError unless each table stands on one of them."""
    made = list(pages)
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        places = [i for i, page in enumerate(made) if begin in page and end in page.partition(begin)[2]]
        if len(places) != 1:
            raise UserError(f"{begin.strip()} and {end} stand on {len(places)} pages of {', '.join(map(str, PAGES))}")
        head, _, rest = made[places[0]].partition(begin)
        lines = table.lines(*(json.loads(newest(result).read_text()) for result in table.results))
        made[places[0]] = head + begin + "".join(f"{line}\n" for line in lines) + end + rest.partition(end)[2]
    return made


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="write the pages")
    what.add_argument("--check", action="store_true", help="only see whether they are up to date; exit with 1 if not")
    args = parser.parse_args()
    before, drawn = [page.read_text() for page in PAGES], newest(DRAWN)
    pages = with_tables(before)
    if args.write:
        for path, page in zip(PAGES, pages, strict=True):
            path.write_text(page)
        figure.draw(json.loads(drawn.read_text()), drawn.name, DRAWING)
    elif pages != before or drawn.name not in DRAWING.read_text():
        raise UserError("docs/experiments*.md are out of date: run python benchmarks/real_music/tables.py --write")


if __name__ == "__main__":
    main()
