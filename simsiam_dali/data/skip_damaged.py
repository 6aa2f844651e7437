"""Skip damaged segments without changing the reader's order.

DALI stores the reader's position as the epoch, the state of its random numbers and the number of samples read in the
epoch, and restores it by drawing again, tars and samples: the position is valid only for as many tars with as many
samples. Removing a sample from its index would change the order, so that segments are lost or seen twice. So its entry
stays, and points to a placeholder: another sample's audio, which decodes, with a row that no segment has, by which the
loader drops it from the batch. All other segments keep their batch and their random draws, and all ranks their number
of steps.
"""

import dataclasses
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import soundfile as sf
import torch

from simsiam_dali.common.errors import UserError
from simsiam_dali.data.format import index_text, read_index, row_of
from simsiam_dali.data.graph import GraphConfig, Source
from simsiam_dali.data.pipeline import PipelineSettings, build

Rows = Mapping[str, set[int]]
"""Rows of segments by the name of their shard."""


def reason_of(error: Exception) -> str:
    """The reason in DALI's error, in one line: it follows the place in the graph and "encountered:"."""
    return str(error).rpartition("encountered:")[2].strip().partition("\n")[0]


def with_placeholders(source: Source, skipped: Rows, folder: Path) -> tuple[Source, set[int]]:
    """The source with indexes, written to `folder`, in which placeholders replace the segments `skipped`; their rows.

    Raises UserError if no other segment is left.
    """

    def skipped_of(tar: Path | str) -> set[int]:
        return skipped.get(str(tar).rpartition("/")[2], set())

    pairs = list(zip(source.tars, source.indexes, strict=True))
    tars, indexes, placeholder_rows = list(source.tars), list(source.indexes), set[int]()
    for n, (tar, index) in enumerate(pairs):
        if not (bad := skipped_of(tar)):
            continue
        intact = (  # in this tar or, if the whole tar is damaged, in another, to which its entries then point
            (of, members)
            for of, its_index in [(tar, index), *pairs]
            for members in read_index(its_index)
            if row_of(members) not in skipped_of(of)
        )
        if (donor := next(intact, None)) is None:
            raise UserError("no segment of the shards is left that decodes")
        tars[n], audio = donor[0], donor[1][source.codec]
        # The row is the first 8 bytes of the donor's tar header, digits of its name: far above any row.
        offset, _, name = audio
        placeholder = {source.codec: audio, "row": (offset - tarfile.BLOCKSIZE, 8, name)}
        placeholder_rows.add(int.from_bytes(name[:8].encode(), "little"))
        samples = [placeholder if row_of(members) in bad else members for members in read_index(index)]
        indexes[n] = folder / f"{n}.idx"
        indexes[n].write_text(index_text(samples))
    return dataclasses.replace(source, tars=tuple(tars), indexes=tuple(indexes)), placeholder_rows


def find_undecodable(
    graph: GraphConfig, settings: PipelineSettings, state: str | None, batches: int, skipped: Rows
) -> dict[int, str]:
    """Rows in the batch that comes `batches` after `state` which do not decode to a valid segment, with reasons.

    Includes the donors of the batch's placeholders. Raises RuntimeError, DALI's, if a tar cannot be read.
    """
    with TemporaryDirectory(prefix="simsiam-dali-") as name:
        folder = Path(name)
        source, _ = with_placeholders(graph.source, skipped, folder)
        rows = rows_in_batch(dataclasses.replace(graph, source=source), settings, state, batches, folder)
        samples: dict[int, tuple[Path | str, Path]] = {}  # row -> its tar, and an index of it alone
        for tar, index in zip(graph.source.tars, graph.source.indexes, strict=True):
            for members in read_index(index):
                if (row := row_of(members)) in rows:
                    samples[row] = tar, folder / f"row {row}.idx"
                    samples[row][1].write_text(index_text([members]))
        return dict(_undecodable(graph, samples, settings.seed))


def rows_in_batch(
    graph: GraphConfig, settings: PipelineSettings, state: str | None, batches: int, folder: Path
) -> set[int]:
    """The rows in the batch that comes `batches` after `state`, without reading the shards; `folder`: for its files.

    DALI restores a state into the same graph only, so the whole graph runs: on silence, under the samples' names.
    """
    codec, rate = graph.source.codec, graph.log_mel.sample_rate
    silent = folder / "silence.wav"  # DALI's decoder goes by the content, not by the sample's codec
    sf.write(silent, np.zeros(round(graph.source.segment_seconds * rate), np.float32), rate, "PCM_16")
    size = silent.stat().st_size
    indexes = []
    for number, index in enumerate(graph.source.indexes):
        samples = [{codec: (0, size, m[codec][2]), "row": (0, 8, m["row"][2])} for m in read_index(index)]
        indexes.append(folder / f"silent {number}.idx")
        indexes[-1].write_text(index_text(samples))
    source = dataclasses.replace(graph.source, tars=(silent,) * len(indexes), indexes=tuple(indexes))
    pipeline = build(dataclasses.replace(graph, source=source), settings, state)
    for _ in range(batches):
        pipeline.run()
    *_, rows, _, _ = pipeline.run()
    # DALI gives a sample's source as TAR:OFFSET:NAME; the name is ROW.row.
    return {int(row.source_info().rpartition(":")[2].partition(".")[0]) for row in rows}


def _undecodable(
    graph: GraphConfig, samples: Mapping[int, tuple[Path | str, Path]], seed: int
) -> Iterator[tuple[int, str]]:
    """Decode each of `samples` (row -> tar, index) by itself, to a clean view or to raw audio, on the CPU."""
    spec, left = graph.log_mel, list(samples)
    raw = graph.mode == "raw"
    shape = (1, round(graph.seconds * spec.sample_rate)) if raw else (1, spec.frames(graph.seconds), spec.n_mels)
    while left:
        tars, indexes = zip(*(samples[row] for row in left), strict=True)
        whole = graph.source
        source = Source(tars, indexes, whole.codec, whole.native_rate, whole.segment_seconds)
        alone = dataclasses.replace(graph, source=source, mode="raw" if raw else "clean", epoch=None)
        pipeline = build(alone, PipelineSettings(1, 1, 1, seed, None))
        for row in left.copy():
            left.remove(row)
            try:
                data, its_row, total, _ = (torch.from_dlpack(x.as_tensor()) for x in pipeline.run())
            except (RuntimeError, MemoryError) as e:
                if "operator `nvidia.dali.fn.readers.webdataset`" in str(e):  # the tar, not the segment
                    raise RuntimeError(f"{samples[row][0]}: {reason_of(e)}") from e
                yield row, reason_of(e)
                break  # a DALI pipeline cannot run on after an error
            if data.shape != shape:
                yield row, f"it is too short for a view of {graph.seconds:g} s"
            elif not total.isfinite().all():
                yield row, "it holds values that are not finite"
            elif int(its_row) != row:
                yield row, f"its .row is damaged: it holds {int(its_row)}"
