"""run_music_pipeline.sh: what each stage runs, with which options, and what it says when something is missing."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.running import ROOT

SCRIPT = ROOT / "run_music_pipeline.sh"
STAGES = ("all", "shards", "encoder", "classifier", "recommend", "hpo", "compare", "demo")

STUB = f"""#!{sys.executable}
import json, os, pathlib, sys
args = sys.argv[1:]
with open(os.environ["CALLS"], "a") as f:
    f.write(json.dumps(args) + "\\n")
run = pathlib.Path("runs/trained")
if "simsiam_dali.train" in args:
    run.mkdir(parents=True, exist_ok=True)
    (run / "checkpoint.pt").touch()
    (run / "config.yaml").write_text("encoder:\\n  encoder_type: simple\\n")
if "simsiam_dali.embed" in args:
    pathlib.Path(args[args.index("--out") + 1]).touch()
if args and args[0].endswith("make_shards.py"):
    pathlib.Path("shards").mkdir(exist_ok=True)
    pathlib.Path("shards/manifest.json").touch()
sys.exit("--top" in args)
"""


class Shell:
    """A folder to stand in, and a python that writes down how it was called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "calls"
        self.python = folder / "stub"
        self.python.write_text(STUB)
        self.python.chmod(0o755)

    def run(self, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        env = {k: v for k, v in os.environ.items() if k not in ("ENCODER_TYPE", "MLFLOW_TRACKING_URI")}
        env |= {"PYTHON": str(self.python), "CALLS": str(self.log), **environment}
        return subprocess.run([str(SCRIPT), *args], cwd=self.folder, env=env, capture_output=True, text=True)

    def calls(self, *args: str, **environment: str) -> list[list[str]]:
        """How python was called by a stage that succeeds, module or script first."""
        done = self.run(*args, **environment)
        assert done.returncode == 0, done.stderr
        return [
            [w.removeprefix(f"{ROOT}/") for w in json.loads(line) if w != "-m"]
            for line in self.log.read_text().splitlines()
        ]

    def refusal(self, *args: str, **environment: str) -> str:
        """The one line that ended a stage before it ran anything."""
        done = self.run(*args, **environment)
        assert done.returncode == 1
        assert self.log.read_text() == ""
        (line,) = done.stderr.splitlines()
        return line

    def touch(self, *paths: str) -> None:
        for path in paths:
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).touch()

    def make_run(self, name: str, encoder_type: str, age: int, *files: str) -> None:
        """A run whose files are `age` seconds old."""
        for file in files:
            self.touch(f"runs/{name}/{file}")
            now = (ROOT / "README.md").stat().st_mtime
            os.utime(self.folder / f"runs/{name}/{file}", (now - age, now - age))
        (self.folder / f"runs/{name}/config.yaml").write_text(f"encoder:\n  encoder_type: {encoder_type}\n")


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_help_names_every_stage(shell: Shell) -> None:
    done = shell.run("--help")
    assert done.returncode == 0
    assert all(f"\n  {stage} " in done.stdout for stage in STAGES)
    assert "ENCODER_TYPE" in done.stdout
    bare = shell.run()
    assert (bare.returncode, bare.stdout) == (2, "")
    assert "usage:" in bare.stderr


def test_an_unknown_stage_is_refused_and_the_known_ones_named(shell: Shell) -> None:
    done = shell.run("encode")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no stage encode: ")
    assert all(stage in done.stderr for stage in STAGES)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["shards"], "name the folder of your songs"),
        (["all"], "name the folder of your songs first"),
        (["all", "--epochs", "2"], "name the folder of your songs first"),
        (["encoder"], "no shards in shards/: run SELF shards MUSIC_DIR first"),
        (["encoder", "--shards", "other"], "no shards in other/: run SELF shards MUSIC_DIR first"),
        (["hpo", "--shards=other"], "no shards in other/: run SELF shards MUSIC_DIR first"),
        (["classifier"], "no trained encoder in runs/: run SELF encoder first"),
        (["classifier", "--encoder-type", "simple"], "no trained encoder of type simple in runs/"),
        (["classifier", "--checkpoint", "absent"], "no checkpoint in runs/absent: run SELF encoder first"),
        (["recommend", "--top"], "no embedded songs in runs/: run SELF classifier first"),
        (["compare"], "no runs in mlflow.db: run SELF encoder first"),
        (["demo", "--fast"], "demo takes no options"),
    ],
)
def test_a_missing_input_names_the_stage_that_makes_it(shell: Shell, args: list[str], expected: str) -> None:
    assert shell.refusal(*args).startswith(f"error: {expected.replace('SELF', str(SCRIPT))}")


