"""How does a pretrained encoder compare? python benchmarks/real_music/pretrained.py --json FILE

    pip install tensorflow-cpu && pip install --no-deps musicnn    # for this benchmark alone; its weights are in there

musicnn (Pons and Serra 2019, arXiv:1909.06654) is a tagger that others trained on 200,000 songs of the Million Song
Dataset and their 50 commonest tags. It embeds the songs that `equal_time.py --part unheard` or `--part fifth` scores,
and stands beside that result, which is in the repository. A segment's vector is the mean over its patches of 3 s of a
layer before the tags. The package brings the graph and the weights; none of its code is run, since that needs older
libraries than ours.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import equal_time
import halves
import numpy as np
import run
import torch
from equal_time_scores import METRICS, STAGES, by_seed, difference, for_every_seed, newest, of_songs, shown, songs_asked
from torch import Tensor
from torchaudio.transforms import MelSpectrogram

sys.path.append(str(Path(__file__).resolve().parents[1]))
import machine

from simsiam_dali.common.distributed import World
from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.config.load import load_config
from simsiam_dali.data.shards import open_shards
from simsiam_dali.embedding.features import Features
from simsiam_dali.embedding.table import Embeddings, read_song_embeddings
from simsiam_dali.embedding.write import CleanViews, embedding_config, write_table
from simsiam_dali.training.data import log_mel_settings

MODEL = "MSD_musicnn"
LAYERS = {
    "max": ("model/Max", 753),
    "mean": ("model/moments/Squeeze", 753),
    "penultimate": ("model/batch_normalization_10/batchnorm/add_1", 200),
    "tags": ("model/Sigmoid", 50),
}
"""What a layer is called in musicnn's graph, and how many numbers it has. max and mean: of the feature maps' channels
over the time of a patch; penultimate: the last hidden layer; tags: their probabilities."""
ROWS = {
    "musicnn, its last hidden layer": ("penultimate",),
    "musicnn, maxima and means of its feature maps": ("max", "mean"),
    "musicnn, its 50 tags": ("tags",),
}
RESULTS = {equal_time.UNHEARD: "within-songs-unheard", equal_time.FIFTH: "within-songs-fifth"}
"""A part to the result that stands beside it."""
RATE, PATCH = 16000, 187
"""Hz, and the frames of a patch: what musicnn learned from."""
PATCHES_AT_ONCE = 32
"""Their feature maps take 20 MB each."""


def tensorflow() -> Any:
    """The library, imported after torch: the other way round, the process dies. Raises UserError without it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # it prints what it was built for
    if find_spec("tensorflow") is None:
        raise UserError("musicnn's weights need TensorFlow: pip install tensorflow-cpu")
    tf = import_module("tensorflow")
    tf.get_logger().setLevel("ERROR")  # what musicnn's graph needs is called deprecated
    return tf


def frozen(tf: Any, model: str, outputs: list[str]) -> Any:
    """The part of musicnn's graph that leads to `outputs`, with the trained weights as constants.

    The graph as it is stored has the training's gradients too, which today's TensorFlow refuses.
    """
    spec = find_spec("musicnn")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("musicnn is not installed: pip install --no-deps musicnn")
    folder = f"{spec.submodule_search_locations[0]}/{model}/"
    stored = tf.compat.v1.MetaGraphDef()
    stored.ParseFromString(Path(folder, ".meta").read_bytes())
    graph_def = tf.compat.v1.graph_util.extract_sub_graph(stored.graph_def, outputs)
    weights = tf.compat.v1.train.NewCheckpointReader(folder)
    for node in graph_def.node:
        if node.op == "VariableV2":
            name, value = node.name, weights.get_tensor(node.name)
            node.Clear()
            node.name, node.op = name, "Const"
            node.attr["dtype"].type = tf.as_dtype(value.dtype).as_datatype_enum
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
    graph = tf.Graph()
    with graph.as_default():
        tf.import_graph_def(graph_def, name="")
    return graph


def log_mel() -> Callable[[Tensor], Tensor]:
    """Waveforms `(B, samples)` to musicnn's input `(B, frames, 96)`: librosa's mel power, compressed."""
    mel = MelSpectrogram(
        RATE, n_fft=512, hop_length=256, n_mels=96, f_max=RATE / 2, power=2, norm="slaney", mel_scale="slaney"
    )

    def compressed(wave: Tensor) -> Tensor:
        return torch.log10(1 + 10000 * mel(wave).transpose(1, 2))

    return compressed


