"""The user's commands as the user would type them, and the demo: does it learn?"""

import re
import sys
from pathlib import Path

import pytest
from helpers import fork_server
from helpers.learned import unseen_segments_of_the_artist
from helpers.running import ROOT, records, run_tool

from simsiam_dali import cli, train
from simsiam_dali.config.load import ENVIRONMENT, load_config
from simsiam_dali.training.collapse import LOW_RANK

sys.path.insert(0, str(ROOT / "tools"))
sys.path.insert(0, str(ROOT / "benchmarks"))
import demo
import mutations
import throughput


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a part of the demo library as `music/`, where a user would stand."""
    folder = tmp_path_factory.mktemp("home")
    run_tool("make_demo_music.py", folder / "music", "--songs", 48)
    return folder


def ok(folder: Path, *command: object) -> str:
    """Run `python COMMAND` in `folder`; it must succeed. Returns what it printed."""
    done = fork_server.run([sys.executable, *map(str, command)], folder, dict.fromkeys(ENVIRONMENT))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def short_songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `music/` of 20 songs of 6 to 8 s, packed into `shards/` by the command as typed."""
    folder = tmp_path_factory.mktemp("short")
    run_tool("make_demo_music.py", folder / "music", "--songs", 20, "--seconds", 6, 8)
    assert "20 songs" in ok(folder, ROOT / "tools/make_shards.py", "music/")
    return folder


