"""Penalties, Fisher information, and what they do to a training run."""

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from orthokit import adapters
from orthokit.errors import NonFiniteError, OptionError, ParameterError, ShapeError, UnknownNameError
from orthokit.lab import Racer, Run, SmallCNN, Task, TinyGPT, TinyGPTConfig, fit, image_classification
from orthokit.lab.continual import Replay, class_split
from orthokit.lab.example_gradients import per_example_gradients
from orthokit.lab.fisher import RankOneFisher, collinearity, fisher_diagonal, rank_one_fisher
from orthokit.lab.regularisers import EWC, L2SP, Penalties, RankOneEWC
from orthokit.optim import for_model

SMALL = TinyGPTConfig(dim=16, layers=1, heads=2, hidden=24, context=16)


class Logistic(Task):
    """Labels drawn from a known linear model, so that this very model is right about them."""

    name, metric, unit = "logistic", "error", "share"

    def __init__(self, W: Tensor, *, batch: int = 64) -> None:
        self.W, self.batch_size = W, batch

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(step)
        x = torch.randn(self.batch_size, self.W.shape[1], generator=g, dtype=self.W.dtype)
        return x, torch.multinomial((x @ self.W.mT).softmax(-1), 1, generator=g)[:, 0]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"error": 0.0}

    def describe(self) -> dict[str, object]:
        return {"task": "logistic"}


