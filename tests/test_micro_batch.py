"""A step's batch in parts: the same gradient, the part that fits, and activations computed twice."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.running import command, losses, refusal, run, start, train, wait_for_step
from torch import Tensor, nn

from simsiam_dali.common.distributed import World
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config
from simsiam_dali.config.schema import Config
from simsiam_dali.data.loader import Batch
from simsiam_dali.data.shards import ShardSet, open_shards
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.models.simsiam import SimSiam
from simsiam_dali.training import checkpoint, data, loop, memory, micro_batch
from simsiam_dali.training.data import log_mel_settings
from simsiam_dali.training.learner import Learner, groups

CPU = torch.device("cpu")
HERE = World(0, 1, CPU)
SMALL = {
    "encoder.batch_size": 16,
    "encoder.simsiam.backbone": "resnet18",
    "encoder.simsiam.backbone_width": 8,
    "encoder.simsiam.projection_dim": 16,
    "encoder.simsiam.predictor_hidden_dim": 4,
    "encoder.simsiam.n_mels": 32,
    "encoder.simsiam.augmentation.frequency_mask_param": 4,
    "encoder.simsiam.augmentation.time_mask_param": 8,
    "train.device": "cpu",
    "data.view_seconds": 1.5,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shards(small_shards: Path) -> ShardSet:
    return open_shards(small_shards)


def config(**over: object) -> Config:
    return load_config(command_line={**SMALL, **{k.replace("__", "."): v for k, v in over.items()}})


def batch(size: int) -> Batch:
    g = torch.Generator().manual_seed(3)
    return Batch(tuple(torch.randn(size, 32, 47, generator=g) for _ in range(2)), torch.arange(size))


def parts(whole: Batch, size: int) -> list[Batch]:
    pieces = zip(zip(*(x.split(size) for x in whole.inputs), strict=True), whole.segment.split(size), strict=True)
    return [Batch(*own) for own in pieces]


def without_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, nn.Identity())
        else:
            without_batch_norm(child)


def stepped(shards: ShardSet, batches: list[Batch], norm: bool, **over: object) -> tuple[Learner, Any]:
    """The learner after one step, and what the step gave."""
    learner = Learner(config(**over), shards, HERE)
    if not norm:
        without_batch_norm(learner.encoder)
    for parameter in learner.encoder.parameters():  # residual branches begin at zero, and would hide a difference
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.0, generator=torch.Generator().manual_seed(len(parameter)))
    learner.encoder.train()
    return learner, learner.step(batches, 0.1, 0.1)


def gradients(learner: Learner) -> dict[str, Tensor]:
    return {name: p.grad for name, p in learner.encoder.named_parameters() if p.grad is not None}


def farthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm().clamp_min(1e-12)) for name in b)


def test_four_times_four_segments_are_sixteen_without_batch_norm(shards: ShardSet) -> None:
    whole, seen = stepped(shards, [batch(16)], norm=False)
    split, parted = stepped(shards, parts(batch(16), 4), norm=False, train__micro_batch=4)
    assert split.micro_batches == 4
    assert farthest(gradients(split), gradients(whole)) < 1e-5
    for name, weight in whole.encoder.state_dict().items():
        torch.testing.assert_close(split.encoder.state_dict()[name], weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parted.loss, seen.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parted.z, seen.z, rtol=1e-5, atol=1e-6)


def test_batch_norm_goes_over_each_micro_batch(shards: ShardSet) -> None:
    """So with it the two are not the same, which the test above would not see if parts were ignored."""
    whole, _ = stepped(shards, [batch(16)], norm=True)
    split, _ = stepped(shards, parts(batch(16), 4), norm=True, train__micro_batch=4)
    assert farthest(gradients(split), gradients(whole)) > 1e-2


def test_groups_are_streamed() -> None:
    """A micro-batch is asked for when the one before has been used, not before."""
    asked: list[int] = []

    def loader() -> Iterator[int]:
        for n in range(6):
            asked.append(n)
            yield n

    found = []
    for group in groups(loader(), 3):
        for n in group:
            assert asked[-1] == n
            found.append(n)
    assert found == list(range(6))


# --- activations computed twice


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_recomputed_activations_change_neither_gradients_nor_statistics(shards: ShardSet, backbone: str) -> None:
    once, _ = stepped(shards, [batch(4)], norm=True, encoder__simsiam__backbone=backbone)
    twice, _ = stepped(
        shards, [batch(4)], norm=True, encoder__simsiam__backbone=backbone, train__activation_checkpointing=True
    )
    assert farthest(gradients(twice), gradients(once)) < 1e-6
    ours, theirs = twice.encoder.state_dict(), once.encoder.state_dict()
    assert ours.keys() == theirs.keys()  # a checkpoint of either fits the other
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-7)


def test_recomputed_activations_take_less_memory_by_the_estimate_and_in_truth(shards: ShardSet) -> None:
    def kept(encoder: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = encoder.train()(*batch(4).inputs)
        del outputs
        return sum(sizes.values())

    plain, saving = (
        Learner(config(train__activation_checkpointing=flag), shards, HERE).encoder for flag in (False, True)
    )
    assert kept(saving) < 0.6 * kept(plain)
    estimate = [memory.activation_bytes(encoder, [(32, 47)] * 2) for encoder in (saving, plain)]
    assert 0.1 * estimate[1] < estimate[0] < 0.6 * estimate[1]


def test_an_encoder_without_residual_blocks_is_refused(shards: ShardSet) -> None:
    with pytest.raises(UserError, match="this one has none"):
        Learner(config(encoder__encoder_type="simple", train__activation_checkpointing=True), shards, HERE)


# --- what fits


def test_candidates_divide_the_batch() -> None:
    assert micro_batch.candidates(config(encoder__batch_size=12)) == [12, 6, 4, 3, 2]
    assert micro_batch.candidates(config(encoder__batch_size=128))[:3] == [128, 64, 32]
    assert micro_batch.candidates(config(train__micro_batch=8)) == [8]
    assert micro_batch.candidates(config(encoder__encoder_type="simple")) == [16]  # it compares all of a step
    with pytest.raises(UserError, match=r"train\.micro_batch is 5, which does not divide encoder\.batch_size, 16"):
        micro_batch.candidates(config(train__micro_batch=5))
    with pytest.raises(UserError, match="compares all segments of a step"):
        micro_batch.candidates(config(encoder__encoder_type="simple", train__micro_batch=4))


def test_the_largest_that_fits_by_the_estimate_is_chosen(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = config()
    encoder = encoder_type(chosen).create(pretrained=False)
    shapes: list[tuple[int, ...]] = [(32, log_mel_settings(chosen).frames(1.5))] * 2

    def free(segments: float) -> int:
        """Memory for so many segments, by the estimate itself."""
        each = memory.activation_bytes(encoder, shapes) * memory.WORKING_SHARE
        weights = memory.BYTES_PER_PARAMETER["sgd"] * sum(p.numel() for p in encoder.parameters())
        return int((memory.RUNTIME_BYTES + weights + segments * each) / (1 - memory.HEADROOM))

    for segments, expected in ((16.5, 16), (15.5, 8), (8.5, 8), (7.5, 4), (2.5, 2)):
        monkeypatch.setattr(memory, "free_bytes", lambda _, n=segments: free(n))
        found = micro_batch.choose_by_estimate(chosen, shards, HERE)
        assert found.train.micro_batch == expected
        assert found.encoder.batch_size == 16
    monkeypatch.setattr(memory, "free_bytes", lambda _: free(1.5))
    with pytest.raises(UserError, match="a batch of 16 needs about"):
        micro_batch.choose_by_estimate(chosen, shards, HERE)
    assert capsys.readouterr().out == ""


@pytest.fixture
def runs_out_above(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the encoder run out of memory with more than so many segments."""

    def limit(segments: int, error: type[Exception] = torch.OutOfMemoryError, says: str = "CUDA out of memory") -> None:
        forward = SimSiam.forward

        def limited(self: SimSiam, *views: Tensor) -> Any:
            if len(views[0]) > segments:
                raise error(says)
            return forward(self, *views)

        monkeypatch.setattr(SimSiam, "forward", limited)

    return limit


