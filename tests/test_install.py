"""The wheel, installed where there is no checkout: does it hold what the commands need?"""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from helpers.running import ROOT

from simsiam_dali import cli
from simsiam_dali.config.load import ENVIRONMENT

FOLDERS = ("simsiam_dali", "configs", "benchmarks", "tools")
TINY = (
    "data.threads=2", "data.view_seconds=2", "encoder.epochs=1", "encoder.batch_size=8", "encoder.simsiam.n_mels=32",
    "encoder.simsiam.augmentation.frequency_mask_param=8", "encoder.simsiam.augmentation.time_mask_param=10",
    "train.compile=false", "mlflow.enabled=false",
)  # fmt: skip
WITHOUT_DALI = """
import sys

class NoDali:
    def find_spec(self, name, path=None, target=None):
        if name == "nvidia.dali":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoDali())
"""


def finished(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in an environment that leads neither to the checkout nor to other settings."""
    hidden = {"PYTHONPATH", "PYTHONHOME", *ENVIRONMENT}
    env = {k: v for k, v in os.environ.items() if k not in hidden} | variables
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=env)


def ok(*command: object, cwd: Path, **variables: str) -> str:
    """Run a command that must succeed; what it printed."""
    done = finished(*command, cwd=cwd, **variables)
    assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves folders in its source."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = ("wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder / "dist")
    ok(sys.executable, "-m", "pip", *build, folder / "source", cwd=folder)
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def bin_dir(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The programs of a new virtual environment that holds the wheel, and sees the packages of the running one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True)
    bin_dir = folder / "venv" / "bin"
    install = ("install", "--quiet", "--no-deps", "--no-index", wheel)
    ok(sys.executable, "-m", "pip", "--python", bin_dir / "python", *install, cwd=folder)
    # Only paths: .pth files in those folders, such as an editable install's, are not read.
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "running.pth").write_text("".join(f"{p}\n" for p in sys.path if p.endswith("-packages")))
    return bin_dir


def test_the_wheel_holds_every_file_of_the_package_and_what_lies_beside_it(wheel: Path) -> None:
    expected = {f.relative_to(ROOT).as_posix() for f in (ROOT / "simsiam_dali").rglob("*") if f.is_file()}
    for name, pattern in (("configs", "*.yaml"), ("benchmarks", "*.py"), ("tools", "*.py")):
        expected |= {f"simsiam_dali/{name}/{f.name}" for f in (ROOT / name).glob(pattern)}
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in expected if "__pycache__" not in name} == {n for n in held if ".dist-info/" not in n}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)


def test_the_commands_work_without_a_checkout(bin_dir: Path, tmp_path: Path, small_shards: Path) -> None:
    program, music = bin_dir / "simsiam-dali", small_shards.parent / "music"
    where = ok(bin_dir / "python", "-c", "import simsiam_dali; print(simsiam_dali.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(bin_dir.parent)

    packing = ("--segment-seconds", 3, "--min-seconds", 2, "--val-fraction", 0.25, "--workers", 2)
    assert "16 songs" in ok(program, "pack", music, *packing, cwd=tmp_path)
    sets = [word for assignment in TINY for word in ("--set", assignment)]
    trained = ok(program, "train", "--config", "cpu", "--device", "cpu", "--run-name", "one", *sets, cwd=tmp_path)
    assert str(bin_dir.parent) in trained.splitlines()[0]  # the packaged cpu.yaml
    assert (tmp_path / "runs" / "one" / "checkpoint.pt").exists()
    ok(program, "embed", "--checkpoint", "one", "--device", "cpu", cwd=tmp_path)
    song = next(iter(sorted(music.rglob("*.flac"))))
    listed = ok(program, "recommend", "--like", song, "--count", 3, "--csv", "like.csv", cwd=tmp_path)
    assert len((tmp_path / "like.csv").read_text().splitlines()) == 4, listed


def test_the_benchmark_works_without_a_checkout(bin_dir: Path, tmp_path: Path, small_shards: Path) -> None:
    """Its modules are no package, and each of its stages is a process that imports them anew."""
    program = bin_dir / "simsiam-dali"
    assert "--sweep" in ok(program, "benchmark", "--help", cwd=tmp_path)
    options = ("--device", "cpu", "--windows", 1, "--seconds", 0.1, "--batch-size", 4, "--threads", 1)
    stages = ("--stages", "loader/read", "baseline/light")
    measured = ok(program, "benchmark", "--shards", small_shards, *stages, *options, cwd=tmp_path)
    assert "loader/read" in measured
    assert "baseline/light" in measured


@pytest.mark.parametrize("started", [("simsiam_dali", "train"), ("simsiam_dali.train",), ("simsiam_dali.hpo",)])
def test_without_dali_one_line_says_which_extra_brings_it(
    bin_dir: Path, tmp_path: Path, started: tuple[str, ...]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_DALI)
    done = finished(bin_dir / "python", "-m", *started, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: DALI is not installed: pip install '.[cuda13]' in a checkout")
    assert done.stderr.count("\n") == 1


def test_the_other_commands_need_no_dali(bin_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_DALI)
    modules = ", ".join(f"simsiam_dali.{name}" for name in ("pack", "evaluate", "recommend", "compare", "export"))
    load = f"import {modules}; simsiam_dali.load_encoder"
    ok(bin_dir / "python", "-c", load, cwd=tmp_path, PYTHONPATH=str(tmp_path))


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "benchmark"])
def test_a_command_names_itself_as_it_was_called(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/simsiam-dali", command, "--help"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert capsys.readouterr().out.startswith(f"usage: simsiam-dali {command} [-h]")


def test_the_help_lists_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["simsiam-dali", "--help"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} {summary}" in shown for name, summary in cli.COMMANDS.items())


def test_a_config_file_may_be_named_without_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from simsiam_dali.common.shipped import config_file

    assert config_file("cpu") == ROOT / "configs" / "cpu.yaml"
    assert config_file("configs/cpu") == Path("configs/cpu")
    assert config_file("nothing") == Path("nothing")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cpu").write_text("# the user's own comes first\n")
    assert config_file("cpu") == Path("cpu")
