"""How a data graph goes on without some segments, though DALI's reader knows no such thing.

DALI stores the reader's place as the epoch, the state of its draws and the number of samples taken since the epoch
began, and comes back to it by drawing again, tars and samples: the place only means something on as many tars with as
many samples. Were a sample's line taken out of its index, another order would come, with segments lost and seen twice.
So the line stays, and leads to a stand-in: another sample's audio, which decodes, with a row that no segment has, by
which it is dropped from the batch before anybody sees it. All other segments keep their batch and their draws, and all
ranks their number of steps.
"""

import dataclasses
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch

from simsiam_dali.common.errors import UserError
from simsiam_dali.data.dali import DataNode, build_on_cpu, pipeline_def
from simsiam_dali.data.format import Members, index_text, read_index
from simsiam_dali.data.pipeline import Graph, Pipeline, Source, build, read


def reason_of(error: Exception) -> str:
    """What DALI's error says, in one line: where in the graph, then "encountered:", then what."""
    return str(error).rpartition("encountered:")[2].strip().partition("\n")[0]


Settings = tuple[int, int, int, int, int | None]
"""Of `pipeline.build`: batch size, threads, batches ahead, seed, CUDA device number."""


def build_without(
    graph: Graph, settings: Settings, state: str | None, left_out: Mapping[str, set[int]]
) -> tuple[Pipeline, set[int]]:
    """`build(graph, *settings, state)` without the rows `left_out`, under the names of their shards.

    Also gives the rows that mark a stand-in.
    """
    with TemporaryDirectory(prefix="simsiam-dali-") as folder:  # DALI reads the indexes once
        source, marks = with_stand_ins(graph.source, left_out, Path(folder))
        return build(dataclasses.replace(graph, source=source), *settings, state=state), marks


def with_stand_ins(source: Source, left_out: Mapping[str, set[int]], folder: Path) -> tuple[Source, set[int]]:
    """The source on indexes, written to `folder`, where stand-ins take the places of the rows `left_out`; their marks.

    Raises UserError where nothing else is left.
    """
    tars, indexes, marks = list(source.tars), list(source.indexes), set[int]()
    for n, (tar, index) in enumerate(zip(source.tars, source.indexes, strict=True)):
        if not (bad := left_out.get(_name(tar))):
            continue
        samples = read_index(index)
        donor = next((members for members in samples if _row(members) not in bad), None)
        if donor is None:
            tars[n], donor = _any_sound(source, left_out)
        lines = [_stand_in(donor, source.codec) if _row(members) in bad else members for members in samples]
        indexes[n] = _write_index(folder, n, lines)
        marks.add(_mark(donor))
    return dataclasses.replace(source, tars=tuple(tars), indexes=tuple(indexes)), marks


def _any_sound(source: Source, left_out: Mapping[str, set[int]]) -> tuple[Path | str, Members]:
    """A sample that is not left out, and its tar."""
    for tar, index in zip(source.tars, source.indexes, strict=True):
        for members in read_index(index):
            if _row(members) not in left_out.get(_name(tar), ()):
                return tar, members
    raise UserError("no segment of the shards is left that decodes")


def _stand_in(donor: Members, codec: str) -> Members:
    """The donor's audio; as its row, the first bytes of the tar header before it, which are its name's."""
    offset, _, name = donor[codec]
    return {codec: donor[codec], "row": (offset - tarfile.BLOCKSIZE, 8, name)}


def _mark(donor: Members) -> int:
    """The row that `_stand_in` reads: eight digits of text, a number far above any row."""
    return int.from_bytes(donor["row"][2][:8].encode(), "little")


def damaged(
    graph: Graph,
    settings: Settings,
    state: str | None,
    batches: int,
    left_out: Mapping[str, set[int]],
) -> dict[int, str]:
    """Rows that do not decode to a sound segment, with reasons, among the batch that comes `batches` after `state`.

    Who is in that batch is found by the reader alone, without decoding; then each is decoded by itself.
    """
    batch_size, _, _, seed, _ = settings
    with TemporaryDirectory(prefix="simsiam-dali-") as folder:
        source, _ = with_stand_ins(graph.source, left_out, Path(folder))
        called = _roll_call(source, batch_size, seed, state, batches)
    indexes = dict(zip(map(str, graph.source.tars), graph.source.indexes, strict=True))
    lines = {
        _row(members): (tar, members)
        for tar, rows in called.items()
        for members in read_index(indexes[tar])
        if _row(members) in rows
    }
    return dict(_unsound(graph, lines, seed))


