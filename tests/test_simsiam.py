"""SimSiam's layers are those of the paper, and its loss stops the gradient."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from simsiam_dali.common.errors import UserError
from simsiam_dali.config.schema import Config, EncoderConfig, SimSiamConfig
from simsiam_dali.models.losses import negative_cosine, simsiam_loss
from simsiam_dali.models.resnet import statistics
from simsiam_dali.models.simsiam import SimSiam


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Inputs this small gain nothing from more, and on a busy machine waiting for the others takes seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(seed: int = 0, **changes: Any) -> SimSiam:
    torch.manual_seed(seed)
    sizes = {"backbone": "resnet18", "projection_dim": 32, "predictor_hidden_dim": 8}
    return SimSiam(Config(encoder=EncoderConfig(simsiam=SimSiamConfig(**(sizes | changes)))))


def views(batch: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, 32, 40, generator=g), torch.randn(batch, 32, 40, generator=g)


def three_channel_resnet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    resnet = torchvision.models.resnet18(zero_init_residual=True)
    resnet.fc = nn.Identity()
    return resnet


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A torchvision ResNet-18 as trained elsewhere: no gamma is 0, and the classifier is in the file."""
    torch.manual_seed(7)
    resnet = torchvision.models.resnet18()
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            assert module.running_mean is not None
            nn.init.normal_(module.running_mean, std=0.1)
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pt")
    return tmp_path / "resnet18.pt"


def assert_equals_three_channels(model: SimSiam, reference: nn.Module) -> None:
    model.eval()
    reference.eval()
    view = views()[0]
    with torch.no_grad():
        expected = reference(view.unsqueeze(1).repeat(1, 3, 1, 1))
        assert expected.std() > 0.01
        torch.testing.assert_close(model.embed(view), expected, rtol=1e-5, atol=1e-5)


def test_random_one_channel_stem_equals_three_equal_channels() -> None:
    reference = three_channel_resnet(seed=3)
    assert_equals_three_channels(
        small(seed=3, embedding="backbone"), reference
    )  # it draws the same weights, in the same order


def test_pretrained_one_channel_stem_equals_three_equal_channels(weights: Path) -> None:
    reference = three_channel_resnet(seed=0)
    state = torch.load(weights, weights_only=True)
    reference.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})
    assert_equals_three_channels(small(pretrained_backbone=weights, embedding="backbone"), reference)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_residual_branches_start_at_zero(backbone: str) -> None:
    last_bn = "bn3" if backbone == "resnet50" else "bn2"
    gammas = {n: p for n, p in small(backbone=backbone).backbone.named_parameters() if "layer" in n}
    last = [p for n, p in gammas.items() if n.endswith(f"{last_bn}.weight")]
    assert len(last) == (16 if backbone == "resnet50" else 8)
    assert all((p == 0).all() for p in last)


def test_pretrained_weights_are_not_zeroed(weights: Path) -> None:
    state = torch.load(weights, weights_only=True)
    backbone = small(pretrained_backbone=str(weights)).backbone.state_dict()
    for name in backbone.keys() - {"conv1.weight"}:
        assert torch.equal(backbone[name], state[name]), name


def test_statistics_of_a_map_with_known_values() -> None:
    """Of two channels, one alternates in time between 0 and 2, the other in frequency: its mean does not change."""
    in_time = torch.tensor([0.0, 2.0]).repeat(3)[None, :].expand(4, 6)
    in_frequency = torch.tensor([0.0, 6.0]).repeat(2)[:, None].expand(4, 6)
    found = statistics(torch.stack([in_time, in_frequency])[None].bfloat16())
    mean, deviation, most, change = [1, 3], [1, 0], [2, 6], [2, 0]
    expected = [
        torch.tensor(own, dtype=torch.float32) / float(np.linalg.norm(own)) for own in (mean, deviation, most, change)
    ]
    torch.testing.assert_close(found, torch.cat(expected)[None])


def test_change_is_from_frame_to_frame_and_deviation_of_the_whole() -> None:
    """Both channels rise by as much over all; one does at once, the other frame by frame."""
    at_once, evenly = torch.tensor([0.0, 0.0, 0.0, 3.0]), torch.tensor([0.0, 1.0, 2.0, 3.0])
    _, deviation, _, change = statistics(torch.stack([at_once, evenly])[None, :, None]).reshape(4, 2)
    assert (deviation[0] / deviation[1]).item() == pytest.approx(at_once.std().item() / evenly.std().item())
    assert (change[0] / change[1]).item() == pytest.approx(3 / 3**0.5)


