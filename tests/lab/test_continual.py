"""Split tasks, replay, and projections that leave earlier tasks alone."""

import pytest
import torch
from torch import Tensor, nn

from orthokit import adapters
from orthokit.diagnostics.safe_step import StepController
from orthokit.errors import NonFiniteError, OptionError, ParameterError, UnknownNameError
from orthokit.lab import Racer, Run, SmallCNN, TinyGPT, TinyGPTConfig, fit, images, language_modelling
from orthokit.lab.continual import Replay, class_sequence, class_split
from orthokit.lab.input_subspaces import InputSubspaces
from orthokit.lab.projection import GradientProjection, GradientSubspace
from orthokit.optim import for_model


def pair(**options):
    return [class_split("digits", classes=c, batch=8, **options) for c in ((0, 1), (2, 3))]


def change(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=g).to(p) for n, p in model.named_parameters() if p.requires_grad}


def spaces(model, task):
    return {
        "inputs": InputSubspaces(free=("head.*",)).extend(model, task, samples=16, energy=0.95),
        "gradients": GradientSubspace().extend(model, task, samples=6),
    }


class TestTasks:
    def test_a_split_holds_its_classes_and_counts_them_from_zero(self):
        task, data = class_split("digits", classes=(7, 2), batch=64), images("digits")
        assert task.class_names == ("7", "2")
        assert len(task.train_labels) == int(((data.train_labels == 7) | (data.train_labels == 2)).sum())
        sevens = data.train_images[data.train_labels == 7]
        assert torch.equal(task.train_images[task.train_labels == 0], sevens)
        assert torch.equal(task.batch(3)[0], task.batch(3)[0]) and not torch.equal(task.batch(3)[0], task.batch(4)[0])

    def test_shrinking_averages_squares_of_pixels(self):
        task, whole = (class_split("digits", classes=(7, 2), shrink=k) for k in (2, 1))
        x = whole.train_images.unflatten(-1, (4, 2)).unflatten(-3, (4, 2)).mean((-1, -3))
        torch.testing.assert_close(task.train_images, x)

    def test_own_outputs_leave_those_of_other_tasks_alone(self):
        model = SmallCNN(width=2)
        task = class_split("digits", classes=(7, 2), batch=8)
        task.loss(model, task.batch(0)).backward()
        moving = model.head.weight.grad.abs().sum(1) > 0
        assert moving.nonzero()[:, 0].tolist() == [2, 7]
        shared = class_split("digits", classes=(7, 2), head="shared", batch=8)
        x = torch.rand(3, 1, 8, 8)
        torch.testing.assert_close(shared.scores(model, x), model(x)[:, :2])
        torch.testing.assert_close(task.scores(model, x), model(x)[:, [7, 2]])

    def test_a_sequence_deals_every_class_once(self):
        tasks = class_sequence("digits", parts=5, seed=3)
        assert sorted(c for t in tasks for c in t.classes) == list(range(10))
        assert [t.classes for t in tasks] == [t.classes for t in class_sequence("digits", parts=5, seed=3)]
        assert [t.classes for t in tasks] != [t.classes for t in class_sequence("digits", parts=5, seed=4)]

    def test_replay_mixes_losses_and_takes_turns(self):
        old, new = pair()
        third = class_split("digits", classes=(4, 5), batch=8)
        model, task = SmallCNN(width=2), Replay(third, [old, new], share=0.25)
        for step in (0, 1, 2):
            fresh, kept, index = task.batch(step)
            assert index == step % 2 and torch.equal(kept[0], (old, new)[index].batch(step)[0])
            wanted = 0.75 * third.loss(model, fresh) + 0.25 * (old, new)[index].loss(model, kept)
            torch.testing.assert_close(task.loss(model, task.batch(step)), wanted)

    def test_a_memory_holds_so_many_examples(self):
        old, new = pair()
        task = Replay(new, [old], memory=5)
        seen = {tuple(x.flatten().tolist()) for step in range(20) for x in task.batch(step)[1][0]}
        assert len(seen) <= 5
        assert torch.equal(task.batch(7)[1][0], Replay(new, [old], memory=5).batch(7)[1][0])
        assert task.describe()["replay_memory"] == 5

    def test_replay_without_a_share_is_plain_training_to_the_bit(self, tmp_path):
        old, new = pair()
        models = []
        for name, task in (("plain", new), ("replay", Replay(new, [old], share=0.0))):
            model = SmallCNN(width=2)
            fit(model, task, for_model(model, lr=0.01), steps=4, run=name, root=tmp_path, progress=False)
            models.append(model)
        assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))

    def test_bad_input_is_named(self, unchecked):
        old, new = pair()
        with pytest.raises(OptionError, match="two different ones"):
            class_split("digits", classes=(1,))
        with pytest.raises(OptionError, match="two different ones"):
            class_split("digits", classes=(1, 1))
        with pytest.raises(OptionError, match="below 10"):
            class_split("digits", classes=(1, 10))
        with pytest.raises(UnknownNameError, match="did you mean 'own'"):
            class_split("digits", classes=(1, 2), head="ow")
        for bad in ({"batch": 0}, {"shrink": 0}):
            with pytest.raises(OptionError, match="batch and shrink"):
                class_split("digits", classes=(1, 2), **bad)
        with pytest.raises(OptionError, match="divide 10"):
            class_sequence("digits", parts=3)
        for bad in ({"share": 1.5}, {"memory": 0}):
            with pytest.raises(OptionError, match="0 <= share <= 1"):
                Replay(new, [old], **bad)
        with pytest.raises(OptionError, match="need an old task"):
            Replay(new, [])