def test_options_are_passed_on_as_they_are(shell: Shell) -> None:
    shell.touch("shards/manifest.json", "mlflow.db", "my music/a.ogg")
    assert shell.calls("shards", "my music", "--workers", "2") == [
        ["tools/make_shards.py", "my music", "--workers", "2"]
    ]
    options = ["--encoder-type", "simple", "--set", "train.run_name=a b", "--resume"]
    assert shell.calls("encoder", *options) == [["simsiam_dali.train", *options]]
    assert shell.calls("hpo", "--trials", "3") == [["simsiam_dali.hpo", "--trials", "3"]]
    assert shell.calls("compare", "--by", "knn/genre") == [["simsiam_dali.compare", "--by", "knn/genre"]]
    assert shell.calls("hpo", "--help") == [["simsiam_dali.hpo", "--help"]]


def test_shards_on_s3_are_left_to_the_command(shell: Shell) -> None:
    options = ["--shards", "s3://bucket/prefix"]
    assert shell.calls("encoder", *options) == [["simsiam_dali.train", *options]]


def test_settings_may_name_inputs_that_the_script_does_not_know(shell: Shell) -> None:
    for options in (["--config", "my.yaml"], ["--set", "data.shards=there"], ["--resume"]):
        assert shell.calls("encoder", *options) == [["simsiam_dali.train", *options]]
    for options in (["--tracking-uri", "http://there"], ["--set", "mlflow.tracking_uri=http://there"]):
        assert shell.calls("compare", *options) == [["simsiam_dali.compare", *options]]
    assert shell.calls("compare", MLFLOW_TRACKING_URI="http://there") == [["simsiam_dali.compare"]]


def test_the_classifier_embeds_and_evaluates_the_newest_run_of_the_type(shell: Shell) -> None:
    shell.make_run("old", "simsiam", 300, "checkpoint.pt")
    shell.make_run("new", "simsiam", 200, "checkpoint.pt")
    shell.make_run("newest", "simple", 100, "checkpoint.pt")

    def expected(run: str, embed: tuple[str, ...] = (), evaluate: tuple[str, ...] = ()) -> list[list[str]]:
        table = f"{run}/embeddings.parquet"
        return [
            ["simsiam_dali.embed", "--checkpoint", run, "--out", table, "--baselines", f"{run}/baselines", *embed],
            ["simsiam_dali.evaluate", "--embeddings", table, "--out", f"{run}/evaluation", *evaluate],
        ]

    assert shell.calls("classifier") == expected("runs/newest")
    assert shell.calls("classifier", ENCODER_TYPE="simsiam") == expected("runs/new")
    assert shell.calls("classifier", "--encoder-type", "simple", ENCODER_TYPE="simsiam") == expected("runs/newest")
    for name in ("old", "runs/old", "runs/old/checkpoint.pt"):
        assert shell.calls("classifier", f"--checkpoint={name}") == expected("runs/old")
    options = ("--k", "3", "--device=cpu", "--replace", "--no-maps", "--threads", "2")
    assert shell.calls("classifier", *options) == expected(
        "runs/newest",
        embed=("--device", "cpu", "--replace", "--threads", "2"),
        evaluate=("--k", "3", "--replace", "--no-maps"),
    )


