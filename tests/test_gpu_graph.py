"""The data graph of a GPU run as it is defined: DALI says without a GPU where operators run and want their inputs."""

import sys
from typing import Any

import pytest
from helpers.running import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import gpu_tables

from simsiam_dali.config.load import load_config
from simsiam_dali.data.graph import Epoch, GraphConfig
from simsiam_dali.data.pipeline import PipelineSettings, define
from simsiam_dali.training import memory

GRAPHS: dict[str, dict[str, Any]] = {
    "all there is": {},
    "one place, no conversion": {"crops": "same", "seconds": 60.0},
    "no epoch": {"epoch": None},
    "short views": {"short_views": 2, "short_seconds": 5.0},
    "clean": {"mode": "clean", "epoch": None},
    "raw": {"mode": "raw", "epoch": Epoch(3, 4)},
}


def changed(**over: Any) -> GraphConfig:
    return GraphConfig(**{**vars(gpu_tables.gpu_graph()), **over})


@pytest.fixture(scope="module", params=GRAPHS)
def on_gpu(request: pytest.FixtureRequest) -> list[gpu_tables.Operator]:
    return gpu_tables.operators(changed(**GRAPHS[request.param]), gpu=0)


def test_dali_has_every_operator_for_its_device(on_gpu: list[gpu_tables.Operator]) -> None:
    assert {(each.name, each.device) for each in on_gpu if not each.exists} == set()


def test_every_input_lies_where_its_operator_wants_it(on_gpu: list[gpu_tables.Operator]) -> None:
    assert [each for each in on_gpu if each.inputs != each.wanted] == []


def test_named_arguments_conditions_among_them_lie_on_the_cpu(on_gpu: list[gpu_tables.Operator]) -> None:
    assert {place for each in on_gpu for place in each.arguments} == {"cpu"}


def test_the_decoder_runs_on_the_cpu_and_all_that_makes_views_on_the_gpu() -> None:
    heavy = ("AudioResample", "Spectrogram", "MelFilterBank", "WarpAffine", "Filter", "ToDecibels", "Erase")
    device = {each.name: each.device for each in gpu_tables.operators(gpu_tables.gpu_graph(), gpu=0)}
    assert {device[name] for name in heavy} == {"gpu"}
    assert device["decoders__Audio"] == device["ExternalSource"] == "cpu"


@pytest.mark.parametrize("mode", ["views", "clean", "raw"])
def test_the_data_come_on_the_gpu_and_what_the_host_reads_on_the_cpu(mode: str) -> None:
    """Rows, sums and lengths are read each batch: on the GPU each would make the host wait."""
    pipeline = define(changed(mode=mode), PipelineSettings(batch_size=4, threads=1, prefetch=1, seed=0, gpu=0))
    pipeline._build_graph()
    views = 2 if mode == "views" else 1
    assert [x.device for x in pipeline._graph_outputs] == ["gpu"] * views + ["cpu"] * 3


def test_both_devices_have_the_same_operators() -> None:
    """One definition: nothing is there for one of them only, but copies, which DALI adds when it builds."""
    names = [[each.name for each in gpu_tables.operators(gpu_tables.gpu_graph(), gpu=gpu)] for gpu in (None, 0)]
    assert names[0] == names[1]


def test_the_documented_micro_batch_of_a_card_is_the_one_the_command_chooses() -> None:
    """Up to the batch there is, more memory holds no less; and no row says more than the card has."""
    config = load_config(ROOT / "configs" / "gpu.yaml")
    found = [gpu_tables.fit(config, card * 1e9) for card in gpu_tables.CARDS]
    sizes = [each.size if each else 0 for each in found]
    assert sizes == sorted(sizes)
    assert sizes[-1] == config.encoder.batch_size
    for card, each in zip(gpu_tables.CARDS, found, strict=True):
        assert each is None or each.least <= card * 1e9 * (1 - memory.HEADROOM)