class TestProjections:
    @pytest.mark.parametrize("kind", ["inputs", "gradients"])
    def test_a_projection_is_idempotent_linear_and_symmetric(self, kind):
        model = SmallCNN(width=2).double()
        space = spaces(model.float(), pair()[0])[kind]
        model.double()
        a, b = change(model), change(model, 1)
        once = {n: t.clone() for n, t in a.items()}
        space.project(once)
        twice = {n: t.clone() for n, t in once.items()}
        space.project(twice)
        other = {n: t.clone() for n, t in b.items()}
        space.project(other)
        dot = lambda x, y: sum(float((x[n] * y[n]).sum()) for n in x)  # noqa: E731
        for n in once:
            torch.testing.assert_close(twice[n], once[n], rtol=1e-5, atol=1e-5)  # the basis is float32 or from it
        assert dot(once, b) == pytest.approx(dot(a, other), rel=1e-4)
        assert dot(once, once) < dot(a, a)

    def test_bases_are_orthonormal_and_grow(self):
        model, (first, second) = SmallCNN(width=2), pair()
        space = InputSubspaces().extend(model, first, samples=16, energy=0.9)
        before = {n: M.clone() for n, M in space.bases.items()}
        space.extend(model, second, samples=16, energy=0.97)
        for name, M in space.bases.items():
            torch.testing.assert_close(M.mT @ M, torch.eye(M.shape[1], dtype=M.dtype), rtol=0, atol=1e-9)
            assert torch.equal(M[:, : before[name].shape[1]], before[name])
        stored = GradientSubspace().extend(model, first, samples=5).extend(model, second, samples=5)
        B = stored.basis
        torch.testing.assert_close(B.mT @ B, torch.eye(B.shape[1]), rtol=0, atol=1e-5)
        assert B.shape[1] == 10 and stored.describe()["directions"] == 10

    @pytest.mark.parametrize("layer", ["conv1", "conv2", "hidden"])
    def test_outputs_of_a_layer_stay_on_inputs_in_the_span(self, layer):
        model, task = SmallCNN(width=2), class_split("digits", classes=(0, 1), batch=4)
        # All of the energy of a few images: whatever they put into the layer is in the span.
        space = InputSubspaces().extend(model, task, samples=2, energy=1.0)
        seen = {}
        module = model.get_submodule(layer)
        handle = module.register_forward_hook(lambda m, args, out: seen.update(x=args[0].detach(), y=out.detach()))
        x = task.batch(10**6)[0][:2]
        model(x)
        handle.remove()
        step = change(model)
        free = {n: t.clone() for n, t in step.items()}
        space.project(step)
        distance = {}
        for name, parts in (("free", free), ("projected", step)):
            moved = type(module)(**shape_of(module))
            with torch.no_grad():
                moved.weight.copy_(module.weight + parts[f"{layer}.weight"])
                moved.bias.copy_(module.bias + parts[f"{layer}.bias"])
                distance[name] = float((moved(seen["x"]) - seen["y"]).abs().max())
        assert distance["projected"] < 1e-4 < 0.1 < distance["free"]

    def test_a_frozen_bias_is_left_out(self):
        model, task = SmallCNN(width=2), pair()[0]
        space = InputSubspaces().extend(model, task, samples=8)
        step = {"hidden.weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))}
        space.project(step)
        inputs = space.bases["hidden"][:-1].to(step["hidden.weight"])
        assert float((step["hidden.weight"] @ inputs).abs().max()) < 1e-4

    def test_the_share_of_energy_is_reached_and_not_exceeded_by_more_than_one_direction(self):
        model, task = SmallCNN(width=2), pair()[0]
        captured = []
        handle = model.hidden.register_forward_pre_hook(lambda m, args: captured.append(args[0].detach()))
        space = InputSubspaces().extend(model, task, samples=16, energy=0.9)
        handle.remove()
        X = torch.cat([torch.cat(captured), torch.ones(16, 1)], 1).double()
        M = space.bases["hidden"]
        held = lambda B: float((X @ B).square().sum() / X.square().sum())  # noqa: E731
        assert held(M) >= 0.9 > held(M[:, :-1])

    def test_stored_gradients_keep_the_logits_to_first_order(self):
        model, task = SmallCNN(width=2), pair()[0]
        space = GradientSubspace().extend(model, task, samples=6)
        x, y = (part[:6] for part in task.batch(10**6))
        before = task.scores(model, x).gather(1, y[:, None]).detach()
        step = change(model)
        norm = sum(float(t.square().sum()) for t in step.values()) ** 0.5
        moved = {}
        for name in ("free", "projected"):
            parts = {n: t.clone() * (1e-3 / norm) for n, t in step.items()}
            if name == "projected":
                space.project(parts)
            twin = SmallCNN(width=2)
            with torch.no_grad():
                for n, p in twin.named_parameters():
                    p.add_(parts[n])
                moved[name] = float((task.scores(twin, x).gather(1, y[:, None]) - before).abs().max())
        # What is left is of second order in the step, and rounding of float32 logits (about 1e-6 of 2e-4).
        assert moved["projected"] < 0.1 * moved["free"]

    def test_adapters_take_stored_gradients(self):
        model = adapters.attach(SmallCNN(width=2), adapters.OFT(block_size=4), targets="hidden")
        space = GradientSubspace().extend(model, pair()[0], samples=4)
        step = change(model)
        space.project(step)
        flat = torch.cat([t.flatten() for t in step.values()])
        assert float((space.basis.mT @ flat).abs().max()) < 1e-5

    def test_what_cannot_be_protected_stands_still_unless_it_is_free(self):
        config = TinyGPTConfig(dim=16, layers=1, heads=2, hidden=24, context=16)
        model, task = TinyGPT(config), language_modelling("moby_dick", context=8, batch=2, validation_windows=2)
        for free in ((), ("norm.*",)):
            step = change(model)
            InputSubspaces(free=free).extend(model, task, samples=2, energy=0.5).project(step)
            assert not step["embed.weight"].any()
            assert bool(step["norm.weight"].any()) == bool(free) and step["head.weight"].any()

    def test_bad_input_is_named(self, unchecked):
        model, task = SmallCNN(width=2), pair()[0]
        with pytest.raises(OptionError, match="energy"):
            InputSubspaces().extend(model, task, energy=0.0)
        with pytest.raises(ParameterError, match="no linear layer"):
            InputSubspaces(free=("*",)).extend(model, task)
        with pytest.raises(ParameterError, match="groups"):
            InputSubspaces().extend(nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)), task)
        broken = SmallCNN(width=2)
        with torch.no_grad():
            broken.conv1.weight.fill_(float("nan"))
        with pytest.raises(NonFiniteError, match="inputs of layer"):
            InputSubspaces().extend(broken, task, samples=2)
        with pytest.raises(NonFiniteError, match="gradients"):
            GradientSubspace().extend(broken, task, samples=2)
        space = GradientSubspace().extend(model, task, samples=2)
        with pytest.raises(ParameterError, match="one set"):
            space.extend(SmallCNN(width=4), task, samples=2)
        with pytest.raises(ParameterError, match="must have shape"):
            space.project({"head.bias": torch.ones(3)})