@pytest.mark.parametrize(
    "says",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "FIND was unable to find an engine to execute this computation",
    ],
)
def test_a_trial_step_knows_all_words_for_no_memory(shards: ShardSet, runs_out_above: Any, says: str) -> None:
    """torch raises OutOfMemoryError for its own allocator only."""
    learner = Learner(config(), shards, HERE)
    runs_out_above(5, RuntimeError, says)
    assert micro_batch.choose_by_trial_step(config(train__micro_batch=16), learner, shards, HERE).train.micro_batch == 4
    runs_out_above(1, RuntimeError, "something else")
    with pytest.raises(RuntimeError, match="something else"):
        micro_batch.choose_by_trial_step(config(train__micro_batch=16), learner, shards, HERE)


def test_a_trial_step_tries_smaller_ones_and_changes_no_state(shards: ShardSet, runs_out_above: Any) -> None:
    learner = Learner(config(), shards, HERE)
    before = {name: x.clone() for name, x in learner.encoder.state_dict().items()}
    runs_out_above(5)
    assert micro_batch.choose_by_trial_step(config(train__micro_batch=16), learner, shards, HERE).train.micro_batch == 4
    assert all(torch.equal(x, before[name]) for name, x in learner.encoder.state_dict().items())
    assert all(p.grad is None for p in learner.encoder.parameters())
    runs_out_above(1)
    with pytest.raises(UserError, match="out of memory on cpu with 2 segments at once"):
        micro_batch.choose_by_trial_step(config(train__micro_batch=16), learner, shards, HERE)


