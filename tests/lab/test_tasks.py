"""Tasks: a batch is a function of seed and step, an evaluation a function of the model."""

import math

import pytest
import torch
from torch import Tensor, nn

from orthokit.errors import OptionError, UnknownNameError
from orthokit.lab import SmallCNN, TinyGPT, TinyGPTConfig, image_classification, language_modelling, task, tasks
from orthokit.lab.corpora import corpus
from orthokit.lab.tasks import _step_generator

BUILD = {
    "moby_dick": lambda **options: language_modelling(
        "moby_dick", **{"context": 16, "batch": 3, "validation_windows": 5, **options}
    ),
    "digits": lambda **options: image_classification("digits", **{"batch": 5, **options}),
}


def model_for(name: str) -> nn.Module:
    return SmallCNN(width=4) if name == "digits" else TinyGPT(TinyGPTConfig(16, 1, 2, 24, 16))


class Uniform(nn.Module):
    """Every byte alike."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        return self.scale * torch.ones(*ids.shape, 256)


@pytest.mark.parametrize("name", list(BUILD))
class TestEveryTask:
    def test_batch_is_a_function_of_seed_and_step(self, name):
        one, two, other = BUILD[name](seed=3), BUILD[name](seed=3), BUILD[name](seed=4)
        two.batch(9)  # what was drawn before does not matter
        for step in (0, 1, 7):
            assert all(torch.equal(a, b) for a, b in zip(one.batch(step), two.batch(step), strict=True))
            assert not torch.equal(one.batch(step)[0], other.batch(step)[0])
        assert not torch.equal(one.batch(0)[0], one.batch(1)[0])

    def test_nothing_draws_from_the_global_generator(self, name):
        state = torch.get_rng_state()
        built, model = BUILD[name](), model_for(name)
        built.batch(0)
        built.evaluate(model)
        assert torch.equal(state, torch.get_rng_state())

    def test_evaluation_repeats_and_leaves_no_gradient(self, name):
        built, model = BUILD[name](), model_for(name)
        first = built.evaluate(model)
        built.batch(3)
        assert built.evaluate(model) == first
        assert built.metric in first and all(math.isfinite(v) for v in first.values())
        assert all(p.grad is None for p in model.parameters())

    def test_loss_is_a_differentiable_mean_in_nats(self, name):
        built, model = BUILD[name](), model_for(name)
        inputs, targets = built.batch(0)
        loss = built.loss(model, (inputs, targets))
        scores = model(inputs).flatten(0, -2)
        by_hand = -scores.log_softmax(-1).gather(1, targets.reshape(-1, 1)).mean()
        torch.testing.assert_close(loss, by_hand)
        # The mean over a batch is the mean of the losses of its rows.
        rows = [built.loss(model, (inputs[i : i + 1], targets[i : i + 1])) for i in range(len(inputs))]
        torch.testing.assert_close(loss, torch.stack(rows).mean())

    def test_description_rebuilds_it(self, name):
        built = BUILD[name](seed=5)
        described = built.describe()
        keys = ("batch", "context", "validation_windows")
        options = {key: described[key] for key in keys if key in described}
        again = task(name, seed=described["data_seed"], **options)
        assert torch.equal(again.batch(2)[0], built.batch(2)[0])
        assert again.describe() == described

    def test_sizes_out_of_range_are_refused(self, name):
        with pytest.raises(OptionError, match="at least 1"):
            BUILD[name](batch=0)


def test_windows_are_pieces_of_the_text_shifted_by_one():
    built, text = BUILD["moby_dick"](), bytes(corpus("moby_dick").train.tolist())
    inputs, targets = built.batch(0)
    assert inputs.shape == targets.shape == (3, 16) and inputs.dtype == torch.int64
    for row, target in zip(inputs, targets, strict=True):
        assert bytes([*row.tolist(), int(target[-1])]) in text
        assert torch.equal(row[1:], target[:-1])


def test_validation_windows_span_the_whole_split():
    built = BUILD["moby_dick"]()
    assert built.validation_starts[0] == 0
    assert built.validation_starts[-1] + built.context + 1 == len(built.validation)
    assert (built.validation_starts.diff() > 0).all()


def test_uniform_guesses_cost_eight_bits_a_byte():
    assert BUILD["moby_dick"]().evaluate(Uniform())["validation_bits_per_byte"] == pytest.approx(8.0)


def test_bits_are_the_mean_over_all_windows_not_over_batches():
    # 17 windows are judged as 16 and 1; the last one must not weigh as much as the sixteen.
    built, model = BUILD["moby_dick"](validation_windows=17), model_for("moby_dick")
    losses = [built.loss(model, built._windows(built.validation, s[None])).item() for s in built.validation_starts]
    expected = sum(losses) / 17 / math.log(2)
    assert built.evaluate(model)["validation_bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_test_error_counts_the_wrong_ones():
    built, model = BUILD["digits"](), model_for("digits")
    wrong = sum(
        int(model(image[None]).argmax() != label)
        for image, label in zip(built.data.test_images, built.data.test_labels, strict=True)
    )
    assert built.evaluate(model)["test_error"] == pytest.approx(wrong / len(built.data.test_labels))


def test_context_has_to_fit_the_smaller_split():
    smaller = len(corpus("moby_dick").validation)
    with pytest.raises(OptionError, match="context must be below"):
        language_modelling("moby_dick", context=smaller)
    fits = language_modelling("moby_dick", context=smaller - 2, batch=1, validation_windows=1)
    assert fits.batch(0)[0].shape == (1, smaller - 2)


def test_steps_and_seeds_get_streams_of_their_own():
    draws = {
        (seed, step): int(torch.randint(2**40, (), generator=_step_generator(seed, step)))
        for seed in (-1, 0, 1, 2)
        for step in range(50)
    }
    assert len(set(draws.values())) == len(draws)


def test_names_are_listed_and_others_refused():
    assert {"addresses", "moby_dick", "fashion", "digits"} <= set(tasks())
    with pytest.raises(UnknownNameError, match="did you mean 'digits'"):
        task("digit")
