"""The methods that FlashVLM is compared with, each against what its paper says and not against its own code."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from flashvlm_export.errors import ConfigError
from flashvlm_export.selection import FlashVLMConfig, select_tokens
from flashvlm_export.selection.config import (
    CDPrunerConfig,
    ClsAttentionConfig,
    DivPruneConfig,
    RandomConfig,
    UniformConfig,
    VisionZipConfig,
    VisPrunerConfig,
)


def arrays(patches: int, seed: int = 0, llm_width: int = 24, text: int = 5) -> list[np.ndarray]:
    """One image."""
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal((1, patches, 16)),
        rng.random((1, patches)),
        rng.standard_normal((1, patches, llm_width)),
        rng.standard_normal((1, text, llm_width)),
        np.ones((1, text), bool),
    ]


def cosines(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(others, axis=1)[None]
    return np.einsum("ic,jc->ij", rows, others) / lengths


def picks(given: list[np.ndarray], config: object) -> list[int]:
    """Return all tokens in the order in which a greedy method takes them, one budget after the other."""
    order: list[int] = []
    for budget in range(1, given[0].shape[1] + 1):
        (added,) = set(select_tokens(*given, budget, config)[0]) - set(order)
        order.append(int(added))
    return order


class TestRandom:
    def test_every_token_has_the_same_chance(self) -> None:
        """Of 600 seeds, a token is kept by 150 on average; 95 to 205 is five standard deviations."""
        given = arrays(16)
        kept = np.concatenate([select_tokens(*given, 4, RandomConfig(seed))[0] for seed in range(600)])
        counts = np.bincount(kept, minlength=16)
        assert 95 < counts.min() < counts.max() < 205

    def test_a_larger_budget_keeps_what_a_smaller_one_does(self) -> None:
        given = arrays(49)
        assert sorted(picks(given, RandomConfig(3))) == list(range(49))

    def test_a_seed_means_the_same_everywhere(self) -> None:
        """A bundle stores its shuffling; the definition has to give it again with every release of NumPy."""
        kept = [select_tokens(*arrays(16), 5, RandomConfig(seed))[0].tolist() for seed in (0, 1)]
        assert kept == [[2, 3, 11, 13, 15], [2, 4, 9, 12, 14]]


class TestUniform:
    @pytest.mark.parametrize(("budget", "stride"), [(4, 12), (9, 8), (16, 6), (36, 4), (64, 3), (144, 2), (576, 1)])
    def test_a_square_that_divides_the_grid_is_a_stride(self, budget: int, stride: int) -> None:
        rows, columns = np.divmod(select_tokens(*arrays(576), budget, UniformConfig())[0], 24)
        middle = (stride + 1) // 2 - 1
        lines = np.arange(middle, 24, stride)
        assert sorted(set(rows)) == lines.tolist()
        assert sorted(zip(rows, columns, strict=True)) == list(itertools.product(lines, lines))

    @pytest.mark.parametrize("side", [1, 2, 5, 24])
    def test_no_patch_is_far_from_a_kept_one_at_any_budget(self, side: int) -> None:
        """With r rows, gaps are at most side / (r - 1) wide; the nearest kept patch is half of that away."""
        y, x = np.divmod(np.arange(side * side), side)
        given = arrays(side * side)
        for budget in range(1, side * side + 1):
            kept = select_tokens(*given, budget, UniformConfig())[0]
            distance = np.maximum(abs(y[:, None] - y[kept]), abs(x[:, None] - x[kept])).min(axis=1)
            assert len(set(kept)) == budget
            assert distance.max() <= np.ceil(side / (2 * max(1, np.floor(np.sqrt(budget)) - 1)))

    def test_a_grid_that_is_not_square_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="square grid"):
            select_tokens(*arrays(40), 4, UniformConfig())


def test_cls_attention_keeps_nothing_below_what_it_drops() -> None:
    given = arrays(50)
    kept = select_tokens(*given, 17, ClsAttentionConfig())[0]
    assert given[1][0, kept].min() > np.delete(given[1][0], kept).max()


class TestVisPruner:
    @pytest.mark.parametrize("budget", [1, 2, 15, 32, 99])
    def test_is_flashvlm_without_text(self, budget: int) -> None:
        """FlashVLM took its two halves from VisPruner, and is held against the indices that its authors' code gives."""
        given = arrays(100)
        np.testing.assert_array_equal(
            select_tokens(*given, budget, VisPrunerConfig()), select_tokens(*given, budget, FlashVLMConfig(eta=0.0))
        )

    def test_duplicates_go_first(self) -> None:
        """Twenty tokens of their own and twenty copies of one: taken out one by one, a single copy is left."""
        given = arrays(40, seed=2)
        given[0][0, 1::2] = given[0][0, 1]
        kept = select_tokens(*given, 20, VisPrunerConfig(important_ratio=0.0, merge_step=1))[0]
        assert (kept % 2 == 1).sum() == 1


