"""Several files in two folders replaced as one set: killed before any of its file-system calls, it is old or new."""

from pathlib import Path

import pytest
from helpers.kills import KILL_AT, run_forked

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.replacement import Replacement, finish_commit

REPLACE = """
import os, sys
from pathlib import Path
from simsiam_dali.common.replacement import Replacement
{kill}
home = Path(os.getcwd())
with Replacement(home / "table", [home / "lists"]) as replacement:
    for path in (home / "table", home / "lists/a", home / "lists/b"):
        replacement.stage(path).write_text("new")
    replacement.commit()
"""


def lay_out(home: Path) -> None:
    (home / "lists").mkdir()
    for name in ("table", "lists/a", "lists/.mine"):
        (home / name).write_text("old")


def state(home: Path) -> dict[str, str]:
    """Content of every file but the lock."""
    files = sorted(path for path in home.rglob("*") if path.is_file() and path.name != ".table.lock")
    return {str(path.relative_to(home)): path.read_text() for path in files}


OLD = {"table": "old", "lists/a": "old", "lists/.mine": "old"}
NEW = {"table": "new", "lists/a": "new", "lists/b": "new", "lists/.mine": "old"}


def test_killed_before_any_file_system_call_it_is_all_old_or_all_new(tmp_path: Path) -> None:
    outcomes = []
    for number in range(100):
        home = tmp_path / str(number)
        home.mkdir()
        lay_out(home)
        code = REPLACE.format(kill=KILL_AT.format(number=number, log=str(home / "events")))
        killed = run_forked(code, home)
        (home / "events").unlink()
        is_committed = (home / ".table.commit").exists()
        finish_commit(home / "table")
        with Replacement(home / "table", [home / "lists"]):
            pass  # removes what was not committed
        outcomes.append((killed, is_committed, state(home)))
        if not killed:
            break
    assert all(content in (OLD, NEW) for _, _, content in outcomes)
    assert outcomes[-1] == (False, False, NEW)
    assert outcomes[0] == (True, False, OLD)
    assert sum(is_committed for _, is_committed, _ in outcomes) >= 4  # before each of three moves, and before the end


def test_nothing_is_replaced_without_commit_and_a_second_one_is_refused(tmp_path: Path) -> None:
    lay_out(tmp_path)
    with Replacement(tmp_path / "table") as replacement:
        replacement.stage(tmp_path / "table").write_text("new")
        with pytest.raises(UserError, match=r"another refresh of .*table is running"), Replacement(tmp_path / "table"):
            pass
    assert state(tmp_path) == OLD


def test_a_damaged_journal_is_refused_in_one_line(tmp_path: Path) -> None:
    lay_out(tmp_path)
    (tmp_path / ".table.commit").write_text("[")
    with pytest.raises(UserError, match="is damaged"):
        finish_commit(tmp_path / "table")


def test_what_a_link_leads_to_is_replaced_and_keeps_its_permissions(tmp_path: Path) -> None:
    lay_out(tmp_path)
    (tmp_path / "synced").mkdir()
    (tmp_path / "synced/a").write_text("old")
    (tmp_path / "synced/a").chmod(0o600)
    (tmp_path / "lists/a").unlink()
    (tmp_path / "lists/a").symlink_to("../synced/a")
    with Replacement(tmp_path / "table", [tmp_path / "lists"]) as replacement:
        replacement.stage(tmp_path / "lists/a").write_text("new")
        replacement.commit()
    assert (tmp_path / "lists/a").is_symlink()
    assert (tmp_path / "synced/a").read_text() == "new"
    assert (tmp_path / "synced/a").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("drop", [True, False])
def test_behind_a_link_nothing_is_left_of_what_was_not_committed(tmp_path: Path, drop: bool) -> None:
    lay_out(tmp_path)
    (tmp_path / "synced").mkdir()
    (tmp_path / "lists/b").symlink_to("../synced/b")
    with Replacement(tmp_path / "table", [tmp_path / "lists"]) as replacement:
        staged = replacement.stage(tmp_path / "lists/b")
        staged.write_text("new")
        assert staged.parent == tmp_path / "synced"
        if drop:
            replacement.drop(tmp_path / "lists/b")
    assert not list((tmp_path / "synced").iterdir())
