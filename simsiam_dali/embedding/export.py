"""Write an exported folder: the weights as safetensors, the front end as JSON, and the encoder as ONNX."""

import json
import shutil
import warnings
from pathlib import Path

import onnxruntime
import safetensors.torch
import torch
from torch import Tensor, nn

from simsiam_dali.common.errors import UserError
from simsiam_dali.embedding.export_config import CONFIG, ExportConfig
from simsiam_dali.embedding.run import TrainedRun
from simsiam_dali.embedding.song_encoder import WEIGHTS, front_end
from simsiam_dali.models.encoder import Encoder

ONNX = "encoder.onnx"
OPSET = 18

TOLERANCE = 1e-4
"""Largest difference between onnxruntime's and torch's values, as a share of the largest value."""


class _Embed(nn.Module):
    """An encoder whose `forward` is its `embed`."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder.embed(x)


def export(run: TrainedRun, config: ExportConfig, out: Path, replace: bool) -> float:
    """Write the folder `out`; returns onnxruntime's largest difference from torch, as a share of the largest value.

    Raises UserError where `out` holds something else, or an export that may not be replaced.
    """
    config.check()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / CONFIG).exists():
            raise UserError(f"{out} holds something that is not an exported encoder: name another --out")
        if not replace:
            raise UserError(f"{out} holds an exported encoder: name another --out, or give --replace")
    encoder, staged, old = run.encoder(), out.with_name(out.name + ".part"), out.with_name(out.name + ".old")
    for left in (staged, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
        weights = {name: weight.contiguous() for name, weight in encoder.state_dict().items()}
        safetensors.torch.save_file(weights, staged / WEIGHTS, {"format": "pt"})
        difference = write_onnx(config, encoder, staged / ONNX)
        content = config.to_json() | {"embedding_dim": encoder.embedding_dim, "files": [WEIGHTS, ONNX]}
        (staged / CONFIG).write_text(json.dumps(content, indent=1) + "\n")
        if out.exists():
            out.rename(old)
        staged.rename(out)
    except OSError as e:
        raise UserError(f"cannot write {out} ({e.strerror or e})") from e
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return difference


def write_onnx(config: ExportConfig, encoder: Encoder, path: Path) -> float:
    """Write the ONNX file, and run it on another batch size and length than it was traced with; returns the difference.

    Raises UserError when onnxruntime gives other values than torch.
    """
    name = config.input_name
    time = {"log_mel": {0: "batch", 2: "frames"}, "waveform": {0: "batch", 1: "samples"}}[name]
    module = _Embed(encoder).eval()
    with warnings.catch_warnings():
        # torch.export's exporter needs another package; a length that a Python `if` reads is checked, not traced.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.onnx.export(
            module,
            (example_input(config, 2, config.samples),),
            path,
            input_names=[name],
            output_names=["embedding"],
            dynamic_axes={name: time, "embedding": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )
    other = example_input(config, 3, config.samples + config.rate)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    theirs = torch.from_numpy(session.run(None, {name: other.numpy()})[0])
    with torch.inference_mode():
        ours = module(other)
    difference = float((theirs - ours).abs().max() / ours.abs().max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"onnxruntime's values differ from torch's by {difference:.1e} of the largest: nothing was written"
        )
    return difference


def example_input(config: ExportConfig, batch: int, samples: int) -> Tensor:
    """The encoder's input for `samples` of noise."""
    wave = torch.randn(batch, samples, generator=torch.Generator().manual_seed(0)) / 10
    return front_end(config)(wave)
