from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashvlm_export.errors import BundleError, PromptError
from flashvlm_export.runtime.embeddings import TextEmbeddings, pad_text, splice, splice_positions


def table(rows: int = 11, width: int = 4, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, width)).astype(dtype)


def saved(array: np.ndarray, directory: Path) -> Path:
    np.save(directory / "text_embeddings.npy", array)
    return directory / "text_embeddings.npy"


@pytest.mark.parametrize("on_disk", [np.float16, np.float32])
@pytest.mark.parametrize("wanted", ["float16", "float32"])
def test_lookup_gives_the_rows_in_the_dtype_asked_for(on_disk: Any, wanted: str, tmp_path: Path) -> None:
    array = table(dtype=on_disk)
    embeddings = TextEmbeddings(saved(array, tmp_path))
    assert (embeddings.vocab_size, embeddings.width, embeddings.dtype) == (11, 4, np.dtype(on_disk))
    ids = np.array([3, 0, 10, 3])
    rows = embeddings.lookup(ids, wanted)
    assert type(rows) is np.ndarray
    assert rows.dtype == wanted
    np.testing.assert_array_equal(rows, np.stack([array[i] for i in ids]).astype(wanted))


def test_rows_belong_to_the_caller(tmp_path: Path) -> None:
    array = table()
    embeddings = TextEmbeddings(saved(array, tmp_path))
    embeddings.lookup([1, 2], "float32")[:] = 0
    np.testing.assert_array_equal(embeddings.lookup([1], "float32"), array[1:2])


def test_no_ids_give_no_rows(tmp_path: Path) -> None:
    rows = TextEmbeddings(saved(table(), tmp_path)).lookup(np.empty(0, np.int64), "float16")
    assert rows.shape == (0, 4)
    assert rows.dtype == np.float16


@pytest.mark.parametrize("ids", [[11], [-1], [0, 99], [2**40], [0.5], [[1, 2]], [True], ["a"]])
def test_ids_that_are_none_of_the_vocabulary(ids: list[Any], tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"outside of the model's vocabulary|not token ids"):
        TextEmbeddings(saved(table(), tmp_path)).lookup(ids, "float32")


@pytest.mark.parametrize(
    "array",
    [
        table(dtype=np.float64),
        table().astype(">f4"),
        np.zeros((3, 4), np.int64),
        np.zeros(4, np.float32),
        np.zeros((0, 4), np.float32),
        np.array([{}]),
    ],
    ids=["float64", "big_endian", "int64", "1d", "no_rows", "objects"],
)
def test_file_of_another_kind_is_a_bundle_error(array: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="embedding table cannot be read"):
        TextEmbeddings(saved(array, tmp_path))


@pytest.mark.parametrize("kept", [0, 5, 60, 200])
def test_truncated_file_is_a_bundle_error(kept: int, tmp_path: Path) -> None:
    path = saved(table(), tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BundleError, match="embedding table cannot be read"):
        TextEmbeddings(path)


def test_missing_file_and_archive_are_bundle_errors(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="embedding table cannot be read"):
        TextEmbeddings(tmp_path / "none.npy")
    np.savez(tmp_path / "a.npz", table())
    with pytest.raises(BundleError, match="an archive"):
        TextEmbeddings(tmp_path / "a.npz")


def test_pad_text() -> None:
    rows = [table(3), table(5), table(0)]
    embeds, mask = pad_text(rows)
    assert embeds.shape == (3, 5, 4)
    assert embeds.dtype == np.float32
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask.sum(1), [3, 5, 0])
    for row, padded, valid in zip(rows, embeds, mask, strict=True):
        np.testing.assert_array_equal(padded[valid], row)
        assert not padded[~valid].any()


def test_prompt_without_text_gives_one_masked_row() -> None:
    embeds, mask = pad_text([table(0, dtype=np.float16)])
    assert embeds.shape == (1, 1, 4)
    assert embeds.dtype == np.float16
    assert not mask.any()


def test_no_prompt_at_all() -> None:
    with pytest.raises(PromptError, match="no prompt"):
        pad_text([])


@pytest.mark.parametrize(
    ("positions", "kept"), [([], []), ([0], [3]), ([6], [1]), ([2, 3], [2, 4]), ([0, 3, 6], [1, 0, 5])]
)
def test_splice_equals_a_row_by_row_reference(positions: list[int], kept: list[int]) -> None:
    text = table(7)
    visual = [table(k) + 100 * (i + 1) for i, k in enumerate(kept)]
    expected: list[np.ndarray] = []
    for index, row in enumerate(text):
        expected.extend(visual[positions.index(index)] if index in positions else [row])
    joined = splice(text, positions, visual)
    assert joined.shape == (7 - len(positions) + sum(kept), 4)
    np.testing.assert_array_equal(joined, np.stack(expected))


@pytest.mark.parametrize(
    ("places", "kept"),
    [([], []), ([0], [[0, 4]]), ([6], [[2]]), ([2, 3], [[1, 3], [0]]), ([0, 3, 6], [[4], [], [1, 2]])],
)
def test_splice_positions_are_those_of_the_prompt_that_kept_everything(
    places: list[int], kept: list[list[int]]
) -> None:
    """Splice all five tokens of each image, number the rows, and drop those that were not kept."""
    names = [f"text {row}" for row in range(7)]
    for image, place in enumerate(places):
        names[place] = f"image {image}"
    rows = [
        f"{name} {token}" if name.startswith("image") else name
        for name in names
        for token in range(5 if name.startswith("image") else 1)
    ]
    dropped = {f"image {image} {token}" for image, chosen in enumerate(kept) for token in set(range(5)) - set(chosen)}
    expected = [number for number, row in enumerate(rows) if row not in dropped]
    positions = splice_positions(7, places, [np.array(chosen, np.int64) for chosen in kept], [5] * len(kept))
    assert positions.dtype == np.int64
    assert positions.tolist() == expected


def test_splice_takes_the_dtype_of_the_text() -> None:
    assert splice(table(3, dtype=np.float16), [1], [table(2)]).dtype == np.float16


def test_splice_refuses_what_does_not_match() -> None:
    text, image = table(4), table(2)
    with pytest.raises(PromptError, match="placeholders do not match"):
        splice(text, [1], [image, image])
    for positions in ([4], [-1], [2, 1], [1, 1]):
        with pytest.raises(PromptError, match="positions are not in the prompt"):
            splice(text, positions, [image] * len(positions))
    with pytest.raises(BundleError, match="differ in width"):
        splice(text, [1], [table(2, width=5)])