class OneOfTwo(World):
    """A rank whose only peer always gives the same."""

    peer: Any = None

    def gather(self, thing: Any) -> list[Any]:
        return [thing, self.peer]


def test_all_ranks_use_the_micro_batch_that_fits_on_each(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs of one host may have unequal memory free, and their steps must be equal."""
    rank = OneOfTwo(0, 2, CPU)
    for peer, expected in (((16, ""), 16), ((4, "16 do not fit"), 4)):
        monkeypatch.setattr(OneOfTwo, "peer", peer)
        assert micro_batch.choose_by_estimate(config(), shards, rank).train.micro_batch == expected
    monkeypatch.setattr(OneOfTwo, "peer", (0, "not even 2 fit there"))
    with pytest.raises(UserError, match=r"^not even 2 fit there$"):
        micro_batch.choose_by_estimate(config(), shards, rank)
    monkeypatch.setattr(OneOfTwo, "peer", False)
    with pytest.raises(UserError, match="with 2 segments at once"):
        micro_batch.choose_by_trial_step(config(), Learner(config(), shards, HERE), shards, rank)


def test_a_resumed_run_keeps_its_micro_batch_or_is_refused(shards: ShardSet, runs_out_above: Any) -> None:
    """Another one would change the loader's position and the batch norm."""
    learner = Learner(config(), shards, HERE)
    runs_out_above(8)
    assert (
        micro_batch.choose_by_trial_step(
            config(train__micro_batch=8), learner, shards, HERE, keep=True
        ).train.micro_batch
        == 8
    )
    runs_out_above(4)
    with pytest.raises(UserError, match="with 8 segments at once, which the run was told to take or began with"):
        micro_batch.choose_by_trial_step(config(train__micro_batch=8), learner, shards, HERE, keep=True)


def test_ranks_that_share_their_batch_norm_try_no_step(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ran out of memory would leave the others waiting for its statistics."""
    settings = config(train__micro_batch=8)
    learner = Learner(settings, shards, HERE)
    monkeypatch.setattr(learner, "trial_step", lambda *_: pytest.fail("tried"))
    shared = config(train__micro_batch=8, train__sync_bn=True)
    assert micro_batch.choose_by_trial_step(shared, learner, shards, World(0, 2, HERE.device)) == shared


def test_a_trial_step_leaves_room_for_dali_and_the_momentum(shards: ShardSet) -> None:
    """DALI's buffers grow with the micro-batch, the momentum does not."""
    settings = config()
    learner = Learner(settings, shards, HERE)
    one, two = (micro_batch.bytes_beside(settings, learner, shards, size) for size in (1, 2))
    assert shards.sample_rate is not None
    samples, seconds = shards.segment_seconds * shards.sample_rate, 2 * data.view_seconds(settings, shards)
    _, most = memory.dali_bytes(samples, seconds, data.log_mel_settings(settings))
    assert two - one == pytest.approx(most, abs=1)
    assert 2 * one - two == pytest.approx(4 * sum(p.numel() for p in learner.encoder.parameters()), abs=1)


def test_memory_is_checked_before_threads_are_tried(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that cannot fit is refused at once, not after half a minute of measuring."""
    monkeypatch.setattr(data, "with_threads", lambda *_: pytest.fail("measured first"))
    monkeypatch.setattr(memory, "free_bytes", lambda _: 2**30)
    asked = config(data__shards=small_shards, data__threads="auto", mlflow__enabled="false")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError, match="a batch of 16 needs about"):
        loop.train(asked, HERE, None, tmp_path)
    signal.signal(signal.SIGTERM, before)


SCRIPT = """
import sys
from simsiam_dali import train
from simsiam_dali.training import memory
fits = memory.check_fits
def check_fits(encoder, batch, *rest):
    if batch > 4:
        raise memory.UserError("does not fit")
    return fits(encoder, batch, *rest)
memory.check_fits = check_fits
sys.exit(train.main())
"""


def test_a_batch_that_does_not_fit_is_trained_in_parts(tmp_path: Path, small_shards: Path) -> None:
    """Where the estimate refuses 8, steps are of 2 x 4, which the checkpoint keeps; asked for, 2 x 4 gives the same."""
    over = {"encoder__batch_size": 8, "encoder__epochs": 2}
    (tmp_path / "whole").mkdir()
    args = command(tmp_path / "whole", small_shards, "--run-name", "a", mlflow__enabled="false", **over)
    done = run([args[0], "-c", SCRIPT, *args[3:]], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "each step accumulates the gradients of 2 micro-batches of 4 segments" in done.stdout
    run_dir = tmp_path / "whole" / "runs" / "a"
    saved = checkpoint.load(run_dir / checkpoint.FILE_NAME)
    assert saved["config"]["train"]["micro_batch"] == 4
    assert saved["config"]["encoder"]["batch_size"] == 8
    steps = open_shards(small_shards).count("train") // 8
    assert list(losses(run_dir)) == list(range(1, 2 * steps + 1))

    (tmp_path / "explicit").mkdir()
    explicit = train(tmp_path / "explicit", small_shards, train__micro_batch=4, **over)
    assert losses(explicit) == losses(run_dir)


OUT_OF_MEMORY = """
import sys
import torch
from simsiam_dali import train
from simsiam_dali.models.simsiam import SimSiam
from simsiam_dali.training import micro_batch
micro_batch.TRIED_ON = ("cpu",)
forward = SimSiam.forward
def limited(self, *views):
    if self.training and len(views[0]) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return forward(self, *views)
SimSiam.forward = limited
sys.exit(train.main())
"""


def test_a_run_that_runs_out_of_memory_halves_the_micro_batch_and_trains(tmp_path: Path, small_shards: Path) -> None:
    """What the estimate lets through and the device does not: 8, then 4, then 2, of which steps of 8 are made."""
    args = command(tmp_path, small_shards, mlflow__enabled="false", encoder__batch_size=8, encoder__epochs=1)
    done = run([args[0], "-c", OUT_OF_MEMORY, *args[3:]], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "each step accumulates the gradients of 4 micro-batches of 2 segments" in done.stdout
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert checkpoint.load(run_dir / checkpoint.FILE_NAME)["config"]["train"]["micro_batch"] == 2
    assert list(losses(run_dir)) == list(range(1, open_shards(small_shards).count("train") // 8 + 1))


def test_a_micro_batch_that_was_asked_for_is_not_exchanged_for_a_smaller_one(
    tmp_path: Path, small_shards: Path
) -> None:
    over = {"mlflow__enabled": "false", "encoder__batch_size": 8, "train__micro_batch": 8}
    args = command(tmp_path, small_shards, **over)
    line = refusal([args[0], "-c", OUT_OF_MEMORY, *args[3:]], tmp_path)
    assert "out of memory on cpu with 8 segments at once, which the run was told to take" in line


def test_steps_in_parts_are_resumed_bit_for_bit(tmp_path: Path, small_shards: Path) -> None:
    over = {"encoder__batch_size": 8, "encoder__epochs": 3, "train__micro_batch": 4}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = train(tmp_path / "whole", small_shards, **over)
    args = command(
        tmp_path / "killed", small_shards, "--run-name", "a", mlflow__enabled="false", train__checkpoint_every=1, **over
    )
    process = start(args, tmp_path / "killed")
    wait_for_step(process, tmp_path / "killed" / "runs", open_shards(small_shards).count("train") // 8 + 2)
    process.kill()
    process.wait()
    run_dir = tmp_path / "killed" / "runs" / "a"
    done = run([*args[:3], "--resume", str(run_dir)], tmp_path / "killed")
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(run_dir) == losses(whole)
