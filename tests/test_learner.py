"""What a learner computes in, and where its labels come from: the GPU's side of it, without a GPU."""

from types import SimpleNamespace

import pytest
import torch

from simsiam_dali.learner import autocast_dtype

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16)],  # T4 and RTX 20; A100; H100
)
def test_bf16_is_taken_where_the_gpu_has_it(monkeypatch, capability, expected):
    """torch counts emulation unless told not to: here it works on every GPU."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=capability))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True, raising=False)
    assert torch.cuda.is_bf16_supported()
    assert autocast_dtype("auto", GPU) is expected
    assert autocast_dtype("bf16", GPU) is torch.bfloat16  # asked for, emulated or not
    assert autocast_dtype("auto", torch.device("cpu")) is torch.float32
