"""The contrastive loss is its equation, unknown tags match nothing, and the 1-D CNN takes waveforms of any length."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from simsiam_dali.config.schema import SimpleConfig
from simsiam_dali.data.format import SONGS, read_table
from simsiam_dali.models.labels import MOST, SongLabels, first_label_ids
from simsiam_dali.models.losses import UNKNOWN, MetadataContrastiveLoss
from simsiam_dali.models.simple import MIN_SAMPLES, SimpleAudioEncoder
from simsiam_dali.packing.write import write_table

SWITCHES = ("artist", "album", "year", "folder")
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # embeddings, artists, albums, years, folders


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Inputs this small gain nothing from more, and on a busy machine waiting for the others takes seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tags(
    songs: int, artists: object = UNKNOWN, albums: object = UNKNOWN, years: object = UNKNOWN, folders: object = UNKNOWN
) -> list[Tensor]:
    """Label tensors of a batch; a number stands for the same in every row."""

    def rows(values: object) -> Tensor:
        return torch.full((songs, 1), values) if isinstance(values, int) else torch.tensor(values)

    return [rows(artists), rows(albums), rows(years).reshape(songs), rows(folders)]


def random_batch(seed: int, kind: str = "mixed") -> Batch:
    """Float64 embeddings with multi-artist, multi-album songs; about a third of everything is unknown."""
    rng = np.random.default_rng(seed)
    size = {"one": 1, "two": 2}.get(kind, int(rng.integers(3, 24)))
    artists = rng.integers(-2, 6, (size, int(rng.integers(1, 4)))).clip(UNKNOWN)
    albums = rng.integers(-4, 9, (size, int(rng.integers(1, 6)))).clip(UNKNOWN)
    years = np.where(rng.random(size) < 0.4, UNKNOWN, rng.integers(1960, 1980, size))
    folders = rng.integers(-3, 6, (size, int(rng.integers(1, 3)))).clip(UNKNOWN)
    for labels in (artists, albums, years, folders):
        if kind == "all unknown":
            labels[:] = UNKNOWN
        elif kind == "all the same":
            labels[:] = 7
    embeddings = rng.standard_normal((size, int(rng.integers(2, 10)))) * rng.choice([1e-3, 1, 1e3])
    values = (embeddings, artists, albums, years, folders)
    return tuple(map(torch.from_numpy, values))  # type: ignore[return-value]


def reference(batch: Batch, t: float, switches: Sequence[bool], threshold: int) -> tuple[float, int]:
    """Equation 2 of arXiv:2004.11362 as it is written, one pair at a time in float64."""
    artist, album, year, folder = switches
    embeddings, artists, albums, years, folders = (values.numpy() for values in batch)
    z = embeddings.astype(np.float64) / np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True)

    def known(ids: np.ndarray) -> set[int]:
        return set(ids.tolist()) - {UNKNOWN}

    def match(i: int, j: int) -> bool:
        near = UNKNOWN not in (years[i], years[j]) and abs(int(years[i]) - int(years[j])) <= threshold
        return (
            (artist and bool(known(artists[i]) & known(artists[j])))
            or (album and bool(known(albums[i]) & known(albums[j])))
            or (year and near)
            or (folder and bool(known(folders[i]) & known(folders[j])))
        )

    losses = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if match(i, p)]
        if positives:
            # the largest term is taken out of the sum, which would overflow at low temperatures
            largest = max(z[i] @ z[a] / t for a in others)
            log_sum = largest + math.log(sum(math.exp(z[i] @ z[a] / t - largest) for a in others))
            losses.append(-sum(z[i] @ z[p] / t - log_sum for p in positives) / len(positives))
    return (sum(losses) / len(losses) if losses else 0.0), len(losses)


def create_loss(**changes: Any) -> MetadataContrastiveLoss:
    return MetadataContrastiveLoss(SimpleConfig(**changes))


@pytest.mark.parametrize("kind", ["mixed", "one", "two", "all unknown", "all the same"])
def test_loss_equals_the_double_loop(kind: str) -> None:
    compared = 0
    for seed in range(60):
        rng = np.random.default_rng([seed, 1])
        artist, album, year, folder = (bool(on) for on in rng.integers(0, 2, 4))
        artist |= not (album or year or folder)
        t, threshold = float(rng.choice([0.005, 0.07, 0.5, 2.0])), int(rng.integers(0, 4))
        batch = random_batch(seed, kind)
        expected, expected_anchors = reference(batch, t, (artist, album, year, folder), threshold)
        switches = {"use_artist": artist, "use_album": album, "use_year": year, "use_folder": folder}
        loss_fn = create_loss(contrastive_temperature=t, year_threshold=threshold, **switches)

        loss, anchors = loss_fn(*batch)
        assert (loss.dtype, anchors.dtype, anchors.item()) == (torch.float64, torch.int64, expected_anchors)
        assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        loss, anchors = loss_fn(batch[0].float(), *batch[1:])
        assert (loss.dtype, loss.shape, anchors.item()) == (torch.float32, (), expected_anchors)
        # cosines are rounded to about 1e-7, and the temperature magnifies that
        assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-6 * max(1, 1 / t))
        compared += expected_anchors
    assert (compared == 0) == (kind in ("one", "all unknown"))


@pytest.mark.parametrize("seed", range(4))
def test_gradient_is_that_of_finite_differences(seed: int) -> None:
    embeddings, *labels = random_batch(seed)
    embeddings = torch.nn.functional.normalize(embeddings, dim=1) * 2
    loss_fn = create_loss()
    assert loss_fn(embeddings, *labels)[1] > 1
    assert torch.autograd.gradcheck(lambda e: loss_fn(e, *labels)[0], embeddings.requires_grad_())


def test_songs_without_a_positive_still_repel() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.2]], requires_grad=True)
    loss, anchors = create_loss()(embeddings, *tags(3, artists=[[4], [4], [5]]))
    loss.backward()
    assert anchors == 2
    assert embeddings.grad is not None
    assert embeddings.grad[2].abs().sum() > 1e-3


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batch_without_a_pair_gives_exactly_zero(size: int) -> None:
    embeddings = torch.randn(size, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    artists = [[i] for i in range(size)]
    loss, anchors = create_loss()(embeddings, *tags(size, artists))
    loss.backward()
    assert (loss.item(), anchors.item()) == (0, 0)
    assert embeddings.grad is not None
    assert (embeddings.grad == 0).all()


def test_loss_of_known_similarities() -> None:
    """A pair at cosine 1, and a third song at cosine 0 to both: log(1 + e^(-1/t)) for each of the pair."""
    embeddings = torch.tensor([[3.0, 0.0], [0.5, 0.0], [0.0, 2.0]])
    for t in (0.1, 0.5, 1.0):
        loss, anchors = create_loss(contrastive_temperature=t)(embeddings, *tags(3, artists=[[1], [1], [2]]))
        assert anchors == 2
        assert loss.item() == pytest.approx(math.log1p(math.exp(-1 / t)), rel=1e-6, abs=1e-6)


def test_low_temperature_does_not_overflow() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    loss, _ = create_loss(contrastive_temperature=1e-3)(embeddings, *tags(3, artists=[[1], [1], [2]]))
    loss.backward()
    # the anchor whose negative is identical loses 2 / t, the other log 2
    assert loss.item() == pytest.approx((2000 + math.log(2)) / 2, rel=1e-6)
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()


def test_autocast_does_not_change_the_loss() -> None:
    embeddings, *labels = random_batch(3)
    embeddings = embeddings.float()
    loss_fn = create_loss(contrastive_temperature=0.07)
    exact, _ = loss_fn(embeddings, *labels)
    with torch.autocast("cpu", torch.bfloat16):
        same, _ = loss_fn(embeddings, *labels)
        rounded, _ = loss_fn(embeddings.bfloat16(), *labels)
    assert torch.equal(same, exact)
    assert torch.equal(rounded, loss_fn(embeddings.bfloat16().float(), *labels)[0])
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)


@pytest.mark.gpu
def test_nothing_makes_the_host_wait() -> None:
    batch = [values.cuda() for values in random_batch(5)]
    loss_fn = create_loss()
    expected, expected_anchors = loss_fn(*batch)
    embeddings = batch[0].clone().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, anchors = loss_fn(embeddings, *batch[1:])
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (loss.item(), anchors.item()) == (expected.item(), expected_anchors.item())


def pairs(match: Tensor) -> set[tuple[int, int]]:
    assert match.dtype == torch.bool
    assert torch.equal(match, match.T)
    assert not match.diagonal().any()
    return {(i, j) for i, j in match.nonzero().tolist() if i < j}


def test_each_switch_matches_by_its_own_tag_only() -> None:
    labels = tags(
        4,
        artists=[[1], [1], [2], [3]],
        albums=[[5], [6], [5], [7]],
        years=[1990, 1970, 1950, 1991],
        folders=[[0], [1], [2], [1]],
    )
    only = {tag: create_loss(**{f"use_{name}": name == tag for name in SWITCHES}) for tag in SWITCHES}
    found = {tag: pairs(loss_fn.positives(*labels)) for tag, loss_fn in only.items()}
    assert found == {"artist": {(0, 1)}, "album": {(0, 2)}, "year": {(0, 3)}, "folder": {(1, 3)}}
    assert pairs(create_loss().positives(*labels)) == {(0, 1), (0, 2), (0, 3)}


def test_any_artist_and_any_album_match() -> None:
    labels = tags(4, artists=[[1, 2], [3, 1], [2, -1], [4, -1]], albums=[[0, -1], [1, -1], [2, 3], [9, 3]])
    assert pairs(create_loss().positives(*labels)) == {(0, 1), (0, 2), (2, 3)}


@pytest.mark.parametrize("column", range(4))
def test_unknown_matches_nothing(column: int) -> None:
    labels = tags(3)
    if column != 2:
        labels[column] = torch.tensor([[UNKNOWN, 1], [2, UNKNOWN], [UNKNOWN, UNKNOWN]])
    else:
        labels[column] = torch.tensor([UNKNOWN, UNKNOWN, 0])  # within the threshold of -1, were that a year
    assert not create_loss(use_folder=True).positives(*labels).any()


@pytest.mark.parametrize(("threshold", "expected"), [(0, {(0, 1)}), (2, {(0, 1), (0, 2), (1, 2), (2, 3)})])
def test_year_threshold_is_inclusive(threshold: int, expected: set[tuple[int, int]]) -> None:
    loss_fn = create_loss(year_threshold=threshold)
    assert pairs(loss_fn.positives(*tags(5, years=[1990, 1990, 1988, 1986, 1983]))) == expected


def song_table(tmp_path: Path, *songs: dict[str, Any]) -> pd.DataFrame:
    """A song table as packing writes and training reads it."""
    unrated = {"rating": math.nan, "duration": 60.0, "sample_rate": 16000, "channels": 1, "split": "train"}
    blank = {"path": "", "other_paths": [], "title": "", "audio_hash": "", "note": "", "genres": []} | unrated
    tagless: dict[str, Any] = {"artists": [], "albums": [], "album_artist": "", "year": None}
    write_table(tmp_path / SONGS, [blank | tagless | song for song in songs])
    return read_table(tmp_path / SONGS)


def matches(tmp_path: Path, by: str, *songs: dict[str, Any]) -> set[tuple[int, int]]:
    labels = SongLabels.from_songs(song_table(tmp_path, *songs), np.arange(len(songs)))
    loss_fn = create_loss(**{f"use_{name}": name == by for name in SWITCHES})
    return pairs(loss_fn.positives(*labels.of(torch.arange(len(songs)))))


def test_artists_compare_without_case_whitespace_and_unicode_form(tmp_path: Path) -> None:
    names = ["Sigur Rós", "  SIGUR  RO\u0301S ", "Sigur\u00a0Rós", "Sigur Ros", "STRASSE", "Straße"]
    found = matches(tmp_path, "artist", *({"artists": [name]} for name in names))
    assert found == {(0, 1), (0, 2), (1, 2), (4, 5)}
    assert matches(tmp_path, "artist", {"artists": ["A", "B"]}, {"artists": ["C", "b"]}) == {(0, 1)}


@pytest.mark.parametrize(
    "name", ["", "Unknown", "[unknown]", "Unknown Artist", "VARIOUS ARTISTS", "Various", "N/A", "?"]
)
def test_placeholders_are_no_artist(tmp_path: Path, name: str) -> None:
    assert matches(tmp_path, "artist", {"artists": [name]}, {"artists": [name, "A"]}, {"artists": []}) == set()


def test_album_is_its_title_and_its_owner(tmp_path: Path) -> None:
    best = {"albums": ["Greatest Hits"]}
    songs = (
        best | {"artists": ["Queen"]},
        best | {"artists": ["Abba"]},
        best | {"artists": ["Queen", "Guest"]},
        best | {"artists": ["Guest"], "album_artist": "queen"},
        {"albums": ["greatest  hits", "Live"], "artists": ["ABBA"]},
        {"albums": ["LIVE"], "artists": ["Abba"]},
        {"albums": ["Live"], "artists": ["Queen"]},
    )
    assert matches(tmp_path, "album", *songs) == {(0, 2), (0, 3), (2, 3), (1, 4), (4, 5)}


def test_compilation_joins_its_songs_and_no_owner_none(tmp_path: Path) -> None:
    album = {"albums": ["Summer"]}
    songs = (
        album | {"artists": ["A"], "album_artist": "Various Artists"},
        album | {"artists": ["B"], "album_artist": "VA"},
        album | {"artists": ["Various"]},
        album | {"artists": ["A"]},
        album | {"artists": ["Unknown"], "album_artist": "Unknown"},
        album,
        {"albums": ["Unknown Album"], "artists": ["A"], "album_artist": "Various Artists"},
        {"albums": ["unknown album"], "artists": ["A"], "album_artist": "Various Artists"},
    )
    assert matches(tmp_path, "album", *songs) == {(0, 1), (0, 2), (1, 2)}


def test_songs_match_by_any_folder_that_holds_a_copy_but_not_by_the_music_folder(tmp_path: Path) -> None:
    songs = (
        {"path": "a/one/x.mp3"},
        {"path": "a/one/y.mp3", "other_paths": ["best of/y.mp3"]},
        {"path": "a/two/x.mp3"},
        {"path": "best of/z.mp3"},
        {"path": "loose.mp3"},
        {"path": "loose too.mp3", "other_paths": ["a/x.mp3"]},
        {"path": "A/one/x.mp3"},
    )
    assert matches(tmp_path, "folder", *songs) == {(0, 1), (1, 3)}


def test_unknown_years_match_nothing(tmp_path: Path) -> None:
    assert matches(tmp_path, "year", *({"year": year} for year in (2000, None, 2002, None, 2003))) == {(0, 2), (2, 4)}


def test_labels_are_looked_up_by_segment(tmp_path: Path) -> None:
    songs = song_table(
        tmp_path,
        {"artists": ["Unknown", "A", "B", "a"], "albums": ["X"], "year": 1999},
        {"artists": ["B"], "albums": ["Y", "Z", "X"], "album_artist": "A"},
        {},
    )
    labels = SongLabels.from_songs(songs, np.array([2, 0, 0, 1])).to("cpu")
    assert (labels.artists.shape, labels.albums.shape, labels.years.shape) == ((3, 2), (3, 3), (3,))
    artists, albums, years, folders = labels.of(torch.tensor([3, 0, 1]))
    assert artists.tolist() == [[1, UNKNOWN], [UNKNOWN] * 2, [0, 1]]
    assert albums.tolist() == [[1, 2, 0], [UNKNOWN] * 3, [0, UNKNOWN, UNKNOWN]]
    assert years.tolist() == [UNKNOWN, UNKNOWN, 1999]
    assert folders.tolist() == [[UNKNOWN]] * 3
    assert {values.dtype for values in (artists, albums, years, folders, labels.segment_song)} == {torch.int64}
    tagless = SongLabels.from_songs(songs[2:], np.array([0]))
    assert (tagless.artists.tolist(), tagless.albums.tolist()) == ([[UNKNOWN]], [[UNKNOWN]])


def test_song_on_very_many_albums_keeps_the_shared_ones(tmp_path: Path) -> None:
    many = {"artists": ["A"], "albums": [f"Album {i}" for i in range(200)]}
    others = [{"artists": ["A"], "albums": [f"Album {i}"]} for i in (150, 199)]
    labels = SongLabels.from_songs(song_table(tmp_path, many, *others), np.arange(3))
    assert labels.albums.shape == (3, MOST)
    assert labels.albums[0].tolist() == [*range(MOST - 2), 150, 199]
    assert labels.albums[1:, 0].tolist() == [150, 199]


def encoder(**changes: int) -> SimpleAudioEncoder:
    torch.manual_seed(0)
    return SimpleAudioEncoder(**({"embedding_dim": 24, "base_channels": 4} | changes))


def waves(batch: int, samples: int = 16000) -> Tensor:
    return torch.rand(batch, samples, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("samples", [MIN_SAMPLES, 16000, 3 * 22050 + 1, 960_000])
def test_waveforms_of_any_length_give_one_embedding(samples: int) -> None:
    model = encoder().eval()
    with torch.no_grad():
        embeddings = model(waves(2, samples))
        assert torch.equal(model.embed(waves(2, samples)), embeddings)
    assert (embeddings.shape, embeddings.dtype) == ((2, 24), torch.float32)
    assert embeddings.isfinite().all()
    assert (model.embedding_dim, model.output_dim) == (24, 24)


def test_frames_are_as_long_and_as_far_apart_as_documented() -> None:
    model = encoder().eval()
    with torch.no_grad():
        for samples, frames in ((MIN_SAMPLES, 1), (MIN_SAMPLES + 8191, 1), (MIN_SAMPLES + 8192, 2)):
            assert model.blocks(model.filter_bank(waves(1, samples)[:, None])).shape == (1, 16 * 4, frames)


def test_input_that_is_no_batch_of_long_enough_waveforms_is_refused() -> None:
    for wrong in (waves(2, MIN_SAMPLES - 1), waves(2)[0], waves(2)[:, None]):
        with pytest.raises(ValueError, match=f"at least {MIN_SAMPLES}"):
            encoder()(wrong)


def test_seed_decides_the_weights() -> None:
    one, same = encoder().state_dict(), encoder().state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    torch.manual_seed(1)
    other = SimpleAudioEncoder(24, 4).state_dict()
    assert not torch.equal(one["filter_bank.0.weight"], other["filter_bank.0.weight"])


def test_convolutions_keep_the_variance() -> None:
    for name, weight in encoder(base_channels=32).named_parameters():
        if weight.ndim == 3:
            inputs = weight[0].numel()
            assert weight.std().item() == pytest.approx(math.sqrt(2 / inputs), rel=0.05), name


def test_head_sees_mean_and_maximum_over_time() -> None:
    model = encoder().eval()
    with torch.no_grad():
        frames = model.blocks(model.filter_bank(waves(2, 60_000)[:, None]))
        assert frames.shape[2] > 1
        expected = model.head(torch.cat([frames.mean(2), frames.max(2).values], dim=1))
        torch.testing.assert_close(model(waves(2, 60_000)), expected)


def test_gradient_reaches_every_parameter() -> None:
    model = encoder().train()
    artists = [[1], [1], [2], [2]]
    create_loss()(model(waves(4)), *tags(4, artists))[0].backward()
    for name, parameter in model.named_parameters():
        # the same bias on every embedding still moves their angles
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_parameter_group_holds_all_once() -> None:
    model = encoder()
    (group,) = model.param_groups()
    assert group["fix_lr"] is False
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]


def test_embedding_does_not_depend_on_the_rest_of_the_batch() -> None:
    model = encoder()
    with torch.no_grad():
        model.train()(waves(4) * 0.3)  # statistics that are not the initial ones
        model.eval()
        together = model.embed(waves(4))
        alone = torch.cat([model.embed(wave[None]) for wave in waves(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_bf16_autocast_stays_close() -> None:
    model = encoder().eval()
    with torch.no_grad():
        exact = model(waves(2))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(waves(2)).float()
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=1).min() > 0.999


def test_songs_of_one_artist_move_together() -> None:
    """Two artists, one of low and one of high tones, each song with noise of its own."""
    artists = torch.arange(8) % 2
    time = torch.arange(16000) / 16000
    tones = torch.sin(2 * math.pi * (300 + 900 * artists)[:, None] * time) * 0.2 + 0.5 * waves(8)
    model, loss_fn = encoder().train(), create_loss(contrastive_temperature=0.2)
    optimizer = torch.optim.SGD(model.param_groups(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(20):
        loss, anchors = loss_fn(model(tones), *tags(8, artists[:, None].tolist()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert anchors == 8
    # of seven others three are positives: log 7 without any order, log 3 when they coincide far from the rest
    assert losses[0] > 1.5
    assert losses[-1] < 1.2


def test_a_song_s_label_is_its_first_known_name() -> None:
    songs = pd.DataFrame(
        {
            "artists": [["Abba"], [" ABBA ", "Cher"], ["Various Artists"], ["<unknown>", "Cher"], [], ["Cher"]],
            "genres": [["Pop"], ["pop"], [], ["Rock"], ["none", "Rock"], ["Pop", "Rock"]],
        }
    )
    assert first_label_ids(songs, "artists").tolist() == [0, 0, -1, 1, -1, 1]
    assert first_label_ids(songs, "genres").tolist() == [0, 0, -1, 1, 1, 0]
