"""The benchmark of adapters runs, and its candidates compute what they should."""

import itertools

import torch

from benchmarks.adapters import OURS, TARGETS, Layer, cases, has_peft, ours, tokens, weight_centric
from benchmarks.harness import Options


def test_cases_run_and_say_what_is_trained_and_kept():
    # MiniLM, which comes last, takes long.
    for case in itertools.islice(cases(Options(threads=1, rounds=1, quick=True)), 2):
        plain = case.candidates.pop("all weights")
        assert len(plain()) == 7  # six weights and the input
        for call in case.candidates.values():
            assert all(torch.isfinite(gradient).all() for gradient in call())
        trained = {name: int(count.replace(",", "")) for name, count in case.columns["trained"].items()}
        assert trained["OFT 32"] == (64 * 5 + 256) * 31 // 2 < trained["LoRA 16"] < trained["all weights"]
        assert float(case.columns["moments"]["OFT 32"]) < float(case.columns["moments"]["all weights"]) / 3
        assert case.baseline == ("LoRA 16, PEFT" if has_peft() else "LoRA 16")


def test_the_old_way_computes_the_same_and_keeps_more():
    torch.manual_seed(0)
    layer = Layer(64, 2)
    new, old = ours(layer, OURS["OFT 32"], TARGETS), weight_centric(layer, TARGETS, 32)
    x = tokens(2, 8, 64)
    assert torch.allclose(new(x), old(x), atol=1e-5)
    assert not torch.allclose(new(x), layer(x), atol=1e-3)