def test_a_second_classifier_says_how_to_evaluate_again(shell: Shell) -> None:
    shell.make_run("my run", "simsiam", 0, "checkpoint.pt", "evaluation/report.html")
    done = shell.run("classifier", "--k", "3")
    assert done.returncode == 1
    (call,) = shell.log.read_text().splitlines()
    assert "simsiam_dali.embed" in call
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: runs/my run/evaluation holds an evaluation already, and the embeddings are up to")
    words = shlex.split(line[line.index("as in ") + 6 :])
    assert words == [str(SCRIPT), "classifier", "--checkpoint", "runs/my run", "--replace"]
    assert "--replace" in shell.calls(*words[1:])[1]
    assert shell.calls("classifier", "--out", "second")[1][-2:] == ["--out", "second"]
    assert shell.calls("classifier", "--out=second")[1][-2:] == ["--out", "second"]


def test_recommend_uses_the_newest_embedded_run_of_the_type_or_the_given_table(shell: Shell) -> None:
    shell.make_run("one", "simsiam", 200, "embeddings.parquet")
    shell.make_run("two", "simple", 100, "embeddings.parquet")
    like = ["--like", "a song"]
    for run, args, environment in (
        ("two", [], {}),
        ("one", [], {"ENCODER_TYPE": "simsiam"}),
        ("one", ["--encoder-type=simsiam"], {}),
        ("two", ["--encoder-type", "simple"], {"ENCODER_TYPE": "simsiam"}),
    ):
        table = ["--embeddings", f"runs/{run}/embeddings.parquet"]
        assert shell.calls("recommend", *args, *like, **environment) == [["simsiam_dali.recommend", *table, *like]]
    given = ["--embeddings", "mine.parquet", *like]
    assert shell.calls("recommend", *given) == [["simsiam_dali.recommend", *given]]


def test_all_runs_the_stages_in_their_order_and_does_without_ratings(shell: Shell) -> None:
    modules = shell.calls("all", "music", "--encoder-type", "simple", "--epochs", "2")
    assert modules == [
        ["tools/make_shards.py", "music"],
        ["simsiam_dali.train", "--encoder-type", "simple", "--epochs", "2"],
        ["simsiam_dali.embed", "--checkpoint", "runs/trained", "--out", "runs/trained/embeddings.parquet",
         "--baselines", "runs/trained/baselines"],
        ["simsiam_dali.evaluate", "--embeddings", "runs/trained/embeddings.parquet", "--out",
         "runs/trained/evaluation"],
        ["simsiam_dali.recommend", "--embeddings", "runs/trained/embeddings.parquet", "--top"],
    ]  # fmt: skip


def test_all_gives_the_ratings_to_the_packer(shell: Shell) -> None:
    for given in (["--ratings", "my ratings.csv"], ["--ratings=my ratings.csv"]):
        packer, training = shell.calls("all", "music", *given, "--epochs", "2")[:2]
        assert packer == ["tools/make_shards.py", "music", "--ratings", "my ratings.csv"]
        assert training == ["simsiam_dali.train", "--epochs", "2"]
    assert shell.refusal("all", "music", "--ratings") == "error: --ratings needs a value"


def test_a_script_that_is_updated_during_a_stage_ends_with_it(shell: Shell, tmp_path: Path) -> None:
    script = tmp_path / "pipeline.sh"
    script.write_text(SCRIPT.read_text())
    shell.python.write_text(f"#!{sys.executable}\nopen({str(script)!r}, 'a').write('echo of the newer version')\n")
    env = os.environ | {"PYTHON": str(shell.python)}
    done = subprocess.run(["bash", script, "compare", "--help"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert script.read_text().endswith("newer version")


def test_a_failing_stage_ends_all(shell: Shell) -> None:
    shell.python.write_text(f"#!{sys.executable}\nimport os\nopen(os.environ['CALLS'], 'a').write('x')\nexit(3)\n")
    assert shell.run("all", "music").returncode == 3
    assert shell.log.read_text() == "x"


def test_the_package_is_found_from_anywhere(tmp_path: Path) -> None:
    """From another folder, without PYTHONPATH, through a link."""
    link = tmp_path / "pipeline"
    link.symlink_to(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHON": sys.executable}
    done = subprocess.run([str(link), "compare", "--help"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--include-trials" in done.stdout


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not there")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
