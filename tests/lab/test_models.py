"""The small models: causal, relative in position, of the promised size, and seeded by themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orthokit.errors import OptionError, ShapeError, UnknownNameError
from orthokit.lab import SIZES, SmallCNN, TinyGPT, TinyGPTConfig
from orthokit.lab.models import _rotate

TINY = TinyGPTConfig(dim=16, layers=2, heads=2, hidden=24, context=32)


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", list(SIZES))
def test_names_give_the_number_of_parameters(name):
    config = SIZES[name]
    d, h = config.dim, config.hidden
    # Embedding and head, four attention and three SwiGLU matrices a block, two norms a block and a last one.
    count = 2 * 256 * d + config.layers * (4 * d * d + 3 * d * h + 2 * d) + d
    assert count == pytest.approx(float(name.removesuffix("M")) * 1e6, rel=0.2)
    if count < 4e6:
        assert sum(p.numel() for p in TinyGPT(name).parameters()) == count


@settings(max_examples=25, deadline=None)
@given(where=st.integers(0, 31), byte=st.integers(0, 255), seed=st.integers(0, 100))
def test_a_later_byte_does_not_change_earlier_logits(where, byte, seed):
    model, x = TinyGPT(TINY, seed=seed), ids(1, 32, seed=seed)
    y = x.clone()
    y[0, where] = byte
    before, after = model(x), model(y)
    torch.testing.assert_close(before[:, :where], after[:, :where], rtol=0, atol=1e-5)
    if byte != x[0, where]:
        assert (before[:, where:] - after[:, where:]).abs().amax(-1).min() > 1e-7


def test_rows_of_a_batch_do_not_see_each_other():
    model, x = TinyGPT(TINY), ids(4, 20)
    alone = torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(model(x), alone, rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(m=st.integers(0, 15), n=st.integers(0, 15), shift=st.integers(0, 15), seed=st.integers(0, 1000))
def test_rotary_scores_depend_on_the_distance_only(m, n, shift, seed):
    model = TinyGPT(TINY)
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 1, 1, 8, generator=g).double() for _ in range(2))

    def at(x: Tensor, position: int) -> Tensor:
        return _rotate(x, model.cos[position].double(), model.sin[position].double())

    score = (at(q, m) * at(k, n)).sum()
    # The tables are float32.
    torch.testing.assert_close((at(q, m + shift) * at(k, n + shift)).sum(), score, rtol=0, atol=1e-5)
    torch.testing.assert_close(at(q, m).norm(), q.norm())


def test_positions_matter():
    # Without positions a constant sequence would give equal logits everywhere, and a permuted one equal last logits.
    model = TinyGPT(TINY)
    x = ids(1, 12)
    swapped = x[:, [1, 0, *range(2, 12)]]
    assert (model(x)[0, -1] - model(swapped)[0, -1]).abs().max() > 1e-6


def test_every_parameter_gets_a_gradient():
    model = TinyGPT(TINY)
    torch.nn.functional.cross_entropy(model(ids(2, 16)).flatten(0, 1), ids(2, 16, seed=1).flatten()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_new_model_guesses_nearly_uniformly():
    loss = torch.nn.functional.cross_entropy(TinyGPT("0.2M")(ids(4, 64)).flatten(0, 1), ids(4, 64, seed=1).flatten())
    assert float(loss.detach()) == pytest.approx(5.545, abs=0.4)  # ln 256


@pytest.mark.parametrize("build", [lambda seed: TinyGPT(TINY, seed=seed), lambda seed: SmallCNN(seed=seed)])
def test_seed_decides_the_weights_and_the_global_generator_is_left_alone(build):
    state = torch.get_rng_state()
    one, two, other = build(3), build(3), build(4)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert all(p.isfinite().all() for p in one.parameters())


def test_overrides_and_config_build_the_same():
    one, two = TinyGPT("0.2M", layers=1, context=64), TinyGPT(TinyGPTConfig(64, 1, 4, 176, 64))
    assert one.config == two.config
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


class TestGenerate:
    def test_equal_calls_agree_and_generators_differ(self):
        model = TinyGPT(TINY)
        state = torch.get_rng_state()
        first = model.generate("Fellow", length=40)
        assert first == model.generate("Fellow", length=40)
        others = {
            model.generate("Fellow", length=40, generator=torch.Generator().manual_seed(seed)) for seed in range(3)
        }
        assert len(others) == 3
        assert first.startswith("Fellow")
        assert torch.equal(state, torch.get_rng_state())

    def test_goes_on_past_the_context(self):
        text = TinyGPT(TINY).generate("x" * 40, length=3)
        assert text.startswith("x" * 40) and len(text.encode()) >= 43
        assert TinyGPT(TINY).generate("abc", length=0) == "abc"

    def test_low_temperature_takes_the_likeliest_byte(self):
        model = TinyGPT(TINY)
        text = list(b"We the ")
        for _ in range(5):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        assert model.generate("We the ", length=5, temperature=1e-4) == bytes(text).decode("utf-8", errors="replace")

    @pytest.mark.parametrize("bad", [{"prompt": ""}, {"length": -1}, {"temperature": 0.0}])
    def test_options_out_of_range_are_refused(self, bad):
        with pytest.raises(OptionError, match="need a prompt"):
            TinyGPT(TINY).generate(**{"prompt": "a", **bad})


def test_unknown_sizes_and_options_are_refused():
    with pytest.raises(UnknownNameError, match="TinyGPT size"):
        TinyGPT("2M")
    with pytest.raises(UnknownNameError, match="did you mean 'layers'"):
        TinyGPT("1M", layer=2)
    with pytest.raises(OptionError, match="multiple of 2 \\* heads"):
        TinyGPT("1M", heads=3)
    with pytest.raises(OptionError, match="at least 1"):
        TinyGPT("1M", layers=0)
    with pytest.raises(ShapeError, match="at most context = 32"):
        TinyGPT(TINY)(ids(1, 33))


@pytest.mark.parametrize("size", [8, 28])
def test_cnn_takes_both_image_sizes(size):
    model = SmallCNN(classes=7, width=4)
    scores = model(torch.rand(3, 1, size, size, generator=torch.Generator().manual_seed(0)))
    assert scores.shape == (3, 7)
    scores.square().sum().backward()
    assert all(p.grad.any() for p in model.parameters())