def test_training_with_an_encoder_type_and_nothing_else(short_songs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of configs/cpu.yaml, and a run in the current folder; one epoch of them here."""
    monkeypatch.chdir(short_songs)
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    words = ["--encoder-type", "simsiam"]
    chosen = train.new_run(train.build_parser().parse_args([*words, "--device", "cpu"]))[0]
    assert chosen == load_config(ROOT / "configs/cpu.yaml", command_line={"train.device": "cpu"})
    trained = ok(short_songs, "-m", "simsiam_dali.train", *words, "--epochs", 1)
    assert "simsiam resnet18 on cpu" in trained or "simsiam resnet50 on cuda" in trained
    assert (short_songs / "mlflow.db").exists()
    (run_dir,) = (short_songs / "runs").iterdir()
    assert (run_dir / "checkpoint.pt").exists()


def test_the_benchmark_without_options_measures_the_shards_beside_it(
    short_songs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stages that a CPU has, 60 s segments, five windows of 4 s; the command itself with two stages and 0.1 s."""
    monkeypatch.chdir(short_songs)
    args = throughput.build_parser().parse_args([])
    assert (args.device, args.windows, args.seconds) == ("auto", 5, 4.0)
    args.device = "cpu"
    plan = throughput.Bench(args).plan()
    assert [list(group) for group in plan] == [
        ["loader/read", "loader/decode", "loader/resample", "loader/mel"],
        ["loader/light", "baseline/light"],
        ["loader/all", "baseline/full"],
        ["loader/train", "model", "train"],
    ]
    sizes = {}
    for name, spec in {name: spec for group in plan for name, spec in group.items()}.items():
        data = spec.config.data
        assert isinstance(data.shards, Path)
        assert data.shards.resolve() == short_songs / "shards"
        sizes[name] = data.view_seconds, spec.config.encoder.batch_size, data.threads
    training = {name: sizes.pop(name) for name in ("loader/train", "model", "train")}
    assert set(sizes.values()) == {(60.0, 16, 2)}
    assert set(training.values()) == {(5.0, 16, 2)}
    quick = ("--stages", "loader/all", "train", "--seconds", 0.1, "--windows", 2, "--batch-size", 4)
    measured = ok(short_songs, ROOT / "benchmarks/throughput.py", *quick)
    assert re.search(r"loader/all\s.*\d", measured)
    assert re.search(r"train\s.*\d", measured)


@pytest.mark.faults
@pytest.mark.whole  # eight minutes: the benchmark measures all its stages, four seconds a window
def test_the_three_named_commands(home: Path) -> None:
    """Nothing beyond the arguments the user wrote, in a folder that holds only `music/`."""
    packed = ok(home, ROOT / "tools/make_shards.py", "music/")
    assert "48 songs" in packed
    trained = ok(home, "-m", "simsiam_dali.train", "--encoder-type", "simsiam")
    assert "simsiam resnet18 on cpu" in trained or "simsiam resnet50 on cuda" in trained
    assert (home / "mlflow.db").exists()
    (run_dir,) = (home / "runs").iterdir()
    assert (run_dir / "checkpoint.pt").exists()
    measured = ok(home, ROOT / "benchmarks/throughput.py")
    assert re.search(r"loader/all\s.*\d", measured)
    assert re.search(r"train\s.*\d", measured)


@pytest.fixture(scope="module")
def demo_shards(home: Path) -> Path:
    """The same songs packed as `make demo` packs them."""
    run_tool("make_shards.py", home / "music", "--out", home / "demo_shards", *demo.PACKING)
    return home / "demo_shards"


def train_demo(home: Path, demo_shards: Path, encoder_type: str, *options: object) -> Path:
    """A run with the demo's settings; its folder."""
    settings = ("--config", ROOT / "configs/demo.yaml", "--encoder-type", encoder_type, "--shards", demo_shards)
    ok(
        home,
        "-m",
        "simsiam_dali.train",
        *settings,
        "--run-name",
        encoder_type,
        "--set",
        "mlflow.enabled=false",
        *options,
    )
    return home / "runs" / encoder_type


@pytest.mark.faults
@pytest.mark.whole  # three minutes on two cores that do nothing else
def test_the_demo_convinces(tmp_path: Path) -> None:
    """Trained is told apart from untrained and from MFCCs, nothing collapses, and what is named exists."""
    end = run_tool("demo.py", tmp_path)
    interval = r"\([+-]\d+, 95% interval ([+-]\d+) to [+-]\d+\)"
    pattern = (
        rf"^the nearest song is by the same artist for (\d+) of 192 songs; \d+ with the untrained encoder {interval},"
        rf" \d+ with MFCCs {interval}$"
    )
    found = re.search(pattern, end, re.MULTILINE)
    assert found is not None, end
    assert int(found[1]) > 96
    assert int(found[2]) > 0
    assert int(found[3]) > 0
    assert len(re.findall(r"^\d+ +0\.\d{3} +.* - ", end, re.MULTILINE)) == demo.NEIGHBOURS
    paths = dict(re.findall(r"^(report|map|playlist|log) +(\S+)$", end, re.MULTILINE))
    assert len(paths) == 4
    assert all(Path(path).stat().st_size for path in paths.values())

    epochs = [r for r in records(Path(paths["playlist"]).parent) if "epoch" in r]
    d = load_config(ROOT / "configs/demo.yaml").encoder.simsiam.projection_dim
    assert min(r["encoder/z_std"] for r in epochs[1:]) >= 0.5 / d**0.5
    # Batch norm keeps z-std up even in a collapse to one direction; the rank, 4.7 or more here, sees that.
    assert min(r["encoder/effective_rank"] for r in epochs[1:]) >= 1.5 * LOW_RANK


@pytest.mark.faults
@pytest.mark.whole  # a minute; test_encoders.py has the training songs of a small library
def test_simple_beats_its_untrained_self_on_the_demo(home: Path, demo_shards: Path) -> None:
    """It has seen the training songs' artists, so only validation songs count: each of their segments asks for one."""
    run_dir = train_demo(home, demo_shards, "simple", "--epochs", 40, "--batch-size", 16)
    untrained, trained = (unseen_segments_of_the_artist(run_dir, demo_shards, trained) for trained in (False, True))
    assert trained >= untrained + 0.03


REFUSED = {
    "pack": ("nowhere",),
    "train": ("--shards", "nowhere"),
    "hpo": ("--shards", "nowhere"),
    "embed": ("--checkpoint", "nowhere"),
    "evaluate": ("--embeddings", "nowhere.parquet"),
    "compare": ("--tracking-uri", "sqlite:///nowhere.db"),
    "recommend": ("--embeddings", "nowhere.parquet", "--top"),
    "refresh": ("nowhere",),
    "serve": ("nowhere.parquet",),
    "export": ("--checkpoint", "nowhere"),
    "benchmark": ("--shards", "nowhere"),
}


def test_each_command_has_its_refusal() -> None:
    assert REFUSED.keys() == set(cli.COMMANDS)


@pytest.mark.parametrize("command", REFUSED)
def test_a_refusal_is_status_1_and_one_line_of_a_process(command: str, tmp_path: Path) -> None:
    """What the tests of each command take for granted where they call its `main`."""
    start = [ROOT / "benchmarks/throughput.py"] if command == "benchmark" else ["-m", f"simsiam_dali.{command}"]
    done = fork_server.run([sys.executable, *start, *REFUSED[command]], tmp_path, dict.fromkeys(ENVIRONMENT))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "nowhere" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_every_command_and_link_of_a_page_exists(name: str) -> None:
    """Make targets, scripts, modules and links are there."""
    page = (ROOT / name).read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", page, re.MULTILINE):
        assert f"\n{target}:" in makefile, target
    for script in re.findall(r"python (\S+\.py)", page):
        assert (ROOT / script).is_file(), script
    for module in re.findall(r"-m (simsiam_dali\.\w+)", page):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", page):
        assert ((ROOT / name).parent / link).exists(), link


def test_the_generated_tables_are_up_to_date() -> None:
    ok(ROOT, "tools/make_docs.py", "--check")


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_mutation_has_its_line_and_its_tests(mutation: mutations.Mutation) -> None:
    """Or a change of the code would leave it behind, to be found when all of them are run."""
    assert (ROOT / "simsiam_dali" / mutation.file).read_text().count(mutation.before) == 1
    tests = [word.partition("::")[0] for word in mutation.tests.split() if word.startswith("tests/")]
    assert tests
    assert all((ROOT / test).exists() for test in tests)
