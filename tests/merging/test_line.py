"""A merged model at every scale, against merging at that scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from orthokit.errors import OptionError
from orthokit.merging import merge, merge_line, methods


def models() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(0)
    # One draw of the weights in a few dozen has a null space that an expert turns by half a circle.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()
    experts = [
        {
            name: W + 0.1 * torch.randn(W.shape, generator=g, dtype=W.dtype) if W.is_floating_point() else W
            for name, W in base.state_dict().items()
        }
        for _ in range(2)
    ]
    return base, experts


def needed(method: str, experts: list[dict[str, Tensor]]) -> dict[str, object]:
    if methods()[method].statistics is None:
        return {"losses": [1.0, 2.0]} if method == "metrics_weighted" else {}
    grams = methods()[method].statistics == "grams"
    return {
        "statistics": [
            {name: W.mT @ W if grams else W.square() for name, W in e.items() if W.ndim == 2} for e in experts
        ]
    }


@pytest.mark.parametrize("method", list(methods()))
def test_every_method_is_a_line_in_its_scale(method: str) -> None:
    base, experts = models()
    more = needed(method, experts)
    line = merge_line(base, experts, method=method, seed=3, **more)
    for scale in (-0.5, 0.3, 1.7):
        direct = merge(base, experts, method=method, scale=scale, seed=3, **more)
        for name, tensor in line.at(scale).items():
            torch.testing.assert_close(tensor, direct[name], rtol=1e-11, atol=1e-12)
    assert line.report.method == method and len(line.report.rows) == len(line.end)


def test_layers_with_a_scale_of_their_own_keep_it_and_tied_tensors_stay_one() -> None:
    shared = torch.zeros(3, 2)
    base = {"a.weight": shared, "b.weight": shared, "c": torch.zeros(2)}
    twice = torch.ones(3, 2)
    line = merge_line(
        base,
        [{"a.weight": twice, "b.weight": twice, "c": torch.ones(2)}],
        method="task_arithmetic",
        layers={"c": {"scale": 0.25}},
    )
    found = line.at(0.5)
    assert found["a.weight"] is found["b.weight"] and torch.equal(found["a.weight"], 0.5 * twice)
    assert torch.equal(found["c"], torch.full((2,), 0.25))


def test_a_scale_is_given_to_the_line_and_not_to_the_merge() -> None:
    base, experts = models()
    with pytest.raises(OptionError, match="at"):
        merge_line(base, experts, method="linear", scale=0.5)
    with pytest.raises(OptionError, match="scale"):
        merge_line(base, experts, method="linear").at(float("nan"))