def shape_of(module):
    if isinstance(module, nn.Linear):
        return {"in_features": module.in_features, "out_features": module.out_features}
    return {
        "in_channels": module.in_channels, "out_channels": module.out_channels, "kernel_size": 3, "padding": 1
    }  # fmt: skip


OPTIMIZERS = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "muon": lambda m: for_model(m, "muon", lr=0.02),
    "pion": lambda m: for_model(m, "pion", lr=0.02),
}


class TestTraining:
    def run(self, root, name, optimizer="adamw", *, steps=6, project=None, **options):
        model = SmallCNN(width=2)
        space = None if project is None else project(model)
        fit(
            model, pair()[1], OPTIMIZERS[optimizer](model), steps=steps, root=root, run=name, progress=False,
            project=space, evaluate_every=steps, precision="float32", **options,
        )  # fmt: skip
        return model

    @pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
    def test_any_optimizer_stays_out_of_the_inputs_of_the_first_task(self, tmp_path, optimizer):
        first, start = pair()[0], SmallCNN(width=2)
        space = InputSubspaces(free=("head.*",)).extend(start, first, samples=8, energy=0.9)
        end = self.run(tmp_path, optimizer, optimizer, project=lambda m: GradientProjection(space))
        before, after = dict(start.named_parameters()), dict(end.named_parameters())
        for name, M in space.bases.items():
            moved = [(after[f"{name}.{k}"] - before[f"{name}.{k}"]).detach() for k in ("weight", "bias")]
            D = torch.cat([moved[0].flatten(1), moved[1][:, None]], 1)
            assert D.norm() > 1e-3
            assert float((D.double() @ M).norm()) < 1e-4 * float(D.norm())

    def test_projecting_the_gradient_alone_is_not_enough_for_adam(self, tmp_path):
        first, start = pair()[0], SmallCNN(width=2)
        space = InputSubspaces(free=("head.*",)).extend(start, first, samples=8, energy=0.9)
        end = self.run(tmp_path, "r", "adamw", project=lambda m: GradientProjection(space, update=False))
        D = (end.hidden.weight - start.hidden.weight).detach()
        assert float((D.double() @ space.bases["hidden"][:-1]).norm()) > 0.01 * float(D.norm())

    def test_an_empty_space_is_plain_training_to_the_bit(self, tmp_path):
        plain = self.run(tmp_path, "plain")
        held = self.run(tmp_path, "held", project=lambda m: GradientProjection(GradientSubspace(), update=False))
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), held.parameters(), strict=True))

    def test_step_controller_and_projection_work_together_and_are_recorded(self, tmp_path):
        first = pair()[0]
        space = InputSubspaces(free=("head.*",)).extend(SmallCNN(width=2), first, samples=8, energy=0.9)
        options = {"step_controller": StepController(safety=0.3, examples=4)}
        end = self.run(tmp_path, "r", "sgd", project=lambda m: GradientProjection(space), **options)
        run = Run.open("r", root=tmp_path)
        ratio, scale = run.series("step_ratio")[1], run.series("step_scale")[1]
        assert (ratio * scale <= 0.3 * (1 + 1e-5)).all() and len(ratio) == 6
        assert run.config["safety"] == 0.3 and run.config["projection"] == "input subspaces"
        D = (end.hidden.weight - SmallCNN(width=2).hidden.weight).detach()
        assert float((D.double() @ space.bases["hidden"][:-1]).norm()) < 1.0

    def test_a_controller_that_never_acts_changes_no_bit(self, tmp_path):
        plain = self.run(tmp_path, "plain")
        held = self.run(tmp_path, "held", step_controller=StepController(safety=1e6))
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), held.parameters(), strict=True))

    def test_the_racer_takes_the_same_options(self, tmp_path):
        first = pair()[0]
        make = lambda m: GradientProjection(InputSubspaces(free=("head.*",)).extend(m, first, samples=8))  # noqa: E731
        fitted = self.run(
            tmp_path, "fit", "sgd", steps=4, project=make, clip=1.0, step_controller=StepController(safety=0.3)
        )
        model = SmallCNN(width=2)
        racer = Racer(
            model, pair()[1], OPTIMIZERS["sgd"](model), steps=4, schedule="constant", warmup=0, project=make(model),
            step_controller=StepController(safety=0.3),
        )  # fmt: skip
        for _ in range(4):
            racer.advance()
        assert all(torch.equal(a, b) for a, b in zip(fitted.parameters(), model.parameters(), strict=True))

    def test_a_controller_refuses_batches_of_batches(self, tmp_path):
        old, new = pair()
        model = SmallCNN(width=2)
        with pytest.raises(OptionError, match="inputs of one batch"):
            fit(
                model, Replay(new, [old]), OPTIMIZERS["sgd"](model), steps=1, root=tmp_path, run="r", progress=False,
                step_controller=StepController(),
            )  # fmt: skip
