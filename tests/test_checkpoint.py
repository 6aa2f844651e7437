"""A checkpoint is whole or refused: damage, kills and full disks while it is written, and pickles that would act."""

import hashlib
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fork_server
from helpers.checkpoints import state
from helpers.full_disk import fill, small_disk

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config
from simsiam_dali.training import checkpoint
from simsiam_dali.training.run import create_run_dir

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """The second of two checkpoints."""
    path = tmp_path / checkpoint.FILE_NAME
    checkpoint.save(state(1), path)
    checkpoint.save(state(2), path)
    return path


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_one_before_is_kept(two: Path) -> None:
    assert files(two.parent) == {checkpoint.FILE_NAME, checkpoint.PREVIOUS_NAME}
    assert checkpoint.load(two)["step"] == 2
    assert checkpoint.load(two.with_name(checkpoint.PREVIOUS_NAME))["step"] == 1


def test_its_shards_move_and_move_again_and_its_identity_stays(two: Path) -> None:
    checkpoint.save(state(2) | {"config": {"data": {"shards": "a", "threads": 1}, "encoder": {}}}, two)
    first, content = checkpoint.load(two), two.read_bytes()
    assert first["identity"] == hashlib.sha256(content).hexdigest()
    for place in (Path("b"), "s3://bucket/c"):
        checkpoint.move_shards(checkpoint.load(two), place, two)
        moved = checkpoint.load(two)
        assert moved["config"] == {"data": {"shards": str(place), "threads": 1}, "encoder": {}}
        assert (moved["identity"], moved["step"]) == (first["identity"], 2)
    assert two.read_bytes() != content


def test_on_a_disk_without_hard_links_too(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    checkpoint.save(state(3), two)
    assert checkpoint.load(two)["step"] == 3
    assert checkpoint.load(two.with_name(checkpoint.PREVIOUS_NAME))["step"] == 2


def test_any_flipped_bit_and_any_cut_is_found(two: Path) -> None:
    content = two.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        two.write_bytes(damaged)
        assert not checkpoint.is_intact(two), place
    for length in (*range(0, len(content) - 100, 11), *range(len(content) - 100, len(content))):
        two.write_bytes(content[:length])
        assert not checkpoint.is_intact(two), length
    two.write_bytes(content + b"\0")
    assert not checkpoint.is_intact(two)
    two.write_bytes(content)
    assert checkpoint.is_intact(two)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "something else"])
def test_a_damaged_one_is_refused_by_name_and_the_one_before_offered(two: Path, damage: str) -> None:
    content = bytearray(two.read_bytes())
    content[len(content) // 2] ^= 1
    pieces = {"flipped": bytes(content), "cut": bytes(content[:-100]), "empty": b""}
    two.write_bytes(pieces.get(damage, b"not a checkpoint"))
    previous = two.with_name(checkpoint.PREVIOUS_NAME)
    with pytest.raises(UserError) as e:
        checkpoint.load(two, "--checkpoint")
    assert f"checkpoint {two} is damaged" in str(e.value)
    assert str(e.value).endswith(f"; the checkpoint before it is intact: --checkpoint {previous}")
    assert "\n" not in str(e.value)
    assert checkpoint.find(str(previous), two.parent) == previous
    assert checkpoint.load(previous)["step"] == 1

    previous.write_bytes(b"")  # then it is no help
    with pytest.raises(UserError) as e:
        checkpoint.load(two)
    assert previous.name not in str(e.value)


def test_a_damaged_one_does_not_replace_the_good_one_before(two: Path) -> None:
    """The run goes on from the one before, and is killed right after its first save."""
    two.write_bytes(two.read_bytes()[:-1])
    checkpoint.save(state(3), two)
    assert checkpoint.load(two)["step"] == 3
    assert checkpoint.load(two.with_name(checkpoint.PREVIOUS_NAME))["step"] == 1


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"format_version": checkpoint.FORMAT_VERSION - 1}, "not a checkpoint of this version"),
        ({"format_version": checkpoint.FORMAT_VERSION}, "it lacks config, epoch"),
        ([1, 2], "not a checkpoint of this version"),
        (torch.zeros(2), "not a checkpoint of this version"),
    ],
)
def test_what_is_whole_but_no_checkpoint_is_refused(tmp_path: Path, content: Any, why: str) -> None:
    checkpoint.save(content, tmp_path / "c.pt")
    with pytest.raises(UserError, match=why):
        checkpoint.load(tmp_path / "c.pt")


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("kind", ["in torch's file", "bare pickle"])
@pytest.mark.parametrize("with_sum", [True, False])
def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path: Path, kind: str, with_sum: bool) -> None:
    path, proof = tmp_path / "c.pt", tmp_path / "done"
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(Malicious(proof)))
    else:
        torch.save(state(1) | {"config": Malicious(proof)}, path)
    with path.open("rb") as f:  # it would act, if it were let
        pickle.load(f) if kind == "bare pickle" else torch.load(f, weights_only=False)
    assert proof.exists()
    proof.unlink()
    if with_sum:
        content = path.read_bytes()
        path.write_bytes(content + b"\nsha256 " + hashlib.sha256(content).hexdigest().encode())
        assert checkpoint.is_intact(path)
    with pytest.raises(UserError, match=r"c\.pt is (not a checkpoint|damaged)"):
        checkpoint.load(path)
    assert not proof.exists()


