"""Export a trained encoder: python -m simsiam_dali.export --checkpoint runs/NAME --out exported

Writes a folder: encoder.safetensors (the weights, by their names in the model), config.json (front end, sizes, how
songs are cut) and encoder.onnx (a batch of segments to their embeddings; batch and time may have any length).
In Python, simsiam_dali.load_encoder("exported").embed_file("song.mp3") gives a song's embedding.
"""

import argparse
from pathlib import Path

from simsiam_dali.common.errors import one_line_errors
from simsiam_dali.config.cli import add_checkpoint, create_parser
from simsiam_dali.embedding.export import export
from simsiam_dali.embedding.run import read_run
from simsiam_dali.embedding.song_encoder import SongEncoder


def build_parser() -> argparse.ArgumentParser:
    """The command line; the table in docs/commands.md is made from it."""
    parser = create_parser("export", __doc__)
    add_checkpoint(parser)
    add = parser.add_argument
    add("--out", type=Path, default=Path("exported"), metavar="DIR", help="folder to write (default: %(default)s)")
    add("--segment-seconds", type=float, metavar="S",
        help="length of the segments that songs are cut into (default: as in training)")  # fmt: skip
    add("--view-seconds", type=float, metavar="S",
        help="the middle S seconds of each segment (default: the whole segment)")  # fmt: skip
    add("--replace", action="store_true", help="write over an exported encoder")
    return parser


@one_line_errors
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    run = read_run(args.checkpoint, embedding=args.embedding)
    songs = SongEncoder(run, args.segment_seconds, args.view_seconds)
    difference = export(songs, args.out, args.replace)
    encoder_type = run.config.encoder.encoder_type
    print(f"{args.out}: {encoder_type} of {run.path}, onnxruntime within {difference:.1e} of torch")
    print(f"songs are cut into segments of {songs.segment_seconds:g} s")


if __name__ == "__main__":
    main()
