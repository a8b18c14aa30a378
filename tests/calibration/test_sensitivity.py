"""Ranking and excluding, with layers whose effect is known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from flashvlm_export.calibration.layers import Layer, Product
from flashvlm_export.calibration.likeness import Likeness, Tolerance
from flashvlm_export.calibration.sensitivity import Sensitivity, analyse, most_runs
from flashvlm_export.errors import CalibrationError
from flashvlm_export.progress import Progress


def layers(count: int) -> list[Layer]:
    return [Layer(f"l{n}", (Product(f"n{n}", f"a{n}", f"w{n}", (10, 10)),)) for n in range(count)]


class Model:
    """Each layer in INT8 takes its own share of cosine away; remembers how often it was asked."""

    def __init__(self, costs: Sequence[float]) -> None:
        self.costs, self.asked = dict(zip((f"l{n}" for n in range(len(costs))), costs, strict=True)), 0

    def __call__(self, quantised: Sequence[Layer]) -> Likeness:
        self.asked += 1
        cosine = 1.0 - sum(self.costs[layer.name] for layer in quantised)
        return Likeness(cosine, cosine, 0.0, 1.0, 1.0, 1.0)


def run(model: Model, images: Sequence[str] = ("one",), *, enforced: bool = True) -> Sensitivity:
    return analyse(
        layers(len(model.costs)),
        model,
        tolerance=Tolerance(cosine=0.99),
        enforced=enforced,
        whole_set=True,
        budget=4,
        images=images,
        progress=Progress(),
    )


def test_nothing_is_excluded_where_the_tolerance_holds() -> None:
    model = Model([0.001, 0.004, 0.002])
    found = run(model, ["one", "two"])
    assert found.excluded == []
    assert [effect.layer for effect in found.layers] == ["l1", "l2", "l0"]
    assert [effect.share for effect in found.layers] == pytest.approx([0.4, 0.2, 0.1])
    assert found.chosen == found.everything
    assert found.runs == (model.asked + 1) * 2


@pytest.mark.parametrize(("bad", "expected"), [(1, 1), (2, 2), (5, 5), (8, 8)])
def test_the_fewest_of_the_worst_layers_are_excluded(bad: int, expected: int) -> None:
    """``bad`` layers of 16 break the tolerance each by itself; the others together do not."""
    model = Model([0.02 if n % 2 and n // 2 < bad else 0.0001 for n in range(16)])
    found = run(model)
    assert sorted(found.excluded) == sorted(f"l{n}" for n in range(16) if model.costs[f"l{n}"] == 0.02)
    assert len(found.excluded) == expected
    assert found.chosen.cosine >= 0.99 > found.everything.cosine
    assert found.runs == model.asked + 1 <= most_runs(16, 1)
    found.require_tolerance()


def test_layers_that_only_add_up_are_excluded_worst_first() -> None:
    model = Model([0.003, 0.004, 0.001, 0.0045, 0.0005])  # 0.013 together, 0.0085 without the worst
    assert run(model).excluded == ["l3"]


def test_a_tolerance_out_of_reach_is_an_error_with_the_figures() -> None:
    found = run(Model([0.02] * 8))
    assert len(found.excluded) == 4
    with pytest.raises(CalibrationError, match="does not come within the tolerance") as caught:
        found.require_tolerance()
    assert "all layers: cosine 0.8400" in str(caught.value)
    assert "without the worst 4 of 8: cosine 0.9200" in str(caught.value)


def test_a_model_of_one_layer_is_never_left_unquantised() -> None:
    found = run(Model([0.5]))
    assert found.excluded == []
    with pytest.raises(CalibrationError):
        found.require_tolerance()
    run(Model([0.001])).require_tolerance()


def test_a_tolerance_that_is_not_enforced_only_ranks() -> None:
    found = run(Model([0.02, 0.04, 0.01]), enforced=False)
    assert (found.excluded, [effect.layer for effect in found.layers]) == ([], ["l1", "l0", "l2"])
    found.require_tolerance()
