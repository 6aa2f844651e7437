"""Files are written whole: through a link, and with the permissions of the file that they replace."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.files import atomic_write, refuse_unwritable, replace_files

SHM = Path("/dev/shm")


def test_what_a_link_leads_to_is_written_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "synced").mkdir()
    target, link = tmp_path / "synced/ratings.csv", tmp_path / "ratings.csv"
    target.write_text("old")
    link.symlink_to("synced/ratings.csv")
    with atomic_write(link) as part:
        part.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert [*target.parent.iterdir()] == [target]


def test_a_link_to_nothing_yet_creates_its_target(tmp_path: Path) -> None:
    (tmp_path / "synced").mkdir()
    link = tmp_path / "ratings.csv"
    link.symlink_to(tmp_path / "synced/ratings.csv")
    with atomic_write(link) as part:
        part.write_text("new")
    assert link.is_symlink()
    assert (tmp_path / "synced/ratings.csv").read_text() == "new"


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_a_replaced_file_keeps_its_permissions(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "ratings.csv"
    path.write_text("old")
    path.chmod(mode)
    with atomic_write(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == mode


def test_a_set_of_files_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    replace_files(folder, {"a": b"1", "b": b"1", "last": b"1"})
    (folder / "mine").write_bytes(b"mine")
    replace_files(folder, {"a": b"2", "last": b"2"}, gone=["b", "never"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"2", "last": b"2", "mine": b"mine"}


def test_a_set_of_files_is_written_where_a_link_leads(tmp_path: Path) -> None:
    """Also to another file system, onto which no file can be moved."""
    if not SHM.exists() or SHM.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system")
    with TemporaryDirectory(dir=SHM) as disk:
        (tmp_path / "link").symlink_to(disk)
        for content in (b"1", b"2"):
            replace_files(tmp_path / "link", {"a": content, "last": content})
            assert {path.name: path.read_bytes() for path in Path(disk).iterdir()} == {"a": content, "last": content}


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    refuse_unwritable(tmp_path / "not" / "there yet")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in (Path("/proc/here"), tmp_path / "file/out", tmp_path / "link", tmp_path / "link/out"):
        with pytest.raises(UserError, match=f"cannot write {place}"):
            refuse_unwritable(place)
