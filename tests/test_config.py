"""Settings: where they come from, what is refused and how, and that each one is read by some code."""

import ast
from itertools import permutations
from pathlib import Path

import pytest
import yaml

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config, sources_of
from simsiam_dali.config.schema import Config, setting_fields
from simsiam_dali.models.registry import ENCODERS

ROOT = Path(__file__).resolve().parent.parent


def attributes_read() -> set[str]:
    """Names of all attributes the package reads, the schema itself left out."""
    names: set[str] = set()
    for path in (ROOT / "simsiam_dali").rglob("*.py"):
        if path.name != "schema.py":
            tree = ast.parse(path.read_text())
            names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    return names


def test_every_setting_is_read_by_some_code() -> None:
    read = attributes_read()
    unread = [key for key, _ in setting_fields() if key.rsplit(".", 1)[-1] not in read]
    assert unread == []


def test_every_setting_is_described() -> None:
    assert [key for key, field in setting_fields() if not field.description] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_yaml_loads(path: Path) -> None:
    load_config(path)


def test_gpu_yaml_holds_the_plan_s_values() -> None:
    loaded = load_config(ROOT / "configs" / "gpu.yaml")
    simsiam, augmentation = loaded.encoder.simsiam, loaded.encoder.simsiam.augmentation
    assert (simsiam.backbone, simsiam.projection_dim, simsiam.predictor_hidden_dim) == ("resnet50", 2048, 512)
    assert (simsiam.n_mels, simsiam.n_fft, simsiam.hop_length) == (128, 2048, 512)
    assert (augmentation.time_stretch_range, augmentation.pitch_shift_range) == ((0.8, 1.2), (-2, 2))
    assert (augmentation.noise_snr_range, augmentation.gain_range) == ((15, 30), (-6, 6))
    assert (augmentation.frequency_mask_param, augmentation.time_mask_param) == (27, 100)
    probabilities = {k: v for k, v in augmentation if k.endswith("_prob")}
    assert probabilities == {
        "time_shift_prob": 1.0,
        "time_stretch_prob": 0.5,
        "pitch_shift_prob": 0.5,
        "noise_prob": 0.3,
        "frequency_mask_prob": 0.5,
        "time_mask_prob": 0.5,
        "gain_prob": 0.8,
        "reverb_prob": 0.2,
        "mixup_prob": 0.0,
        "crop_prob": 0.0,
    }
    assert (simsiam.optimizer, simsiam.sgd_momentum, simsiam.weight_decay) == ("sgd", 0.9, 5e-4)
    simple = loaded.encoder.simple
    assert (simple.base_channels, simple.loss_type, simple.contrastive_temperature) == (32, "metadata_contrastive", 0.5)
    assert (simple.use_artist, simple.use_album, simple.use_year, simple.year_threshold) == (True, True, True, 2)
    assert loaded.encoder.embedding_dim == 2048


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("encoder: {epochs: 3, batch_size: 8}\nmlflow: {tracking_uri: 'sqlite:///file.db'}\n")
    environment = {"MLFLOW_TRACKING_URI": "sqlite:///env.db", "ENCODER_TYPE": "simsiam", "UNRELATED": "1"}
    loaded = load_config(
        file, environment, {"encoder.epochs": 4, "train.seed": None}, ["encoder.epochs=5", "train.run_name=a"]
    )
    assert loaded.encoder.batch_size == 8  # the file's
    assert loaded.mlflow.tracking_uri == "sqlite:///env.db"  # environment over file
    assert loaded.encoder.epochs == 5  # --set over option over file
    assert (loaded.train.seed, loaded.train.run_name) == (0, "a")


