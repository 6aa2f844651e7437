"""The user's commands as the user would type them, and the demo: does it learn?"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import ROOT, run_tool

from simsiam_dali import checkpoint, config, factory, monitor
from simsiam_dali.data.shards import open_shards
from simsiam_dali.distributed import World
from simsiam_dali.labels import label_ids


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo library as `music/`, where a user would stand."""
    folder = tmp_path_factory.mktemp("home")
    run_tool("make_demo_music.py", folder / "music")
    return folder


def ok(folder: Path, *command: object) -> str:
    """Run `python COMMAND` in `folder`; it must succeed. Returns what it printed."""
    env = {k: v for k, v in os.environ.items() if k not in config.ENVIRONMENT}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_three_named_commands(home):
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


def test_the_demo_learns_and_does_not_collapse(home):
    """What `make demo` runs: z-std and rank stay healthy, and neighbours share their artist far more than untrained."""
    recipe = (ROOT / "Makefile").read_text().partition("\ndemo:")[2].partition("\n\n")[0]
    options = re.search(r"make_shards\.py \S+ --out \S+ (.*)", recipe)
    assert options is not None
    assert "--config configs/demo.yaml --encoder-type simsiam" in recipe
    run_tool("make_shards.py", home / "music", "--out", home / "demo_shards", *options[1].split())
    ok(
        home,
        *("-m", "simsiam_dali.train", "--config", ROOT / "configs/demo.yaml", "--encoder-type", "simsiam"),
        *("--shards", "demo_shards", "--run-name", "demo", "--set", "mlflow.enabled=false"),
    )
    run_dir = home / "runs/demo"
    epochs = [r for r in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if "epoch" in r]
    d = config.load(ROOT / "configs/demo.yaml").encoder.simsiam.projection_dim
    assert min(r["encoder/z_std"] for r in epochs[1:]) >= 0.5 / d**0.5
    # Batch norm keeps z-std up even in a collapse to a few directions; the rank sees that (monitor.LOW_RANK).
    assert min(r["encoder/effective_rank"] for r in epochs[1:]) >= 16
    assert epochs[-1]["knn/artist"] >= epochs[-1]["knn/artist_chance"] + 0.2

    # The online score has some 17 songs to go by. Each of the 48 against all others is the steadier judgement.
    untrained, trained = (nearest_is_of_the_artist(run_dir, home / "demo_shards", trained) for trained in (False, True))
    assert trained >= untrained + 0.1
    assert trained >= 0.5  # twelve artists: a guess is right for one song in twelve


@torch.no_grad()
def nearest_is_of_the_artist(run_dir: Path, folder: Path, trained: bool) -> float:
    """Share of all songs whose nearest other song is by the same artist; whole segments, `run_dir`'s encoder."""
    saved = checkpoint.load(run_dir / checkpoint.FILE_NAME)
    shards = open_shards(folder)
    whole = {"data.shards": folder, "data.view_seconds": shards.segment_seconds}
    settings = config.load(base=saved["config"], command_line=whole)
    log_mel = factory.with_statistics(factory.log_mel_settings(settings), **saved["log_mel"])
    torch.manual_seed(settings.train.seed)
    encoder = factory.create_encoder(settings).eval()
    if trained:
        encoder.load_state_dict(saved["learner"]["encoder"])
    here = World(0, 1, torch.device("cpu"))
    batches = [
        b for split in ("train", "val") for b in factory.create_loader(settings, shards, log_mel, here, split, "clean")
    ]
    rows = torch.cat([b.segment for b in batches])
    assert sorted(rows.tolist()) == list(range(len(shards.segments)))
    song_of = torch.from_numpy(shards.segments["song"].to_numpy().copy())
    songs, embedding = monitor.song_embeddings(torch.cat([encoder.embed(b.data) for b in batches]), song_of[rows])
    unit = torch.nn.functional.normalize(embedding, dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-2).argmax(dim=1)
    artist = label_ids(shards.songs, "artists")[songs]
    return (artist[nearest] == artist).float().mean().item()


def test_every_command_of_the_readme_exists():
    """Make targets, scripts, modules and options that the README names are there."""
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", readme, re.MULTILINE):
        assert f"\n{target}:" in makefile, target
    for script in re.findall(r"python (\S+\.py)", readme):
        assert (ROOT / script).is_file(), script
    for module in re.findall(r"-m (simsiam_dali\.\w+)", readme):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module
    for link in re.findall(r"\]\((?!http)([^)]+)\)", readme):
        assert (ROOT / link).exists(), link


def test_the_generated_tables_are_up_to_date():
    ok(ROOT, "tools/make_docs.py", "--check")