@pytest.mark.parametrize("numbers", [20_000, 200_000])  # one that fits in a buffer of torch's, one that does not
def test_a_full_disk_keeps_the_last_good_one_and_is_reported(tmp_path: Path, numbers: int) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        path = disk / checkpoint.FILE_NAME
        checkpoint.save(state(1, numbers), path)
        checkpoint.save(state(2, numbers), path)
        filler = fill(disk)
        with pytest.raises(UserError) as e:
            checkpoint.save(state(3, numbers), path)
        assert str(e.value) == (
            f"cannot write the checkpoint {path} (No space left on device); the checkpoint before it is kept"
        )
        assert files(disk) == {checkpoint.FILE_NAME, checkpoint.PREVIOUS_NAME, "filler"}
        assert checkpoint.load(path)["step"] == 2
        filler.unlink()
        checkpoint.save(state(4, numbers), path)
        assert checkpoint.load(path)["step"] == 4


def test_a_limit_on_file_sizes_does_the_same(tmp_path: Path) -> None:
    """A real failure of writing for where nothing can be mounted."""
    path = tmp_path / checkpoint.FILE_NAME
    checkpoint.save(state(1), path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"File too large\); the checkpoint before it is kept"):
            checkpoint.save(state(2, 100_000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files(tmp_path) == {checkpoint.FILE_NAME}
    assert checkpoint.load(path)["step"] == 1


WRITER = """
import sys
from pathlib import Path
from helpers.checkpoints import state
from simsiam_dali.config.load import load_config
from simsiam_dali.training import checkpoint
from simsiam_dali.training.run import create_run_dir
step = int(sys.argv[2])
while True:
    checkpoint.save(state(step, 10_000_000), Path(sys.argv[1]))
    print(step, flush=True)
    step += 1
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    """SIGKILL four times, each while the file was growing; what was said to be saved is there, and the rest no harm."""
    path, step = tmp_path / checkpoint.FILE_NAME, 1
    left = 0
    for _ in range(4):
        args = [sys.executable, "-c", WRITER, str(path), str(step)]
        env = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        writer = subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=env)
        part = path.with_name(f".{path.name}.{writer.pid}.part")
        assert writer.stdout is not None
        assert int(writer.stdout.readline()) == step  # a left-over of the last kill did not hurt
        while writer.poll() is None and not (part.exists() and part.stat().st_size > 0):
            time.sleep(0.001)
        writer.kill()
        said = writer.communicate()[0].split()
        left += part.exists()
        saved = checkpoint.load(path)
        assert saved["step"] >= (int(said[-1]) if said else step)
        assert torch.equal(saved["learner"]["encoder"]["w"], torch.full((10_000_000,), float(saved["step"])))
        step = saved["step"] + 1
    assert left >= 2  # the others had just been renamed
    assert checkpoint.is_intact(path.with_name(checkpoint.PREVIOUS_NAME))
    checkpoint.save(state(step), path)
    create_run_dir(tmp_path, load_config())  # as a resumed run does
    assert files(tmp_path) == {checkpoint.FILE_NAME, checkpoint.PREVIOUS_NAME, "config.yaml"}


def test_a_run_continues_on_its_kind_of_device_only(tmp_path: Path, small_runs: dict[str, Path]) -> None:
    """A GPU's checkpoint on a host without one, by what it says of itself; and one from before it said it."""
    run_dir = Path(shutil.copytree(small_runs["simsiam"], tmp_path / "run"))
    path = run_dir / checkpoint.FILE_NAME
    saved = checkpoint.load(path)
    assert saved["device"] == "cpu"
    words = [sys.executable, "-m", "simsiam_dali.train", "--resume", str(run_dir), "--device"]

    checkpoint.save({**saved, "device": "cuda"}, path)
    done = fork_server.run([*words, "cpu"], tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {run_dir} was saved on cuda and cannot continue on cpu")
    assert line.endswith("resume with --device gpu, or start a new run")
    checkpoint.check_device({**saved, "device": "cuda"}, torch.device("cuda", 1), run_dir)

    del saved["device"]
    checkpoint.save(saved, path)
    assert "device" not in checkpoint.load(path)
    for device in ("cpu", "cuda"):
        checkpoint.check_device(saved, torch.device(device), run_dir)
    done = fork_server.run([*words, "auto"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