class TestVisionZip:
    @pytest.mark.parametrize(("budget", "dominant"), [(64, 54), (128, 108), (192, 162)])
    def test_divides_the_budget_as_usual(self, budget: int, dominant: int) -> None:
        """And every contextual token is as many of the others behind the one before it."""
        given = arrays(576)
        kept = select_tokens(*given, budget, VisionZipConfig())[0]
        best = np.argsort(-given[1][0])[:dominant]
        assert np.isin(best, kept).all()
        others = np.setdiff1d(np.arange(576), best)
        places = np.flatnonzero(np.isin(others, kept))
        assert len(places) == budget - dominant
        assert places[0] == 0
        (step,) = set(np.diff(places))
        assert step == len(others) // len(places)


class TestDivPrune:
    def test_every_token_added_is_the_farthest(self) -> None:
        given = arrays(30)
        distance = 1.0 - cosines(given[2][0], given[2][0])
        order = picks(given, DivPruneConfig())
        nearest = [np.delete(distance[i], i).min() for i in range(30)]
        assert order[0] == np.argmax(nearest)
        for count in range(1, 30):
            to_kept = distance[:, order[:count]].min(axis=1)
            assert order[count] == max(set(range(30)) - set(order[:count]), key=lambda token: to_kept[token])

    @pytest.mark.parametrize("seed", range(5))
    def test_is_at_least_half_as_spread_as_possible(self, seed: int) -> None:
        """Gonzalez's bound for greedy max-min, on the chord between unit vectors, which is a metric."""
        given = arrays(12, seed, llm_width=4)
        chord = np.sqrt(np.maximum(2.0 - 2.0 * cosines(given[2][0], given[2][0]), 0.0))

        def spread(tokens: tuple[int, ...]) -> float:
            return min(chord[pair] for pair in itertools.combinations(tokens, 2))

        best = max(spread(tokens) for tokens in itertools.combinations(range(12), 4))
        kept = spread(tuple(select_tokens(*given, 4, DivPruneConfig())[0]))
        assert best / 2 <= kept <= best + 1e-12

    def test_copies_are_kept_last(self) -> None:
        given = arrays(20)
        given[2][0, 10:] = 3.0 * given[2][0, :10]
        kept = select_tokens(*given, 10, DivPruneConfig())[0]
        assert sorted(kept % 10) == list(range(10))


class TestCDPruner:
    @staticmethod
    def relevance(given: list[np.ndarray]) -> np.ndarray:
        mean = cosines(given[2][0], given[3][0]).mean(axis=1)
        return (mean - mean.min() + 1e-6) / (mean.max() - mean.min())

    @pytest.mark.parametrize("seed", range(3))
    def test_every_token_added_makes_the_determinant_largest(self, seed: int) -> None:
        given = arrays(14, seed)
        quality = self.relevance(given)
        kernel = quality[:, None] * cosines(given[2][0], given[2][0]) * quality[None]

        def log_determinant(tokens: list[int]) -> float:
            sign, value = np.linalg.slogdet(kernel[np.ix_(tokens, tokens)])
            assert sign == 1
            return float(value)

        order = picks(given, CDPrunerConfig())
        for count in range(14):
            candidates = {
                token: log_determinant([*order[:count], token]) for token in set(range(14)) - {*order[:count]}
            }
            assert order[count] == max(candidates, key=candidates.__getitem__)

    def test_text_decides_what_comes_first(self) -> None:
        given = arrays(30, text=1)
        given[2][0, 11] = 5.0 * given[3][0, 0]
        assert select_tokens(*given, 1, CDPrunerConfig())[0].tolist() == [11]

    def test_a_copy_of_the_most_relevant_token_adds_nothing(self) -> None:
        given = arrays(30, text=1)
        given[2][0, 11] = given[2][0, 12] = given[3][0, 0]
        assert set(select_tokens(*given, 24, CDPrunerConfig())[0]) & {11, 12} == {11}

    def test_what_the_kept_tokens_span_is_taken_by_relevance(self) -> None:
        """Tokens in a space of four dimensions: four span it, and the determinant says no more."""
        given = arrays(30, llm_width=4)
        quality, order = self.relevance(given), picks(given, CDPrunerConfig())
        assert order[4:] == sorted(order[4:], key=lambda token: -quality[token])
        assert order != sorted(order, key=lambda token: -quality[token])