def known(out: int = 3, inputs: int = 4) -> tuple[nn.Linear, Logistic]:
    W = torch.randn(out, inputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = nn.Linear(inputs, out, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(W)
    return model, Logistic(W)


def moved(model: nn.Module, by: float = 0.1) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(by * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p))
    return model


def gradients(model: nn.Module, penalty) -> dict[str, Tensor]:
    model.zero_grad()
    penalty(model).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_by_one(model: nn.Module, task: Task, samples: int) -> Tensor:
    """Gradients of single examples, by an ordinary backward pass each."""
    rows, step = [], 10**6
    while len(rows) < samples:
        x, y = task.batch(step)
        for i in range(min(len(x), samples - len(rows))):
            found = torch.autograd.grad(task.loss(model, (x[i : i + 1], y[i : i + 1])), list(model.parameters()))
            rows.append(torch.cat([g.flatten() for g in found]))
        step += 1
    return torch.stack(rows)


class TestFisher:
    @pytest.mark.parametrize("chunk", [1, 3, 64])
    def test_vectorised_gradients_are_those_of_single_examples(self, chunk):
        model, task = SmallCNN(width=2).double(), image_classification("digits", batch=5)
        task = Cast(task)
        wanted = one_by_one(model, task, 7)
        rows = [
            torch.cat([g.flatten(1) for g in found.values()], 1)
            for found in per_example_gradients(model, task, samples=7, chunk=chunk)
        ]
        torch.testing.assert_close(torch.cat(rows), wanted, rtol=1e-9, atol=1e-12)
        assert all(p.grad is None for p in model.parameters())

    def test_a_language_model_has_one_gradient_a_window(self):
        from orthokit.lab import language_modelling

        model, task = TinyGPT(SMALL), language_modelling("moby_dick", context=8, batch=2, validation_windows=2)
        fast = next(per_example_gradients(model, task, samples=2, chunk=2))
        slow = one_by_one(model, task, 2)
        flat = torch.cat([g.flatten(1) for g in fast.values()], 1)
        torch.testing.assert_close(flat, slow, rtol=1e-3, atol=1e-6)

    def test_the_empirical_diagonal_is_the_mean_of_squares(self):
        model, task = known()
        wanted = one_by_one(model, task, 50).square().mean(0)
        found = fisher_diagonal(model, task, samples=50, kind="empirical")["weight"]
        torch.testing.assert_close(found.flatten(), wanted)

    def test_true_and_empirical_agree_in_expectation_where_the_model_is_right(self):
        model, task = known()
        x = torch.cat([task.batch(10**6 + i)[0] for i in range(16)])
        p = model(x).softmax(-1)
        # Closed form: the diagonal for entry (k, j) is E[p_k (1 - p_k) x_j^2].
        exact = torch.einsum("nk,nj->kj", p * (1 - p), x.square()) / len(x)
        found = {k: fisher_diagonal(model, task, samples=1024, kind=k)["weight"] for k in ("true", "empirical")}
        for kind, F in found.items():
            error = ((F - exact) / exact).abs().max().item()
            # 1024 draws of a quantity whose relative spread is about 3 leave 9 %; four such steps are allowed.
            assert error < 0.37, (kind, error)

    def test_they_differ_where_the_model_is_wrong(self):
        model, task = known()
        with torch.no_grad():
            model.weight.mul_(-1)
        true, empirical = (fisher_diagonal(model, task, samples=512, kind=k)["weight"] for k in ("true", "empirical"))
        assert empirical.sum() > 2 * true.sum()

    def test_labels_are_drawn_from_the_seed_alone(self):
        model, task = known()
        state = torch.get_rng_state()
        a, b, c = (fisher_diagonal(model, task, samples=20, seed=s)["weight"] for s in (0, 0, 1))
        assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(state, torch.get_rng_state())

    def test_the_model_is_left_as_it_was(self):
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double().train()
        before = {n: t.clone() for n, t in model.state_dict().items()}
        fisher_diagonal(model, known()[1], samples=3)
        rank_one_fisher(model, known()[1], samples=3)
        assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    @pytest.mark.parametrize("config", [adapters.LoRA(rank=2), adapters.OFT(block_size=4)])
    def test_with_an_adapter_only_its_parameters_enter(self, config):
        model = adapters.attach(SmallCNN(width=2), config, targets="hidden")
        task = image_classification("digits", batch=4)
        found = fisher_diagonal(model, task, samples=4)
        assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
        penalty = EWC(model, found, weight=1.0)
        moved(model)
        assert set(gradients(model, penalty)) == set(found)

    def test_bad_input_is_named(self, unchecked):
        model, task = known()
        with pytest.raises(UnknownNameError, match="did you mean 'true'"):
            fisher_diagonal(model, task, kind="tru")
        for call in (lambda: fisher_diagonal(model, task, samples=0), lambda: rank_one_fisher(model, task, samples=1)):
            with pytest.raises(OptionError, match="samples must be at least"):
                call()
        with pytest.raises(OptionError, match="chunk"):
            fisher_diagonal(model, task, samples=2, chunk=0)
        split = class_split("digits", classes=(0, 1))
        with pytest.raises(OptionError, match="each of its tasks"):
            fisher_diagonal(SmallCNN(width=2), Replay(split, [split]), samples=2)
        model.weight.requires_grad_(False)
        with pytest.raises(ParameterError, match="frozen"):
            fisher_diagonal(model, task, samples=2)
        broken, _ = known()
        with torch.no_grad():
            broken.weight.fill_(math.nan)
        with pytest.raises(NonFiniteError, match="gradients must be finite"):
            fisher_diagonal(broken, task, samples=2, kind="empirical")


class Cast(Task):
    """A task in float64."""

    name, metric, unit = "cast", "test_error", ""

    def __init__(self, task: Task) -> None:
        self.task = task

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        x, y = self.task.batch(step)
        return x.double(), y

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.task.loss(model, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {}

    def describe(self) -> dict[str, object]:
        return {}


class TestRankOne:
    @settings(max_examples=20)
    @given(st.integers(0, 10**6), st.integers(2, 9))
    def test_the_scale_is_the_frobenius_minimum(self, seed, samples):
        model, task = known()
        task.seed = seed
        found = rank_one_fisher(model, task, samples=samples, first=seed)
        assert found.scale >= 1 - 1e-9  # Cauchy and Schwarz: the mean of squares is at least the square of the mean
        g = torch.stack(list(single(model, task, samples, seed)))
        F, mu = g.mT @ g / samples, g.mean(0)
        torch.testing.assert_close(found.mean["weight"].flatten(), mu)
        error = lambda c: float((F - c * torch.outer(mu, mu)).norm())  # noqa: E731
        best = error(found.scale)
        assert best <= min(error(found.scale * (1 + d)) for d in (-0.1, -1e-3, 1e-3, 0.1)) + 1e-12
        assert found.scale == pytest.approx(float(mu @ F @ mu / (mu @ mu) ** 2), rel=1e-9)

    def test_the_readout_is_that_of_all_gradients_side_by_side(self):
        model, task = known()
        found = rank_one_fisher(model, task, samples=40, chunk=7).collinearity
        wanted = collinearity(one_by_one(model, task, 40))
        for name in ("cosine", "top_share", "mean_share"):
            assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-9, abs=1e-12)
        g = one_by_one(model, task, 40)
        u = g / g.norm(dim=1, keepdim=True)
        pairs = [float(u[i] @ u[j]) for i in range(40) for j in range(40) if i != j]
        assert wanted.cosine == pytest.approx(sum(pairs) / len(pairs))
        F = g.mT @ g / 40
        assert wanted.top_share == pytest.approx(float(torch.linalg.eigvalsh(F)[-1] / F.trace()))
        assert 0 < wanted.mean_share <= wanted.top_share + 1e-12 <= 1 + 1e-9

    def test_collinear_gradients_are_seen(self):
        line = torch.outer(torch.rand(9, dtype=torch.float64) + 0.5, torch.randn(30, dtype=torch.float64))
        found = collinearity(line)
        assert found.cosine == pytest.approx(1) and found.top_share == pytest.approx(1)
        assert collinearity(torch.eye(5)).cosine == 0 and collinearity(torch.eye(5)).top_share == pytest.approx(0.2)
        assert collinearity(torch.cat([torch.eye(2), torch.zeros(3, 2)])).cosine == 0
        assert collinearity(torch.zeros(3, 4)).top_share == 0
        with pytest.raises(ShapeError, match="N >= 2"):
            collinearity(torch.ones(1, 4))
        with pytest.raises(NonFiniteError, match="finite"):
            collinearity(torch.full((2, 2), math.nan))

    def test_the_mean_gradient_vanishes_where_the_model_is_right(self):
        model, task = known()

        def share(kind: str) -> float:
            mean = rank_one_fisher(model, task, samples=512, kind=kind).mean["weight"]
            return float(mean.square().sum() / fisher_diagonal(model, task, samples=512, kind=kind)["weight"].sum())

        right = max(share("true"), share("empirical"))
        with torch.no_grad():
            model.weight.mul_(-1)  # now the data disagree with the model, and their gradients share a direction
        # The mean of N independent gradients keeps 1/N of their squared length; five times that is allowed.
        assert right < 5 / 512 < 0.1 < share("empirical")

    def test_the_penalty_is_its_formula(self):
        model, task = known()
        fisher = rank_one_fisher(model, task, samples=16)
        start = model.weight.detach().clone()
        both = {s: RankOneEWC(model, fisher, weight=3.0, scale=s) for s in ("optimal", "one")}
        moved(model)
        along = float((fisher.mean["weight"] * (model.weight - start)).sum().detach())
        for name, c in (("optimal", fisher.scale), ("one", 1.0)):
            assert float(both[name](model).detach()) == pytest.approx(1.5 * c * along**2)
            g = gradients(model, both[name])["weight"]
            torch.testing.assert_close(g, 3.0 * c * along * fisher.mean["weight"])
        with pytest.raises(OptionError, match="'optimal' or 'one'"):
            RankOneEWC(model, fisher, weight=1.0, scale="best")


def single(model, task, samples, first):
    x, y = task.batch(first)
    for i in range(samples):
        yield torch.autograd.grad(task.loss(model, (x[i : i + 1], y[i : i + 1])), model.weight)[0].flatten()


class TestPenalties:
    def test_ewc_is_its_formula_and_zero_at_the_anchor(self):
        model, task = known()
        fisher = fisher_diagonal(model, task, samples=8)
        penalty, start = EWC(model, fisher, weight=5.0), model.weight.detach().clone()
        assert float(penalty(model).detach()) == 0
        assert not gradients(model, penalty)["weight"].any()
        moved(model)
        d = model.weight.detach() - start
        assert float(penalty(model).detach()) == pytest.approx(2.5 * float((fisher["weight"] * d.square()).sum()))
        torch.testing.assert_close(gradients(model, penalty)["weight"], 5.0 * fisher["weight"] * d)

    def test_distance_is_ewc_with_ones(self):
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        ones = {n: torch.ones_like(p) for n, p in model.named_parameters()}
        left, right = L2SP(model, weight=2.0, free=("1.*",)), EWC(model, ones, weight=2.0, free=("1.*",))
        moved(model)
        assert float(left(model).detach()) == pytest.approx(float(right(model).detach()), rel=1e-6)
        assert set(gradients(model, left)) == {"0.weight", "0.bias"}

    def test_several_penalties_add_up(self):
        model = nn.Linear(3, 2)
        first = L2SP(model, weight=1.0)
        moved(model)
        second = L2SP(model, weight=4.0)
        moved(model)
        both = Penalties([first, second])
        assert float(both(model).detach()) == pytest.approx(float((first(model) + second(model)).detach()))
        assert float(Penalties([])(model)) == 0 and Penalties([]).describe()["penalty"] == "none"

    def test_an_adapter_that_comes_later_is_refused(self):
        model = SmallCNN(width=2)
        penalty = L2SP(model, weight=1.0)
        adapters.attach(model, adapters.LoRA(rank=2), targets="hidden")
        with pytest.raises(ParameterError, match="after attaching adapters"):
            penalty(model)

    def test_bad_input_is_named(self, unchecked):
        model = nn.Linear(2, 1)
        for weight in (-1.0, math.inf, math.nan):
            with pytest.raises(OptionError, match="weight must be finite"):
                L2SP(model, weight=weight)
        with pytest.raises(ParameterError, match="no trainable parameter is left"):
            L2SP(model, weight=1.0, free=("*",))
        with pytest.raises(ParameterError, match="bias"):
            EWC(model, {"weight": torch.ones(1, 2)}, weight=1.0)
        with pytest.raises(ParameterError, match="another shape"):
            EWC(model, {"weight": torch.ones(2), "bias": torch.ones(1)}, weight=1.0)
        with pytest.raises(OptionError, match="at least 0"):
            EWC(model, {"weight": -torch.ones(1, 2), "bias": torch.ones(1)}, weight=1.0)


def made(kind: str, model: nn.Module, task: Task, weight: float):
    if kind == "l2sp":
        return L2SP(model, weight=weight)
    if kind == "ewc":
        return EWC(model, fisher_diagonal(model, task, samples=8), weight=weight)
    fisher = rank_one_fisher(model, task, samples=8)
    # All of the penalty lies in one direction, which gets too steep for the learning rate at the weight of the others.
    return Penalties([RankOneEWC(model, fisher, weight=1e-4 * weight), L2SP(model, weight=weight)])


OPTIMIZERS = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9),
    "muon": lambda m: for_model(m, "muon", lr=0.02),
    "pion": lambda m: for_model(m, "pion", lr=0.02),
}