def test_every_source_that_sets_a_key_is_listed(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("encoder: {encoder_type: simsiam}\n")
    sources = (file, {"ENCODER_TYPE": "simple"}, {"encoder.encoder_type": None}, ["encoder.encoder_type=third"])
    assert sources_of("encoder.encoder_type", *sources) == [
        (str(file), "simsiam"),
        ("environment ENCODER_TYPE", "simple"),
        ("--set encoder.encoder_type=third", "third"),
    ]
    assert sources_of("encoder.epochs", *sources) == []


def test_yaml_round_trip() -> None:
    loaded = load_config(assignments=["data.view_seconds=2.5", "encoder.simsiam.pretrained_backbone=weights.pt"])
    assert Config.model_validate(yaml.safe_load(loaded.to_yaml())) == loaded


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("encoder.simsiam.weight_decoy=1", "unknown setting encoder.simsiam.weight_decoy; did you mean"),
        ("encoder.simsiam.weight_decoy=1", "encoder.simsiam.weight_decay?"),
        ("epochs=3", "did you mean encoder.epochs?"),
        ("encoder.simsiam.augmentation.noise_snr=3", "did you mean encoder.simsiam.augmentation.noise_snr_range?"),
        ("mlflow.qqq=1", "known here: enabled, tracking_uri, experiment_name, auto_tags"),
        ("encoder.epochs=many", "encoder.epochs = 'many' is refused"),
        ("encoder.epochs=0", "greater than or equal to 1"),
        ("encoder.simsiam.backbone=resnet51", "allowed: resnet18 | resnet34 | resnet50"),
        ("encoder.simple.use_artist=perhaps", "encoder.simple.use_artist = 'perhaps' is refused"),
        ("encoder.simple={use_artist: false, use_album: false, use_year: false}", "nothing makes a positive pair"),
        ("encoder.simple.contrastive_temperature=0", "greater than 0"),
        ("encoder.simsiam.projection_layers=4", "allowed: 2 | 3"),
        ("data.views=9", "allowed: a whole number (2 to 8)"),
        ("data.threads=0", "allowed: a whole number (1 or more) or auto"),
        ("encoder.simsiam.learning_rate=0", "allowed: a number (above 0)"),
        ("train.seed=-1", "allowed: a whole number (0 to below 2147483648)"),
        ("encoder.learning_rate=-1", "allowed: a number (above 0) or null"),
        ("encoder.simsiam.augmentation.time_stretch_range=[1.2, 0.8]", "the low end 1.2 is above the high end 0.8"),
        ("encoder.simsiam.augmentation.time_stretch_range=[0.8]", "allowed: [a number, a number]"),
        ("encoder.simsiam.augmentation.noise_prob=1.5", "less than or equal to 1"),
        ("data.view_crops=both", "allowed: same | independent"),
        ("encoder=3", "encoder"),
        ("encoder.epochs", "expected key=value"),
        ("encoder.epochs=[", "not readable YAML"),
    ],
)  # fmt: skip
def test_refusals_name_the_key_and_what_is_allowed(assignment: str, expected: str) -> None:
    with pytest.raises(UserError) as e:
        load_config(assignments=[assignment])
    assert expected in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("options", [*permutations(["use_artist=false", "use_album=false", "use_year=false"])])
def test_options_that_fit_together_are_accepted_in_any_order(tmp_path: Path, options: tuple[str, ...]) -> None:
    sets = [f"encoder.simple.{option}" for option in options]
    with pytest.raises(UserError, match=f"^--set {sets[-1]}: encoder.simple: .* nothing makes a positive pair"):
        load_config(assignments=sets)
    last = load_config(assignments=[*sets, "encoder.simple.use_folder=true"]).encoder.simple
    assert (last.use_folder, last.use_artist) == (True, False)
    file = tmp_path / "folders.yaml"
    file.write_text("encoder: {simple: {use_artist: false, use_album: false, use_year: false}}")
    assert load_config(file, assignments=["encoder.simple.use_folder=true"]).encoder.simple == last


def test_refusals_name_their_source(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("encoder: {epoch: 3}")
    with pytest.raises(UserError, match=r"bad\.yaml: unknown setting encoder\.epoch; did you mean encoder\.epochs"):
        load_config(bad)
    with pytest.raises(UserError, match=r"command line: encoder\.batch_size = 1 "):
        load_config(command_line={"encoder.batch_size": 1})
    for content, words in (
        ("[1, 2]", "holds no settings"),
        ("a: [", "not readable YAML"),
        (b"\xff\xfe\xfa", "not readable"),
    ):
        bad.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=words):
            load_config(bad)
    with pytest.raises(UserError, match=r"^no config file nope; by name there are cpu, demo, gpu, "):
        load_config(Path("nope"))
    with pytest.raises(UserError, match=r"^no config file \S+$"):
        load_config(tmp_path / "absent.yaml")


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml") == Config()


def test_the_help_of_the_encoder_type_names_all_of_them() -> None:
    described = dict(setting_fields())["encoder.encoder_type"].description or ""
    assert [name for name in ENCODERS if name not in described] == []