def test_statistics_of_silence_and_of_a_single_frame_are_finite() -> None:
    assert torch.equal(statistics(torch.zeros(2, 3, 4, 5)), torch.zeros(2, 12))
    mean, deviation, most, change = statistics(torch.ones(2, 3, 4, 1)).reshape(2, 4, 3).unbind(dim=1)
    assert torch.equal(deviation, torch.zeros(2, 3))
    assert torch.equal(change, torch.zeros(2, 3))
    torch.testing.assert_close(mean.square().sum(dim=1), torch.ones(2))
    assert torch.equal(mean, most)


@torch.no_grad()
@pytest.mark.parametrize(("backbone", "channels"), [("resnet18", [16, 16, 32, 64]), ("resnet50", [16, 64, 128, 256])])
def test_an_embedding_of_stages_is_the_statistics_of_all_maps_but_the_last(backbone: str, channels: list[int]) -> None:
    model = small(backbone=backbone, backbone_width=16, n_mels=32, embedding="stages").eval()
    maps: list[torch.Tensor] = []
    for name in ("relu", "layer1", "layer2", "layer3", "layer4"):
        getattr(model.backbone, name).register_forward_hook(lambda module, x, y: maps.append(y.clone()))  # noqa: ARG005
    view = views(2)[0]
    model.features(view)
    expected = torch.cat([statistics(view[:, :, None]), *(statistics(own) for own in maps[:4])], dim=1)
    assert [own.shape[1] for own in maps[:4]] == channels
    assert model.embedding_dim == 4 * (view.shape[1] + sum(channels))
    torch.testing.assert_close(model.embed(view), expected)


@pytest.mark.parametrize(("backbone", "dim"), [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)])
def test_embedding_is_the_backbone_or_the_projection(backbone: str, dim: int) -> None:
    model = small(backbone=backbone, embedding="backbone").eval()
    assert model.embedding_dim == dim
    assert model.embed(views(2)[0]).shape == (2, dim)
    model = small(backbone=backbone, embedding="projection").eval()
    assert model.embedding_dim == 32
    assert torch.equal(model.embed(views(2)[0]), model(*views(2))[2])


