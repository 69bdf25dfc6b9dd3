"""The training loop: what is recorded, how it ends, and that a resumed run gives the same bits."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orthokit.diagnostics.monitor import Monitor
from orthokit.errors import (
    CheckpointError,
    NonFiniteError,
    OptionError,
    RunBusyError,
    RunError,
    ShapeError,
    UnknownNameError,
)
from orthokit.lab import Run, Task, TinyGPT, TinyGPTConfig, fit, language_modelling, lr_factor
from orthokit.optim import for_model

CONFIG = TinyGPTConfig(dim=16, layers=1, heads=2, hidden=24, context=16)
RECORDED = ("loss", "lr", "grad_norm", "validation_bits_per_byte")
OPTIMIZERS = {
    "muon-pre": lambda m: for_model(m, lr=0.02, fallback_lr=0.01),
    "muon-post": lambda m: for_model(m, lr=0.02, order="post", ns_coefficients="you"),
    "muon-none": lambda m: for_model(m, lr=0.02, order="none", ns_dtype=torch.bfloat16),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, betas=(0.8, 0.9)),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.005, momentum=0.9, nesterov=True),
}


class Regression(Task):
    """Least squares through a dropout layer, which draws from torch's global generator as layers do."""

    name, metric, unit = "regression", "error", "squared"

    def __init__(self, *, bad_step: int | None = None) -> None:
        self.bad_step = bad_step

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(step)
        x = torch.randn(8, 4, generator=g)
        return x, x.sum(1, keepdim=True) * (math.nan if step == self.bad_step else 1.0)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert not model.training
        return {"error": float(self.loss(model, Regression().batch(10_000)))}

    def describe(self) -> dict[str, object]:
        return {"task": "regression"}


def gpt(seed: int = 0, **overrides: int) -> TinyGPT:
    return TinyGPT(CONFIG, seed=seed, **overrides)


def text() -> Task:
    return language_modelling("moby_dick", context=16, batch=2, validation_windows=2)


def dropout_net() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1, bias=False))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


def train(root: str | Path, *, steps: int, name: str = "killed", resume: bool | str = "auto", **options) -> TinyGPT:
    """One call as a script makes it; the child processes below run it by the path of this file."""
    torch.set_num_threads(1)
    model = gpt()
    options = {"evaluate_every": 5, "checkpoint_every": 4, "clip": 1.0, "progress": False, **options}
    fit(
        model, text(), for_model(model, lr=0.02), steps=steps, schedule="cosine", warmup=3, run=name, root=root,
        resume=resume, **options,
    )  # fmt: skip
    return model


def quick(model: nn.Module, task: Task, optimizer: torch.optim.Optimizer, *, root: Path, **options) -> Run:
    options = {"steps": 6, "run": "r", "progress": False, **options}
    return fit(model, task, optimizer, root=root, **options)


def weights(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(left), weights(right), strict=True))


