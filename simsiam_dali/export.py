"""Export a trained encoder: python -m simsiam_dali.export --checkpoint runs/NAME --out exported

Writes a folder: encoder.safetensors (the weights, by their names in the model), config.json (front end, sizes, how
songs are cut) and encoder.onnx (a batch of segments to their embeddings; batch and time may have any length).
In Python, simsiam_dali.load_encoder("exported").embed_file("song.mp3") gives a song's embedding.
"""

import argparse
import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import onnxruntime
import safetensors.torch
import torch
from torch import Tensor, nn

from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.config.cli import program
from simsiam_dali.embedding import export_config as recipe
from simsiam_dali.embedding import run as trained
from simsiam_dali.embedding.export_config import CONFIG, Recipe
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


def export(run: trained.Trained, of: Recipe, out: Path, replace: bool) -> float:
    """Write the folder `out`; returns how far onnxruntime is from torch, as a share of the largest value.

    Raises UserError where `out` holds something else, or an export that may not be replaced.
    """
    of.check()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / CONFIG).exists():
            raise UserError(f"{out} holds something that is no exported encoder: name another --out")
        if not replace:
            raise UserError(f"{out} holds an exported encoder: name another --out, or give --replace")
    encoder, staged, old = run.encoder(), out.with_name(out.name + ".part"), out.with_name(out.name + ".old")
    for left in (staged, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
        weights = {name: weight.contiguous() for name, weight in encoder.state_dict().items()}
        safetensors.torch.save_file(weights, staged / WEIGHTS, {"format": "pt"})
        difference = write_onnx(of, encoder, staged / ONNX)
        content = of.to_json() | {"embedding_dim": encoder.embedding_dim, "files": [WEIGHTS, ONNX]}
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


def write_onnx(of: Recipe, encoder: Encoder, path: Path) -> float:
    """Write the ONNX file and run it on another batch and length than it was traced with; returns the difference.

    Raises UserError when onnxruntime gives other values than torch.
    """
    name = of.input_name
    time = {"log_mel": {0: "batch", 2: "frames"}, "waveform": {0: "batch", 1: "samples"}}[name]
    module = _Embed(encoder).eval()
    with warnings.catch_warnings():
        # torch.export's exporter needs a package more; a length that a Python `if` reads is checked, and not traced.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.onnx.export(
            module,
            (example(of, 2, of.samples),),
            path,
            input_names=[name],
            output_names=["embedding"],
            dynamic_axes={name: time, "embedding": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )
    other = example(of, 3, of.samples + of.rate)
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


def example(of: Recipe, batch: int, samples: int) -> Tensor:
    """The encoder's input for `samples` of noise."""
    wave = torch.randn(batch, samples, generator=torch.Generator().manual_seed(0)) / 10
    return front_end(of)(wave)


def build_parser() -> argparse.ArgumentParser:
    """The command line; the table in docs/commands.md is made from it."""
    parser = argparse.ArgumentParser(
        prog=program("export"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", default="", metavar="RUN",
        help="a run's folder or name, or a checkpoint file (default: the newest run in runs/)")  # fmt: skip
    add("--out", type=Path, default=Path("exported"), metavar="DIR", help="folder to write (default: %(default)s)")
    add("--embedding", choices=["backbone", "projection"],
        help="of a simsiam encoder (default: encoder.simsiam.embedding of the training)")  # fmt: skip
    add("--segment-seconds", type=float, metavar="S",
        help="how songs are cut (default: as those of the training were)")  # fmt: skip
    add("--view-seconds", type=float, metavar="S",
        help="the middle S seconds of each segment (default: the whole segment)")  # fmt: skip
    add("--replace", action="store_true", help="write over an exported encoder")
    return parser


@one_line_errors
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    run = trained.read(args.checkpoint)
    if args.embedding:
        run = run.with_embedding(args.embedding)
    of = recipe.of_run(run)
    if args.segment_seconds:
        of = dataclasses.replace(of, segment_seconds=args.segment_seconds)
    of = dataclasses.replace(of, view_seconds=args.view_seconds)
    difference = export(run, of, args.out, args.replace)
    print(f"{args.out}: {of.config.encoder.encoder_type} of {run.path}, onnxruntime within {difference:.1e} of torch")
    print(f"songs are cut into segments of {of.segment_seconds:g} s")


if __name__ == "__main__":
    main()