@pytest.mark.parametrize("layers", [2, 3])
def test_projector_structure(layers: int) -> None:
    projector = small(projection_layers=layers).projector
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU] * (layers - 1)
    assert [type(module) for module in projector] == [*hidden, nn.Linear, nn.BatchNorm1d]
    linears = [module for module in projector if isinstance(module, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == [(512, 32), (32, 32), (32, 32)][:layers]
    assert all(module.bias is None for module in linears)
    norms = [module for module in projector if isinstance(module, nn.BatchNorm1d)]
    assert [module.affine for module in norms] == [True] * (layers - 1) + [False]


def test_predictor_is_a_bottleneck_without_output_bn() -> None:
    linear_in, norm, relu, linear_out = small().predictor
    assert (linear_in.in_features, linear_in.out_features, linear_in.bias) == (32, 8, None)
    assert (linear_out.in_features, linear_out.out_features) == (8, 32)
    assert linear_out.bias is not None
    assert [type(norm), type(relu), type(linear_out)] == [nn.BatchNorm1d, nn.ReLU, nn.Linear]


def test_parameter_groups_hold_all_once_and_fix_the_predictor() -> None:
    model = small()
    encoder, predictor = model.param_groups()
    assert (encoder["fix_lr"], predictor["fix_lr"]) == (False, True)
    assert {id(p) for p in predictor["params"]} == {id(p) for p in model.predictor.parameters()}
    grouped = [id(p) for group in (encoder, predictor) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    torch.optim.SGD(model.param_groups(), lr=0.1)


def test_each_view_has_its_own_batch_norm_statistics() -> None:
    model = small().train()
    quiet, loud = views()[0], views()[1] * 3 + 2
    _, _, z1, z2 = model(quiet, loud)
    separate = torch.cat([model.projector(model.features(quiet)), model.projector(model.features(loud))])
    together = model.projector(model.features(torch.cat([quiet, loud])))
    torch.testing.assert_close(torch.cat([z1, z2]), separate)
    assert (torch.cat([z1, z2]) - together).abs().mean() > 0.1


def test_channels_last_reaches_every_layer_and_changes_nothing() -> None:
    model = small(embedding="backbone").eval()
    expected = model.embed(views()[0])
    model = model.to(memory_format=torch.channels_last)
    layouts: list[bool] = []
    for name in ("conv1", "layer1", "layer4"):
        model.backbone.get_submodule(name).register_forward_hook(
            lambda _module, _in, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    torch.testing.assert_close(model.embed(views()[0]), expected, rtol=1e-4, atol=1e-5)
    assert layouts == [True] * 3


def test_a_missing_pretrained_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file: .*nowhere\.pt"):
        small(pretrained_backbone=tmp_path / "nowhere.pt")


@pytest.mark.parametrize("content", [b"", b"these are not weights", b"PK\x03\x04 cut short"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.pt is not a state dict"):
        small(pretrained_backbone=tmp_path / "weights.pt")


def test_a_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"conv1.weight": torch.zeros(1)}, "epoch": 3}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="holds more than a state dict"):
        small(pretrained_backbone=tmp_path / "checkpoint.pt")


def test_missing_unknown_and_misshapen_weights_are_reported(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    missing = {name: value for name, value in state.items() if name != "layer1.0.bn1.running_var"}
    unknown = state | {"layer4.2.conv1.weight": torch.zeros(1)}
    misshapen = state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}
    for bad, name in [(missing, "layer1.0.bn1.running_var"), (unknown, "layer4.2"), (misshapen, "conv1.weight")]:
        torch.save(bad, tmp_path / "bad.pt")
        with pytest.raises(UserError, match=f"does not fit .* 1 weights .*first is {name}") as error:
            small(pretrained_backbone=tmp_path / "bad.pt")
        assert "\n" not in str(error.value)


def test_weights_without_batch_counters_load(weights: Path, tmp_path: Path) -> None:
    state = {n: v for n, v in torch.load(weights, weights_only=True).items() if "num_batches" not in n}
    torch.save(state, tmp_path / "old.pt")
    assert torch.equal(small(pretrained_backbone=tmp_path / "old.pt").backbone.bn1.weight, state["bn1.weight"])


def test_a_failed_download_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_network(*_args: object, **_kwargs: object) -> None:
        raise URLError("Name or service\nnot known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # a cached download must not hide the failure
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(UserError, match=r"could not be downloaded.*local state-dict file") as error:
        small(pretrained_backbone=True)
    assert "\n" not in str(error.value)


def test_imagenet_weights_are_torchvision_s_by_their_hash(monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
    """A stand-in for the download: the stem of three channels becomes one, and the classifier is left out."""
    asked: dict[str, object] = {}

    def downloaded(url: str, **how: object) -> dict[str, Tensor]:
        asked.update(how, url=url)
        state: dict[str, Tensor] = torch.load(weights, weights_only=True)
        return state

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", downloaded)
    backbone = small(pretrained_backbone=True).backbone
    state = torch.load(weights, weights_only=True)
    assert str(asked["url"]).startswith("https://download.pytorch.org/models/resnet18-")
    assert asked["check_hash"] is True
    assert torch.equal(backbone.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    torch.testing.assert_close(backbone.conv1.weight, state["conv1.weight"].sum(dim=1, keepdim=True))


def random_loss_inputs() -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(4, 16, generator=g, requires_grad=True) for _ in range(4)]


def test_no_gradient_flows_into_the_projections_as_targets() -> None:
    p1, p2, z1, z2 = random_loss_inputs()
    simsiam_loss((p1, p2), (z1, z2)).backward()
    assert z1.grad is None
    assert z2.grad is None
    assert p1.grad is not None
    assert p1.grad.abs().sum() > 0
    assert p2.grad is not None
    assert p2.grad.abs().sum() > 0


def test_the_encoder_learns_through_the_predictor_only() -> None:
    model = small().train()

    def stem_gradient(predictions: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
        model.zero_grad()
        simsiam_loss(predictions, targets).backward()
        gradient = model.backbone.conv1.weight.grad
        assert gradient is not None
        return gradient.clone()

    p1, p2, z1, z2 = model(*views())
    constants = (z1.detach().clone(), z2.detach().clone())
    whole = stem_gradient((p1, p2), (z1, z2))
    p1, p2, _, _ = model(*views())
    torch.testing.assert_close(whole, stem_gradient((p1, p2), constants))
    assert whole.abs().sum() > 0


def test_the_mean_of_several_targets_is_computed_in_float32() -> None:
    p, z = ([torch.randn(8, 64).bfloat16() for _ in range(4)] for _ in range(2))
    exact = simsiam_loss([x.float() for x in p], [x.float() for x in z])
    assert torch.equal(simsiam_loss(p, z), exact)


def test_loss_of_equal_orthogonal_and_opposite_vectors() -> None:
    x = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    y = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    assert simsiam_loss((x, x * 7), (x * 2, x)).item() == pytest.approx(-1)
    assert simsiam_loss((x, x), (y, y)).item() == pytest.approx(0)
    assert simsiam_loss((x, x), (-x, -x)).item() == pytest.approx(1)


def test_loss_pairs_each_prediction_with_the_other_view() -> None:
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert simsiam_loss((x, y), (y, x)).item() == pytest.approx(-1)
    assert simsiam_loss((x, y), (x, y)).item() == pytest.approx(0)


def test_loss_of_several_views_compares_each_with_the_mean_of_the_others() -> None:
    g = torch.Generator().manual_seed(3)
    p, z = torch.randn(2, 4, 5, 6, generator=g, dtype=torch.float64)  # four views of five segments
    terms = []
    for view in range(4):
        target = sum(z[other] for other in range(4) if other != view) / 3
        terms += [-float(a @ b / (a.norm() * b.norm())) for a, b in zip(p[view], target, strict=True)]
    assert simsiam_loss(list(p), list(z)).item() == pytest.approx(sum(terms) / len(terms), abs=1e-6)


def test_the_encoder_takes_any_number_of_views() -> None:
    model = small().eval()
    first, second = views()
    p1, p2, p3, z1, z2, z3 = model(first, second, first)
    torch.testing.assert_close((p1, z1), (p3, z3))
    torch.testing.assert_close(model(second, first)[0], p2)
    assert z2.shape == z1.shape == p1.shape


def test_the_prediction_of_a_short_view_is_compared_with_the_mean_of_all_projections() -> None:
    g = torch.Generator().manual_seed(3)
    p, z = torch.randn(3, 5, 6, generator=g), torch.randn(2, 5, 6, generator=g)
    terms = [negative_cosine(own, target) for own, target in zip(p, (z[1], z[0], (z[0] + z[1]) / 2), strict=True)]
    assert simsiam_loss(list(p), list(z)).item() == pytest.approx(float(sum(terms)) / 3, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("embedding", ["backbone", "projection", "stages"])
def test_a_view_is_embedded_in_windows_where_that_is_set(embedding: str) -> None:
    """A second at 16 kHz and a hop of 512 samples has 32 frames: two windows and 10 frames that fill none."""
    whole, windowed = small(embedding=embedding).eval(), small(embedding=embedding, embedding_seconds=1.0).eval()
    view = torch.randn(3, 32, 74, generator=torch.Generator().manual_seed(0))
    parts = [nn.functional.normalize(whole.embed(view[:, :, start : start + 32]), dim=1) for start in (0, 32)]
    torch.testing.assert_close(windowed.embed(view), (parts[0] + parts[1]) / 2)
    torch.testing.assert_close(windowed.embed(view[:, :, :20]), whole.embed(view[:, :, :20]))


def test_loss_is_float32_under_bf16_autocast() -> None:
    p1, p2, z1, z2 = (x.detach().bfloat16() for x in random_loss_inputs())
    exact = simsiam_loss((p1.double(), p2.double()), (z1.double(), z2.double())).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = simsiam_loss((p1, p2), (z1, z2))
        inner = negative_cosine(p1, z2)
    assert loss.dtype == inner.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, abs=1e-6)


def test_a_step_lowers_the_loss() -> None:
    model = small().train()
    optimizer = torch.optim.SGD(model.param_groups(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(4):
        outputs = model(*views())
        loss = simsiam_loss(outputs[:2], outputs[2:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(-1 <= loss <= 1 for loss in losses)
    assert losses[-1] < losses[0] - 0.02
