"""Write an exported folder: the weights as safetensors, the front end as JSON, and the encoder as ONNX."""

import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import safetensors.torch
import torch
from torch import Tensor, nn

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.files import UNFINISHED, refuse_failed_write, replace_files
from simsiam_dali.embedding.song_encoder import CONFIG, FORMAT_VERSION, WEIGHTS, SongEncoder
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


def export(songs: SongEncoder, out: Path, replace: bool) -> float:
    """Write the folder `out`; returns onnxruntime's largest difference from torch, as a share of the largest value.

    Raises UserError where `out` holds something else, or an export that may not be replaced.
    """
    if out.exists() and (not out.is_dir() or any(not path.name.startswith(UNFINISHED) for path in out.iterdir())):
        if not (out / CONFIG).exists():
            raise UserError(f"{out} holds something that is not an exported encoder: name another --out")
        if not replace:
            raise UserError(f"{out} holds an exported encoder: name another --out, or give --replace")
    state = songs.encoder.state_dict()
    # Without the short views' predictor: no encoder reads it, and what describes an export has no short views.
    weights = {name: own.contiguous() for name, own in state.items() if not name.startswith("short_predictor.")}
    model, difference = to_onnx(songs)
    files = {
        WEIGHTS: safetensors.torch.save(weights, {"format": "pt"}),
        ONNX: model,
        CONFIG: json.dumps(describe(songs), indent=1).encode() + b"\n",
    }
    with refuse_failed_write(out):
        replace_files(out, files)
    return difference


def describe(songs: SongEncoder) -> dict[str, Any]:
    """The content of `config.json`; nothing in it is about the songs or this machine."""
    simsiam = songs.run.config.encoder.simsiam
    encoder = songs.run.config.encoder.model_dump(mode="json")
    encoder["simsiam"]["pretrained_backbone"] = False  # it may be a path, and the weights have replaced it
    log_mel = {
        "n_fft": simsiam.n_fft,
        "hop_length": simsiam.hop_length,
        "n_mels": simsiam.n_mels,
        "window": "hann, periodic",
        "mel_scale": "htk, filters not normalised, 0 Hz to Nyquist",
        "power": 2,
        "floor_db": -100.0,  # AmplitudeToDB's amin of 1e-10
        **songs.run.statistics,
    }
    return {
        "format_version": FORMAT_VERSION,
        "encoder_type": songs.run.config.encoder.encoder_type,
        "input": songs.input_name,
        "sample_rate": songs.rate,
        "log_mel": log_mel if songs.input_name == "log_mel" else None,
        "segment_seconds": songs.segment_seconds,
        "packed_rate": songs.packed_rate,
        "view_seconds": songs.view_seconds,
        "song": "mean of the segments' embeddings, each scaled to length 1",
        "encoder": encoder,
        "checkpoint_sha256": songs.run.sha256,
        "embedding_dim": songs.embedding_dim,
        "files": [WEIGHTS, ONNX],
    }


def to_onnx(songs: SongEncoder) -> tuple[bytes, float]:
    """The encoder as ONNX, and the difference on another batch size and length than it was traced with.

    Raises UserError when onnxruntime gives other values than torch.
    """
    name = songs.input_name
    time = {"log_mel": {0: "batch", 2: "frames"}, "waveform": {0: "batch", 1: "samples"}}[name]
    module = _Embed(songs.encoder).eval()
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        # torch.export's exporter needs another package; a length that a Python `if` reads is checked, not traced.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.onnx.export(
            module,
            (example_input(songs, 2, songs.samples),),
            Path(folder) / ONNX,
            input_names=[name],
            output_names=["embedding"],
            dynamic_axes={name: time, "embedding": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )
        model = (Path(folder) / ONNX).read_bytes()
    other = example_input(songs, 3, songs.samples + songs.rate)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    theirs = torch.from_numpy(session.run(None, {name: other.numpy()})[0])
    with torch.inference_mode():
        ours = module(other)
    difference = float((theirs - ours).abs().max() / ours.abs().max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"onnxruntime's values differ from torch's by {difference:.1e} of the largest: nothing was written"
        )
    return model, difference


def example_input(songs: SongEncoder, batch: int, samples: int) -> Tensor:
    """The encoder's input for `samples` of noise."""
    return songs.front_end(torch.randn(batch, samples, generator=torch.Generator().manual_seed(0)) / 10)
