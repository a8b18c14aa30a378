"""Layouts of images in tiles, against a picture that is cut by hand."""

from __future__ import annotations

import numpy as np
import pytest

from flashvlm_export.runtime.layout import (
    ImageLayout,
    choose_resolution,
    clip,
    fitted,
    interpolated,
    one_picture,
    overview_and_tiles,
    with_newline_at_end,
)

NEWLINE = np.array([-1.0, -1.0])


def by_hand(tiles: tuple[int, int], grid: tuple[int, int]) -> list[list[int]]:
    """Return the encoder's rows of the tiles' patches, line by line, found by walking over every pixel row."""
    lines = []
    for row in range(tiles[0] * grid[0]):
        line = []
        for column in range(tiles[1] * grid[1]):
            tile = 1 + (row // grid[0]) * tiles[1] + column // grid[1]
            line.append(tile * grid[0] * grid[1] + (row % grid[0]) * grid[1] + column % grid[1])
        lines.append(line)
    return lines


@pytest.mark.parametrize("tiles", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 3)])
def test_tokens_stand_line_by_line_across_tiles(tiles: tuple[int, int]) -> None:
    grid = (3, 4)
    size = (tiles[1] * grid[1] * 10, tiles[0] * grid[0] * 10)  # the shape of the tiles, so nothing is border
    rows, layout = overview_and_tiles(size, tiles, grid)
    lines = by_hand(tiles, grid)
    assert rows.order.tolist() == [*range(12), *(row for line in lines for row in line)]
    assert layout.grids == (grid, (len(lines), len(lines[0])))
    assert layout.length == layout.num_tokens + len(lines)


def test_borders_above_and_below_are_left_out() -> None:
    """Of 400 x 100 pixels in 2 x 2 tiles of 4 x 4 patches, two of eight lines show the picture."""
    rows, layout = overview_and_tiles((400, 100), (2, 2), (4, 4))
    lines = by_hand((2, 2), (4, 4))[3:5]
    assert rows.order[16:].tolist() == [row for line in lines for row in line]
    assert layout.grids[1] == (2, 8)


def test_borders_left_and_right_are_left_out() -> None:
    rows, layout = overview_and_tiles((100, 400), (2, 2), (4, 4))
    lines = [line[3:5] for line in by_hand((2, 2), (4, 4))]
    assert rows.order[16:].tolist() == [row for line in lines for row in line]
    assert layout.grids[1] == (8, 2)


def test_a_picture_of_less_than_a_line_has_its_overview_alone() -> None:
    _, layout = overview_and_tiles((2000, 3), (1, 3), (4, 4))
    assert layout.num_tokens == layout.length == 16
    tokens, places = layout.spread(np.array([3, 7]), np.ones((2, 2)), NEWLINE)
    assert places.tolist() == [3, 7]
    assert len(tokens) == 2


def test_a_picture_thinner_than_a_token_has_newlines_alone() -> None:
    """transformers cuts all columns of its lines away, and puts a newline behind each nevertheless."""
    _, layout = overview_and_tiles((3, 2000), (3, 1), (4, 4))
    assert (layout.num_tokens, layout.length) == (16, 16 + 12)
    rows, places = layout.spread(np.arange(16), np.ones((16, 2)), NEWLINE)
    assert places.tolist() == list(range(28))
    assert (rows[16:] == NEWLINE).all()
    assert layout.spread(np.array([3, 7]), np.ones((2, 2)), NEWLINE)[1].tolist() == [3, 7]


def test_with_everything_kept_newlines_stand_behind_each_line() -> None:
    _, layout = overview_and_tiles((400, 100), (2, 2), (4, 4))
    everything = np.arange(layout.num_tokens)
    tokens = np.repeat(everything[:, None], 2, 1).astype(float)
    rows, places = layout.spread(everything, tokens, NEWLINE)
    assert places.tolist() == list(range(layout.length))
    assert rows[:, 0].tolist() == [*range(16), *range(16, 24), -1, *range(24, 32), -1]