def musicnn() -> Callable[[Tensor], Tensor]:
    """Waveforms `(B, samples)` at 16 kHz to `(B, D)`: the mean over the patches of all layers, one after another."""
    tf, outputs = tensorflow(), [name for name, _ in LAYERS.values()]
    graph = frozen(tf, MODEL, outputs)
    spectrogram, training = (
        next(op.outputs[0] for op in graph.get_operations() if op.type == "Placeholder" and op.outputs[0].dtype == kind)
        for kind in (tf.float32, tf.bool)
    )
    threads = len(os.sched_getaffinity(0))
    options = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=threads, inter_op_parallelism_threads=1)
    session = tf.compat.v1.Session(graph=graph, config=options)
    front_end, fetched = log_mel(), [f"{name}:0" for name in outputs]

    def embed(wave: Tensor) -> Tensor:
        frames = front_end(wave)
        patches = frames.unfold(1, PATCH, PATCH).transpose(2, 3)  # (B, patches, 187, 96)
        found = [
            session.run(fetched, {spectrogram: part.numpy(), training: False})
            for part in patches.flatten(0, 1).split(PATCHES_AT_ONCE)
        ]
        each = np.concatenate([np.concatenate([own.reshape(len(own), -1) for own in part], axis=1) for part in found])
        return torch.from_numpy(each.reshape(*patches.shape[:2], -1).mean(axis=1))

    return embed


def embed(asked: Path, table: Path) -> None:
    """Embed the songs of these shards by all layers."""
    shards = open_shards(asked)
    config = embedding_config(load_config(halves.ROOT / "configs" / "real_music_cpu.yaml"), shards.segment_seconds)
    if config.data.sample_rate != RATE:
        raise UserError(f"musicnn takes audio at {RATE} Hz")
    provenance = halves.provenance(shards, MODEL, "+".join(LAYERS))
    views = CleanViews(config, shards, log_mel_settings(config), World(0, 1, torch.device("cpu")))
    print(write_table(Features(MODEL, "raw", musicnn()), views, provenance, table))


def of_layers(songs: Embeddings, layers: Sequence[str]) -> Embeddings:
    """A table of some of the layers."""
    ends = dict(zip(LAYERS, np.cumsum([size for _, size in LAYERS.values()]), strict=True))
    columns = np.concatenate([np.arange(ends[layer] - LAYERS[layer][1], ends[layer]) for layer in layers])
    within = songs.within
    if within:
        within = replace(within, axes=within.axes[:, columns], rest=within.rest[columns])
    return replace(songs, vectors=songs.vectors[:, columns], within=within)


def page_lines(doc: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[str]:
    """The table. recipe: the document of `equal_time.py --part unheard`."""
    soundtracks, env = of_songs(doc, "soundtracks"), doc["environment"]
    if doc["soundtracks"] != recipe["soundtracks"]:
        raise UserError("the two results are of other songs: measure both again")
    ours = recipe["scores"][STAGES]
    rows = {STAGES: ours, **doc["scores"]}
    yield "| | 5-NN | SimSiam by stages minus it | mAP@10 | SimSiam by stages minus it |"
    yield "|---|---|---|---|---|"
    for row, own in rows.items():
        cells = []
        for metric in METRICS:
            gap = None if own is ours else difference(ours, for_every_seed(own, ours), metric)
            cells.append(f"{np.mean([*by_seed(own, metric).values()]):.3f}")
            cells.append("" if gap is None else shown(gap, soundtracks))
        yield f"| {row} | {' | '.join(cells)} |"
    yield ""
    songs = songs_asked(doc, np.full(len(soundtracks), True))
    scored = f"{songs} songs of {len(set(soundtracks))} soundtracks"
    yield f"{scored}; {env['cpu']}, {env['cores']} cores; {env['date']}, commit {env['commit']}."


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path("real_music"), metavar="DIR",
        help="everything is kept here (default: %(default)s)")  # fmt: skip
    add("--music", type=Path, metavar="DIR", help="where the sets are fetched to (default: WORK/unheard/music)")
    add("--part", choices=list(RESULTS), default=equal_time.UNHEARD, help="soundtracks to embed (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the result here")
    args = parser.parse_args()
    recipe, work = json.loads(newest(RESULTS[args.part]).read_text()), args.work.resolve()
    sets = equal_time.prepare(args.part, work, (args.music or work / equal_time.UNHEARD / "music").resolve(), [])
    doc: dict[str, Any] = {"scores": {}, "soundtracks": {}, "environment": machine.environment(torch.device("cpu"))}
    for half, asked in sets.asked.items():
        table = work / args.part / "pretrained" / f"{MODEL}-{asked.name}.parquet"
        if not table.exists():
            embed(asked, table)
        songs = read_song_embeddings(table)
        for row, layers in ROWS.items():
            vectors = run.SEARCHES[recipe["search"]](of_layers(songs, layers))
            found = run.of_each_song(table, vectors=vectors)
            own = doc["scores"].setdefault(row, {}).setdefault("0", {})
            own[half] = {metric: found[metric].round(4).tolist() for metric in METRICS}
            doc["soundtracks"][half] = found["soundtrack/of"].tolist()
    if args.json:
        equal_time.write(doc, args.json)
    print("\n".join(page_lines(doc, recipe)))


if __name__ == "__main__":
    main()