class TestTraining:
    def run(self, root, name, weight, *, kind="ewc", optimizer="sgd", steps=6, **options):
        model, task = SmallCNN(width=2), image_classification("digits", batch=8)
        penalty = None if weight is None else made(kind, model, task, weight)
        fit(
            model, task, OPTIMIZERS[optimizer](model), steps=steps, evaluate_every=steps, root=root, run=name,
            progress=False, penalty=penalty, precision="float32", **options,
        )  # fmt: skip
        return model

    @pytest.mark.parametrize("kind", ["ewc", "l2sp", "rank one and distance"])
    def test_weight_zero_is_plain_training_to_the_bit(self, tmp_path, kind):
        plain = self.run(tmp_path, "plain", None)
        held = self.run(tmp_path, "held", 0.0, kind=kind)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), held.parameters(), strict=True))
        losses = [Run.open(n, root=tmp_path).series("loss")[1].tolist() for n in ("plain", "held")]
        assert losses[0] == losses[1]

    @pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
    def test_a_heavier_penalty_keeps_the_model_nearer(self, tmp_path, optimizer):
        start = dict(SmallCNN(width=2).named_parameters())
        far = {}
        for weight in (0.0, 30.0):
            model = self.run(tmp_path, f"w{weight}", weight, kind="l2sp", optimizer=optimizer, steps=8)
            far[weight] = sum(float((p - start[n]).square().sum().detach()) for n, p in model.named_parameters())
        assert far[30.0] < far[0.0]

    def test_the_record_holds_loss_and_penalty_apart(self, tmp_path):
        self.run(tmp_path, "r", 100.0)
        run = Run.open("r", root=tmp_path)
        penalty = run.series("penalty")[1]
        assert penalty[0] == 0 and (penalty[1:] > 0).all() and run.config["penalty"] == "EWC"
        assert run.series("loss")[1][0] == Run.open("r", root=tmp_path).series("loss")[1][0]

    @pytest.mark.parametrize("kind", ["ewc", "rank one and distance"])
    def test_a_resumed_run_gives_the_same_bits(self, tmp_path, kind):
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            whole = self.run(tmp_path, "whole", 50.0, kind=kind, steps=10)
            stop = threading.Event()
            ask = lambda step, loss: stop.set() if step == 4 else None  # noqa: E731
            self.run(tmp_path, "parts", 50.0, kind=kind, steps=10, stop=stop, on_step=ask)
            assert Run.open("parts", root=tmp_path).last_step == 4
            resumed = self.run(tmp_path, "parts", 50.0, kind=kind, steps=10, resume=True)
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
        series = [
            [Run.open(n, root=tmp_path).series(k)[1].tolist() for k in ("loss", "penalty")] for n in ("whole", "parts")
        ]
        assert series[0] == series[1]

    def test_the_racer_does_what_fit_does(self, tmp_path):
        fitted = self.run(tmp_path, "fit", 50.0, steps=5, clip=1.0)
        model, task = SmallCNN(width=2), image_classification("digits", batch=8)
        racer = Racer(
            model, task, OPTIMIZERS["sgd"](model), steps=5, schedule="constant", warmup=0,
            penalty=made("ewc", model, task, 50.0),
        )  # fmt: skip
        losses = [racer.advance() for _ in range(5)]
        assert losses == Run.open("fit", root=tmp_path).series("loss")[1].tolist()
        assert all(torch.equal(a, b) for a, b in zip(fitted.parameters(), model.parameters(), strict=True))


def test_a_rank_one_form_holds_one_direction_only():
    model = nn.Linear(3, 1, bias=False)
    mean = torch.tensor([[1.0, 0.0, 0.0]])
    penalty = RankOneEWC(model, RankOneFisher({"weight": mean}, 1.0, collinearity(torch.eye(2))), weight=1.0)
    with torch.no_grad():
        model.weight.add_(torch.tensor([[0.0, 5.0, -7.0]]))
    assert float(penalty(model).detach()) == pytest.approx(0, abs=1e-10)