def history(run: Run, names=RECORDED) -> dict[str, tuple[list, list]]:
    return {name: tuple(array.tolist() for array in run.series(name)) for name in names}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TestRecords:
    def test_learning_rates_follow_the_schedule(self, tmp_path):
        model, rates = nn.Sequential(nn.Linear(4, 1)), []
        optimizer = torch.optim.SGD([{"params": [model[0].weight], "lr": 0.5}, {"params": [model[0].bias], "lr": 0.1}])
        shape = {"schedule": "cosine", "warmup": 2, "final": 0.1}
        look = lambda step, loss: rates.append([group["lr"] for group in optimizer.param_groups])  # noqa: E731
        run = quick(model, Regression(), optimizer, root=tmp_path, on_step=look, **shape)
        factors = [lr_factor(step, steps=6, **shape) for step in range(6)]
        assert rates == [[0.5 * f, 0.1 * f] for f in factors]
        steps, lr = run.series("lr")
        assert steps.tolist() == [1, 2, 3, 4, 5, 6] and lr.tolist() == [0.5 * f for f in factors]
        # Handed back as they came, so that a second fit starts from the same base.
        assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]

    def test_a_tensor_learning_rate_stays_a_tensor(self, tmp_path):
        model, rate = nn.Sequential(nn.Linear(4, 1)), torch.tensor(0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        run = quick(model, Regression(), optimizer, root=tmp_path, schedule="cosine")
        assert optimizer.param_groups[0]["lr"] is rate and float(rate) == 0.5
        assert run.series("lr")[1][-1] < 0.5

    def test_loss_and_norm_are_those_of_the_step(self, tmp_path):
        model, seen = nn.Sequential(nn.Linear(4, 1)), []
        run = quick(
            model, Regression(), torch.optim.SGD(model.parameters(), lr=0.0), root=tmp_path,
            on_step=lambda step, loss: seen.append((step, loss)),
        )  # fmt: skip
        losses, norms = [], []
        for step in range(6):
            model.zero_grad()
            loss = Regression().loss(model, Regression().batch(step))
            loss.backward()
            losses.append(loss.item())
            norms.append(math.hypot(*(float(p.grad.norm()) for p in model.parameters())))
        assert run.series("loss")[1].tolist() == losses
        assert seen == list(enumerate(losses, 1))
        assert run.series("grad_norm")[1].tolist() == pytest.approx(norms, rel=1e-5)

    def test_clipping_bounds_the_update_and_records_the_norm_before(self, tmp_path):
        for clip, moved in ((1e-3, pytest.approx(1e-3, rel=1e-3)), (1e6, None)):
            model = nn.Sequential(nn.Linear(4, 1))
            before = weights(model)
            run = quick(
                model, Regression(), torch.optim.SGD(model.parameters(), lr=1.0), root=tmp_path, steps=1, clip=clip,
                run=f"clip{clip}",
            )  # fmt: skip
            change = math.hypot(*(float((a - b).norm()) for a, b in zip(weights(model), before, strict=True)))
            norm = run.series("grad_norm")[1][0]
            assert norm > 1e-2
            assert change == (pytest.approx(norm, rel=1e-4) if moved is None else moved)

    def test_evaluations_stand_at_start_period_and_end(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        run = quick(model, Regression(), optimizer, root=tmp_path, steps=7, evaluate_every=3, log_every=2)
        assert run.series("error")[0].tolist() == [0, 3, 6, 7]
        assert run.series("loss")[0].tolist() == [2, 4, 6, 7]
        assert run.series("error")[1][-1] == Regression().evaluate(model.eval())["error"]

    def test_config_says_what_was_done(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        run = quick(model, Regression(), optimizer, root=tmp_path, clip=2.0, config={"note": "x", "lr": 7})
        wanted = {"steps": 6, "schedule": "constant", "clip": 2.0, "optimizer": "SGD", "task": "regression"}
        assert wanted.items() <= run.config.items()
        assert run.config["parameters"] == 5 and run.config["note"] == "x" and run.config["lr"] == 7

    def test_checkpoints_stand_at_their_period(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 1))
        made = []
        original = Run.save_checkpoint
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "save_checkpoint", lambda self, step, *a: made.append(step) or original(self, step, *a))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            quick(model, Regression(), optimizer, root=tmp_path, steps=7, checkpoint_every=3)
        assert made == [0, 3, 6, 7]

    def test_a_name_is_made_up_when_none_is_given(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        first, second = (quick(model, Regression(), optimizer, root=tmp_path, run=None, steps=1) for _ in range(2))
        assert first.name != second.name and Run.open(first.name, root=tmp_path).status == "finished"

    def test_an_open_run_is_written_into_and_closed(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 1))
        run = Run.create("mine", root=tmp_path, config={"who": "me"})
        done = quick(model, Regression(), torch.optim.SGD(model.parameters(), lr=0.01), root=tmp_path, run=run)
        assert done is run and not run.writable and run.status == "finished" and run.config == {"who": "me"}

    def test_monitor_records_land_in_the_run(self, tmp_path):
        model = gpt()
        optimizer = for_model(model, lr=0.02)
        monitor = Monitor(model, optimizer, every=2, budget=1.0, rank=2, matrices="blocks.0.attn.*")
        run = quick(model, text(), optimizer, root=tmp_path, monitor=monitor)
        looked = sorted({row["step"] for row in monitor.records})
        assert len(looked) >= 2
        name = "blocks.0.attn.q.weight"
        steps, spectra = run.spectra(f"{name}/spectrum")
        assert steps.tolist() == looked
        mine = [row for row in monitor.records if row["matrix"] == name]
        np.testing.assert_array_equal(spectra, np.stack([row["spectrum"] for row in mine]))
        assert run.series(f"{name}/stable_rank")[1].tolist() == [row["stable_rank"] for row in mine]
        assert set(monitor.notes) <= set(run.notes())

    def test_a_monitor_does_not_change_the_training(self, tmp_path):
        plain, watched = gpt(), gpt()
        quick(plain, text(), for_model(plain, lr=0.02), root=tmp_path, run="plain")
        optimizer = for_model(watched, lr=0.02)
        monitor = Monitor(watched, optimizer, every=1, budget=1.0)
        quick(watched, text(), optimizer, root=tmp_path, run="watched", monitor=monitor)
        assert monitor.records and same(plain, watched)

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_precision_is_applied_and_recorded(self, tmp_path, precision):
        seen = []

        class Probe(Regression):
            def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
                seen.append(model(batch[0]).dtype)
                return super().loss(model, batch).float()

        model = nn.Sequential(nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        run = quick(model, Probe(), optimizer, root=tmp_path, precision=precision)
        assert set(seen) == {getattr(torch, precision)} and run.config["precision"] == precision
        assert all(p.dtype == torch.float32 for p in model.parameters())


def test_training_learns(tmp_path):
    model = gpt()
    run = quick(model, text(), for_model(model, lr=0.02), root=tmp_path, steps=60, evaluate_every=60)
    _, bits = run.series("validation_bits_per_byte")
    assert bits[0] > 7 and bits[-1] < bits[0] - 1.5


def test_nothing_draws_from_the_global_generator(tmp_path):
    state = torch.get_rng_state()
    model = gpt()
    quick(model, text(), for_model(model, lr=0.02), root=tmp_path)
    assert torch.equal(state, torch.get_rng_state())


def test_gradients_left_from_before_are_dropped(tmp_path):
    clean, stale = gpt(), gpt()
    for p in stale.parameters():
        p.grad = torch.ones_like(p)
    for name, model in (("clean", clean), ("stale", stale)):
        quick(model, text(), for_model(model, lr=0.02), root=tmp_path, run=name)
    assert same(clean, stale)


def test_gradients_of_parameters_nobody_updates_do_not_pile_up(tmp_path):
    model = nn.Sequential(nn.Linear(4, 1))
    run = quick(model, Regression(), torch.optim.SGD([model[0].bias], lr=0.0), root=tmp_path, steps=4)
    norms = []
    for step in range(4):
        model.zero_grad()
        Regression().loss(model, Regression().batch(step)).backward()
        norms.append(math.hypot(*(float(p.grad.norm()) for p in model.parameters())))
    assert run.series("grad_norm")[1].tolist() == pytest.approx(norms, rel=1e-5)


class TestStopping:
    def test_stop_ends_at_the_step_and_resumes_to_the_same_bits(self, tmp_path, one_thread):
        whole = train(tmp_path, steps=20, name="whole")
        stop = threading.Event()
        train(tmp_path, steps=20, name="parts", stop=stop, on_step=lambda step, loss: stop.set() if step == 9 else None)
        run = Run.open("parts", root=tmp_path)
        assert run.status == "interrupted" and run.last_step == 9 and run.checkpoints()[-1][0] == 9
        resumed = train(tmp_path, steps=20, name="parts", resume=True)
        assert same(whole, resumed)
        assert history(Run.open("whole", root=tmp_path)) == history(run)
        assert run.status == "finished"

    @pytest.mark.parametrize("name", list(OPTIMIZERS))
    def test_every_optimizer_resumes_to_the_same_bits(self, tmp_path, name, one_thread):
        def go(run: str, until: int | None) -> nn.Module:
            torch.manual_seed(5)  # the dropout's own stream has to be carried over as well
            if until is None and run == "parts":
                torch.manual_seed(99)
            model, stop = dropout_net(), threading.Event()
            ask = lambda step, loss: stop.set() if step == until else None  # noqa: E731
            optimizer = OPTIMIZERS[name](model)
            quick(
                model, Regression(), optimizer, root=tmp_path, run=run, steps=12, stop=stop, on_step=ask,
                resume="auto", schedule="wsd",
            )  # fmt: skip
            return model

        state = torch.get_rng_state()
        whole = go("whole", None)
        go("parts", 5)
        resumed = go("parts", None)
        torch.set_rng_state(state)
        assert same(whole, resumed)
        names = ("loss", "lr", "grad_norm", "error")
        assert history(Run.open("whole", root=tmp_path), names) == history(Run.open("parts", root=tmp_path), names)

    def test_what_was_recorded_after_the_checkpoint_is_replaced(self, tmp_path, one_thread):
        whole = train(tmp_path, steps=12, name="whole")
        model, calls = gpt(), []

        def explode(step: int, loss: float) -> None:
            calls.append(step)
            if step == 7:
                raise RuntimeError("a callback failed")

        with pytest.raises(RuntimeError, match="a callback failed"):
            train(tmp_path, steps=12, name="parts", on_step=explode)
        run = Run.open("parts", root=tmp_path)
        assert run.status == "failed" and run.error == "a callback failed" and run.last_step == 7
        assert run.checkpoints()[-1][0] == 4
        model = train(tmp_path, steps=12, name="parts", on_step=lambda step, loss: calls.append(step))
        assert calls == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9, 10, 11, 12]
        assert same(whole, model) and history(Run.open("whole", root=tmp_path)) == history(run)

    def test_a_run_killed_before_its_first_checkpoint_starts_again(self, tmp_path, one_thread):
        whole = train(tmp_path, steps=6, name="whole")
        Run.create("early", root=tmp_path, config={}).close()
        assert same(whole, train(tmp_path, steps=6, name="early", resume=True))
        assert Run.open("early", root=tmp_path).status == "finished"

    def test_a_finished_run_can_be_made_longer(self, tmp_path, one_thread):
        def go(name: str, steps: int) -> nn.Module:
            model = gpt()
            quick(model, text(), for_model(model, lr=0.02), root=tmp_path, run=name, steps=steps, resume="auto")
            return model

        whole = go("whole", 8)
        go("parts", 5)
        assert same(whole, go("parts", 8))
        again = go("parts", 8)  # nothing left to do
        assert same(whole, again) and Run.open("parts", root=tmp_path).status == "finished"

    def test_an_open_run_is_resumed_when_asked(self, tmp_path, one_thread):
        whole = train(tmp_path, steps=8, name="whole")
        stop = threading.Event()
        train(tmp_path, steps=8, name="parts", stop=stop, on_step=lambda step, loss: stop.set() if step == 3 else None)
        with Run.open("parts", root=tmp_path, mode="w") as run:
            assert same(whole, train(tmp_path, steps=8, name=run, resume=True))

    def test_pause_holds_between_steps_and_stop_ends_a_pause(self, tmp_path):
        pause, stop, held, seen = threading.Event(), threading.Event(), threading.Event(), []
        model = nn.Sequential(nn.Linear(4, 1))

        def on_step(step: int, loss: float) -> None:
            seen.append(step)
            if step in (2, 4):
                pause.set()
                held.set()

        def drive() -> None:
            held.wait(30)
            time.sleep(0.1)
            at_first_pause.append(len(seen))
            held.clear()
            pause.clear()
            held.wait(30)
            stop.set()  # while paused

        at_first_pause: list[int] = []
        driver = threading.Thread(target=drive)
        driver.start()
        run = quick(
            model, Regression(), torch.optim.SGD(model.parameters(), lr=0.01), root=tmp_path, steps=50,
            pause=pause, stop=stop, on_step=on_step,
        )  # fmt: skip
        driver.join()
        assert at_first_pause == [2] and seen == [1, 2, 3, 4]
        assert run.status == "interrupted" and run.checkpoints()[-1][0] == 4

    def test_works_off_the_main_thread(self, tmp_path):
        model, found = nn.Sequential(nn.Linear(4, 1)), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        thread = threading.Thread(target=lambda: found.append(quick(model, Regression(), optimizer, root=tmp_path)))
        thread.start()
        thread.join()
        assert found[0].status == "finished"

    def test_interrupt_handler_is_put_back(self, tmp_path):
        before = signal.getsignal(signal.SIGINT)
        model = nn.Sequential(nn.Linear(4, 1))
        quick(model, Regression(), torch.optim.SGD(model.parameters(), lr=0.01), root=tmp_path)
        assert signal.getsignal(signal.SIGINT) is before

    def test_first_interrupt_waits_for_the_step_and_the_second_does_not(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        def interrupt(times: int):
            def on_step(step: int, loss: float) -> None:
                if step == 3:
                    for _ in range(times):
                        signal.raise_signal(signal.SIGINT)

            return on_step

        with pytest.raises(KeyboardInterrupt, match="stopped at a step boundary"):
            quick(model, Regression(), optimizer, root=tmp_path, run="one", on_step=interrupt(1))
        run = Run.open("one", root=tmp_path)
        assert run.status == "interrupted" and run.checkpoints()[-1][0] == 3
        with pytest.raises(KeyboardInterrupt):
            quick(model, Regression(), optimizer, root=tmp_path, run="two", on_step=interrupt(2))
        assert Run.open("two", root=tmp_path).status == "interrupted"


CHILD = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("child", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.train(sys.argv[2], steps=int(sys.argv[3]))
"""


def child(root: Path, steps: int) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, __file__, str(root), str(steps)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen, root: Path, step: int) -> None:
    """Until the run in the other process has recorded ``step``, or it ended."""
    while process.poll() is None:
        if Run.exists("killed", root=root) and (Run.open("killed", root=root).last_step or 0) >= step:
            return
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Weights and records of 120 steps without a break."""
    root, threads = tmp_path_factory.mktemp("whole"), torch.get_num_threads()
    model = train(root, steps=120)
    torch.set_num_threads(threads)
    return model, history(Run.open("killed", root=root))


class TestOtherProcesses:
    def test_killed_at_random_instants_and_resumed_gives_the_same_bits(self, tmp_path, uninterrupted, one_thread):
        model, expected = uninterrupted
        dice = random.Random()
        instants = []
        for _ in range(2):
            process = child(tmp_path, 120)
            step, delay = dice.randrange(1, 60), dice.random() * 0.1
            instants.append((step, delay))
            run = Run.open("killed", root=tmp_path) if Run.exists("killed", root=tmp_path) else None
            wait_for_step(process, tmp_path, max(step, (run.last_step or 0) + 1 if run else step))
            time.sleep(delay)
            process.kill()
            process.communicate()
            assert Run.open("killed", root=tmp_path).status in ("killed", "finished"), instants
        resumed = train(tmp_path, steps=120)
        assert same(model, resumed), instants
        assert history(Run.open("killed", root=tmp_path)) == expected, instants
        assert Run.open("killed", root=tmp_path).status == "finished"

    def test_interrupted_from_the_keyboard_it_is_resumable(self, tmp_path, uninterrupted, one_thread):
        model, expected = uninterrupted
        process = child(tmp_path, 120)
        wait_for_step(process, tmp_path, 5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0 or "KeyboardInterrupt: stopped at a step boundary" in errors
        run = Run.open("killed", root=tmp_path)
        # A machine that was faster than the signal has finished; then there is nothing to resume.
        assert run.status == "interrupted" or run.last_step == 120
        assert run.checkpoints()[-1][0] == run.last_step
        assert same(model, train(tmp_path, steps=120)) and history(run) == expected


class TestRefusals:
    def test_loss_that_is_not_finite_fails_the_run_and_keeps_it(self, tmp_path):
        model = dropout_net()
        optimizer = for_model(model, lr=0.01)
        with pytest.raises(NonFiniteError, match="the loss must stay finite; it is nan at step 4"):
            quick(model, Regression(bad_step=3), optimizer, root=tmp_path, checkpoint_every=1)
        run = Run.open("r", root=tmp_path)
        assert run.status == "failed" and "nan at step 4" in (run.error or "")
        assert run.series("loss")[0].tolist() == [1, 2, 3] and run.checkpoints()[-1][0] == 3
        assert all(p.isfinite().all() for p in model.parameters())
        run = quick(dropout_net(), Regression(), for_model(model, lr=0.01), root=tmp_path, resume=True, steps=3)
        assert run.status == "finished" and run.error is None

    def test_gradient_that_is_not_finite_moves_nothing(self, tmp_path):
        class Root(Regression):
            """The root of zero has a finite value and an infinite slope."""

            def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
                return (model(batch[0]) * 0).abs().sqrt().mean()

        model = nn.Sequential(nn.Linear(4, 1))
        before = weights(model)
        with pytest.raises(NonFiniteError, match="gradients must stay finite"):
            quick(model, Root(), torch.optim.AdamW(model.parameters()), root=tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
        assert Run.open("r", root=tmp_path).status == "failed"

    @pytest.mark.parametrize("other", ["shape", "missing", "optimizer", "groups"])
    def test_a_checkpoint_of_something_else_changes_nothing(self, tmp_path, other):
        model = gpt()
        quick(model, text(), for_model(model, lr=0.02), root=tmp_path)
        run = Run.open("r", root=tmp_path)
        before, files = history(run), [step for step, _ in run.checkpoints()]
        model = {"shape": lambda: gpt(1, hidden=32), "missing": lambda: gpt(1, layers=2)}.get(other, lambda: gpt(1))()
        optimizer = {
            "optimizer": lambda: torch.optim.AdamW(model.parameters()),
            "groups": lambda: for_model(model, lr=0.02, exclude="*.q.weight"),
        }.get(other, lambda: for_model(model, lr=0.02))()
        kept, state = weights(model), json.dumps(optimizer.state_dict(), default=str)
        words = "another model" if other in ("shape", "missing") else "another optimizer"
        with pytest.raises(CheckpointError, match=words):
            quick(model, text(), optimizer, root=tmp_path, resume=True)
        assert all(torch.equal(a, b) for a, b in zip(kept, weights(model), strict=True))
        assert json.dumps(optimizer.state_dict(), default=str) == state
        assert run.status == "finished" and history(run) == before
        assert [step for step, _ in run.checkpoints()] == files
        Run.open("r", root=tmp_path, mode="w").close()  # the lock was given back

    def test_an_existing_name_is_not_overwritten(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        quick(model, Regression(), optimizer, root=tmp_path)
        before = history(Run.open("r", root=tmp_path), ("loss",))
        with pytest.raises(RunError, match="exists already"):
            quick(model, Regression(), optimizer, root=tmp_path)
        assert history(Run.open("r", root=tmp_path), ("loss",)) == before

    def test_a_second_writer_is_refused(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        quick(model, Regression(), optimizer, root=tmp_path)
        with Run.open("r", root=tmp_path, mode="w"), pytest.raises(RunBusyError, match="being written"):
            quick(model, Regression(), optimizer, root=tmp_path, resume=True)

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize(
        ("bad", "error", "words"),
        [
            ({"steps": 0}, OptionError, "steps must be at least 1"),
            ({"evaluate_every": 0}, OptionError, "evaluate_every must be at least 1"),
            ({"log_every": 0}, OptionError, "log_every must be at least 1"),
            ({"checkpoint_every": -1}, OptionError, "checkpoint_every must be at least 1"),
            ({"clip": 0.0}, OptionError, "clip must be greater than 0"),
            ({"warmup": 7}, OptionError, "warmup=7"),
            ({"final": 2.0}, OptionError, "final=2.0"),
            ({"schedule": "cosin"}, UnknownNameError, "did you mean 'cosine'"),
            ({"precision": "float64"}, UnknownNameError, "precision"),
            ({"resume": "maybe"}, UnknownNameError, "resume"),
            ({"resume": True}, RunError, "'r' does not"),
            ({"resume": True, "run": None}, OptionError, "needs run="),
            ({"run": "a/b"}, OptionError, "name of a run"),
        ],
        ids=str,
    )
    def test_options_out_of_range_leave_no_trace(self, tmp_path, bad, error, words):
        model = nn.Sequential(nn.Linear(4, 1))
        before = weights(model)
        with pytest.raises(error, match=words):
            quick(model, Regression(), torch.optim.SGD(model.parameters(), lr=0.01), root=tmp_path, **bad)
        assert list(tmp_path.iterdir()) == []
        assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))

    def test_an_error_of_the_model_fails_the_run(self, tmp_path):
        model = gpt(context=8)
        with pytest.raises(ShapeError, match="at most context = 8"):
            quick(model, text(), for_model(model, lr=0.02), root=tmp_path)
        run = Run.open("r", root=tmp_path)
        assert run.status == "failed" and "context" in (run.error or "")