@pytest.mark.parametrize("seed", range(5))
def test_pruned_rows_are_those_of_the_whole_without_what_was_dropped(seed: int) -> None:
    """A newline stays where any token of its line does; every row keeps its place."""
    _, layout = overview_and_tiles((300, 200), (2, 2), (3, 3))
    rng = np.random.default_rng(seed)
    kept = np.sort(rng.choice(layout.num_tokens, 9, replace=False))
    tokens = rng.standard_normal((layout.num_tokens, 2))
    whole, _ = layout.spread(np.arange(layout.num_tokens), tokens, NEWLINE)
    rows, places = layout.spread(kept, tokens[kept], NEWLINE)
    np.testing.assert_array_equal(rows, whole[places])
    height, width = layout.grids[1]
    lines = {(index - 9) // width for index in kept.tolist() if index >= 9}
    assert int((rows == NEWLINE).all(1).sum()) == len(lines) <= height
    np.testing.assert_array_equal(layout.places_of(kept), places[~(rows == NEWLINE).all(1)])


def test_one_picture_has_no_newlines() -> None:
    layout = one_picture((2, 3))
    assert isinstance(layout, ImageLayout)
    tokens = np.ones((2, 4))
    rows, places = layout.spread(np.array([1, 4]), tokens, None)
    assert rows is tokens
    assert places.tolist() == [1, 4]
    assert layout.length == 6


@pytest.mark.parametrize(
    ("size", "resolution"),
    [((1000, 500), (1, 2)), ((500, 1000), (2, 1)), ((700, 700), (2, 2)), ((3000, 900), (1, 3)), ((1, 1), (1, 2))],
)
def test_the_resolution_that_shows_most_is_chosen(size: tuple[int, int], resolution: tuple[int, int]) -> None:
    """By hand for tiles of 336 pixels: what is shown of the image counts first, then how little is border."""
    known = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
    wanted = (336 * resolution[0], 336 * resolution[1])
    assert choose_resolution(size, known) == wanted


def test_an_image_is_fitted_into_its_resolution() -> None:
    assert fitted((1000, 500), (336, 672)) == (672, 336)
    assert fitted((1000, 10), (336, 672)) == (672, 7)  # 6.72 rounded up
    assert fitted((10, 1000), (672, 336)) == (7, 672)


@pytest.mark.parametrize("old", [(1, 1), (3, 3), (27, 27), (12, 30), (54, 7)])
@pytest.mark.parametrize("new", [(1, 1), (2, 2), (14, 14), (5, 20)])
def test_a_grid_is_scaled_as_torch_does(old: tuple[int, int], new: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch", reason="the scaling to compare with is torch's")
    rows = interpolated(np.arange(old[0] * old[1]).reshape(old), new)
    values = np.random.default_rng(0).standard_normal((*old, 5)).astype(np.float32)
    mixed = (values.reshape(-1, 5)[rows.order] * rows.weights[..., None]).sum(1)
    scaled = torch.nn.functional.interpolate(torch.from_numpy(values).permute(2, 0, 1)[None], new, mode="bilinear")
    # A place of up to 54 is known to 4e-6 in float32; values beside each other differ by some units.
    np.testing.assert_allclose(mixed.reshape(*new, 5), scaled[0].permute(1, 2, 0).numpy(), rtol=0, atol=2e-5)


def test_tokens_of_many_tiles_are_scaled_down_and_of_few_are_not() -> None:
    """Of 6 x 6 tiles to the tokens of 9; of 2 x 5 they are less than 1.1 times as long, and stay."""
    rows, layout = overview_and_tiles((600, 600), (6, 6), (3, 3), most_area=9)
    assert layout.grids == ((3, 3), (9, 9))
    assert rows.weights is not None
    assert len(rows.order) == layout.num_tokens == 9 + 81
    rows, layout = overview_and_tiles((500, 200), (2, 5), (3, 3), most_area=9)
    assert layout.grids == ((3, 3), (6, 15))
    assert (rows.weights == [1, 0, 0, 0]).all()


def test_a_clip_is_its_frames_one_after_the_other() -> None:
    layout = with_newline_at_end(clip([one_picture((2, 3)), one_picture((2, 3))], [0, 4]))
    assert (layout.num_tokens, layout.length) == (12, 13)
    assert layout.axes()[[0, 5, 6, 11]].tolist() == [[0, 0, 0], [0, 1, 2], [4, 0, 0], [4, 1, 2]]
    rows, places = layout.spread(np.array([1, 8]), np.ones((2, 2)), NEWLINE)
    assert places.tolist() == [1, 8, 12]
    assert rows[-1].tolist() == NEWLINE.tolist()