def _roll_call(source: Source, batch_size: int, seed: int, state: str | None, batches: int) -> dict[str, set[int]]:
    """Tar -> rows in the batch that comes `batches` after `state`, by the samples' names."""

    @pipeline_def(
        batch_size=batch_size,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=1,
        enable_checkpointing=True,
        exec_dynamic=True,
    )
    def define() -> tuple[DataNode, ...]:
        return tuple(read(source, seed))

    pipeline = define()
    build_on_cpu(pipeline)
    if state is not None:
        place = _with_reader_of(_bytes(state), _bytes(pipeline.checkpoint()))
        pipeline = define(checkpoint=place)
        build_on_cpu(pipeline)
    for _ in range(batches):
        pipeline.run()
    found: dict[str, set[int]] = {}
    for sample in pipeline.run()[1]:
        tar, _, name = sample.source_info().rsplit(":", 2)
        found.setdefault(tar, set()).add(int(name.partition(".")[0]))
    return found


def _unsound(graph: Graph, lines: Mapping[int, tuple[str, Members]], seed: int) -> Iterator[tuple[int, str]]:
    """Decode each sample by itself, to a clean view or to raw audio, on the CPU."""
    mode: Literal["raw", "clean"] = "raw" if graph.mode == "raw" else "clean"
    spec, left = graph.log_mel, list(lines)
    samples = round(graph.seconds * spec.sample_rate)
    shape = (1, samples) if mode == "raw" else (1, spec.frames(graph.seconds), spec.n_mels)
    while left:
        with TemporaryDirectory(prefix="simsiam-dali-") as folder:
            source = dataclasses.replace(
                graph.source,
                tars=tuple(lines[row][0] for row in left),
                indexes=tuple(_write_index(Path(folder), n, [lines[row][1]]) for n, row in enumerate(left)),
                shard_id=0,
                num_shards=1,
                shuffle_buffer=0,
            )
            alone = dataclasses.replace(graph, source=source, mode=mode, epoch=None)
            pipeline = build(alone, 1, 1, 1, seed, None, state=None)
            for row in left.copy():
                left.remove(row)
                try:
                    data, its_row, total, _ = (torch.from_dlpack(x.as_tensor()) for x in pipeline.run())
                except RuntimeError as e:
                    yield row, reason_of(e)
                    break  # DALI's graph does not go on after an error
                if data.shape != shape:
                    yield row, f"it is too short for a view of {graph.seconds:g} s"
                elif not total.isfinite().all():
                    yield row, "it holds values that are not finite"
                elif int(its_row) != row:
                    yield row, f"its .row is damaged: it says {int(its_row)}"


def _name(tar: Path | str) -> str:
    return str(tar).rpartition("/")[2]


def _row(members: Members) -> int:
    return int(members["row"][2].partition(".")[0])


def _write_index(folder: Path, number: int, samples: list[Members]) -> Path:
    path = folder / f"{number}.idx"
    path.write_text(index_text(samples))
    return path


# --- DALI's checkpoint is a protobuf: Checkpoint {repeated Operator = 1 {string name = 1; bytes state = 2}; ... = 2}


def _bytes(checkpoint: str | bytes) -> bytes:
    return checkpoint if isinstance(checkpoint, bytes) else checkpoint.encode("latin1")


def _with_reader_of(whole: bytes, own: bytes) -> bytes:
    """The checkpoint `own` with the reader's state from `whole`, of another graph with the same reader."""

    def is_reader(field: bytes) -> bool:
        return next(_fields(field))[1] == b"reader"

    (reader,) = (content for number, content in _fields(whole) if number == 1 and is_reader(content))
    return b"".join(
        _field(number, reader if number == 1 and is_reader(content) else content) for number, content in _fields(own)
    )


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, content) of a message's fields; all are length-delimited here."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key, size = varint(), varint()
        if key & 7 != 2:
            raise ValueError("DALI's checkpoint is not laid out as in DALI 2.4")
        yield key >> 3, message[at : at + size]
        at += size


def _field(number: int, content: bytes) -> bytes:
    size, length = len(content), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content
