"""One optimizer for a whole model: who updates what, and that both parts act as one."""

import copy
import io

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

from orthokit.errors import NonFiniteError, NothingMatchedWarning, OptionError, ParameterError, UnknownNameError
from orthokit.lab.models import SmallCNN, TinyGPT
from orthokit.optim import OPTIMIZERS, Muon, RoutedOptimizer, for_model


class Conv1D(nn.Module):
    """The layer of GPT-2: weight stored ``(in, out)``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Net(nn.Module):
    """Conv, transposed linear, norm, embedding tied to the head, a frozen matrix and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(20, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.c_fc = Conv1D(6, 9)
        self.norm = nn.LayerNorm(9)
        self.mlp = nn.Linear(9, 6)
        self.frozen = nn.Linear(6, 6, bias=False)
        self.frozen.weight.requires_grad_(False)
        self.lm_head = nn.Linear(6, 20, bias=False)
        self.lm_head.weight = self.wte.weight
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=g))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.wte(ids).mT).mT
        return self.lm_head(self.frozen(self.mlp(self.norm(self.c_fc(x)))))


def backward(model: nn.Module, step: int = 0) -> None:
    model.zero_grad()
    ids = torch.randint(20, (4, 5), generator=torch.Generator().manual_seed(step))
    model(ids).square().mean().backward()


def owners(optimizer: RoutedOptimizer) -> dict[str, str]:
    frame = optimizer.routing
    return dict(zip(frame["name"], frame["optimizer"], strict=True))


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("build", [Net, SmallCNN, lambda: TinyGPT("0.2M", layers=1)], ids=["net", "cnn", "gpt"])
def test_every_trainable_parameter_is_in_exactly_one_group(name, build):
    model = build()
    optimizer = for_model(model, name, lr=1e-3)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len(grouped) == len(set(grouped))
    frame = optimizer.routing
    assert set(frame["parameter"]) == {n for n, _ in model.named_parameters(remove_duplicate=False)}


def test_routing_says_who_updates_what():
    assert owners(for_model(Net(), lr=1e-3)) == {
        "wte.weight": "AdamW",
        "conv.weight": "Muon",
        "conv.bias": "AdamW",
        "c_fc.weight": "Muon",
        "c_fc.bias": "AdamW",
        "norm.weight": "AdamW",
        "norm.bias": "AdamW",
        "mlp.weight": "Muon",
        "mlp.bias": "AdamW",
        "frozen.weight": "none",
        "lm_head.weight": "none",  # a second name of wte.weight
    }


def test_excluded_matrices_go_to_adamw():
    found = owners(for_model(Net(), lr=1e-3, exclude="c_fc.*"))
    assert found["c_fc.weight"] == "AdamW" and found["mlp.weight"] == "Muon"
    found = owners(for_model(Net(), lr=1e-3, exclude=["c_fc.*", lambda name: name.startswith("mlp")]))
    assert found["c_fc.weight"] == found["mlp.weight"] == "AdamW"
    with pytest.warns(NothingMatchedWarning, match="matches no parameter"):
        for_model(Net(), lr=1e-3, exclude="decoder.*")


def test_frozen_and_unused_parameters_stay():
    model = Net()
    optimizer = for_model(model, lr=0.1)
    before = model.frozen.weight.clone()
    for step in range(2):
        backward(model, step)
        optimizer.step()
    assert torch.equal(model.frozen.weight, before)
    assert model.frozen.weight not in optimizer.state


def test_tied_weights_are_updated_once():
    model = Net()
    optimizer = for_model(model, lr=0.1, fallback_lr=0.01)
    twin = nn.Parameter(model.wte.weight.detach().clone())
    lone = torch.optim.AdamW([twin], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        backward(model, step)
        twin.grad = model.wte.weight.grad.clone()
        optimizer.step()
        lone.step()
    torch.testing.assert_close(model.lm_head.weight.detach(), twin.detach())


def test_parts_step_as_they_would_alone():
    one, two = Net(), Net()
    together = for_model(one, lr=0.05, fallback_lr=0.01, weight_decay=0.1, fallback_weight_decay=0.2)
    matrices_ = [two.conv.weight.data, two.c_fc.weight.data.T, two.mlp.weight.data]
    views = [nn.Parameter(matrices_[0].flatten(1)), nn.Parameter(matrices_[1].clone()), nn.Parameter(matrices_[2])]
    muon = Muon(views, lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = {"conv.bias", "c_fc.bias", "norm.weight", "norm.bias", "mlp.bias", "wte.weight"}
    others = [p for name, p in two.named_parameters() if name in rest]
    adamw = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.2)
    for step in range(3):
        backward(one, step)
        for name, p in one.named_parameters():
            if name in rest:
                two.get_parameter(name).grad = p.grad.clone()
        views[0].grad, views[1].grad = one.conv.weight.grad.flatten(1), one.c_fc.weight.grad.T.contiguous()
        views[2].grad = one.mlp.weight.grad.clone()
        together.step()
        muon.step()
        adamw.step()
    for name in rest:
        torch.testing.assert_close(one.get_parameter(name), two.get_parameter(name))
    # The stored (in, out) weight of Conv1D is stepped as its transpose (out, in); bfloat16 products may round apart.
    atol = 3 * 0.05 * 0.2 * 18**0.5 * 2e-2
    torch.testing.assert_close(one.c_fc.weight.T, views[1], rtol=0, atol=atol)
    torch.testing.assert_close(one.conv.weight.flatten(1), views[0], rtol=0, atol=atol)
    torch.testing.assert_close(one.mlp.weight, views[2], rtol=0, atol=atol)


def test_fused_projection_is_stepped_part_by_part():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = nn.Linear(6, 18, bias=False)

    model = Attention().double()
    parts = [nn.Parameter(w.clone()) for w in model.c_attn.weight.detach().chunk(3)]
    fused = for_model(model, lr=0.1, split_fused=True)
    apart = Muon(parts, lr=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        model.c_attn.weight.grad = torch.randn(18, 6, generator=g, dtype=torch.float64)
        for p, grad in zip(parts, model.c_attn.weight.grad.chunk(3), strict=True):
            p.grad = grad.clone()
        fused.step()
        apart.step()
    torch.testing.assert_close(model.c_attn.weight.detach(), torch.cat([p.detach() for p in parts]))


def test_no_matrix_is_an_error():
    with pytest.raises(ParameterError, match="LayerNorm has no trainable matrix"), pytest.warns(NothingMatchedWarning):
        for_model(nn.LayerNorm(4), lr=1e-3)
    frozen = nn.Linear(4, 3)
    frozen.weight.requires_grad_(False)
    with pytest.raises(ParameterError, match="no trainable matrix"):
        for_model(frozen, lr=1e-3)


def test_only_matrices_need_no_fallback():
    optimizer = for_model(nn.Linear(4, 3, bias=False), lr=1e-3)
    assert len(optimizer.parts) == len(optimizer.param_groups) == 1


@pytest.mark.parametrize("where", ["mlp.weight", "norm.bias", "wte.weight"])
def test_a_bad_gradient_in_either_part_stops_both(where):
    model = Net()
    optimizer = for_model(model, lr=0.1)
    backward(model)
    optimizer.step()
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
    backward(model, 1)
    model.get_parameter(where).grad.view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteError, match=f"'{where}'"):
        optimizer.step()
    assert same(model, before)
    for index, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[index][key]) for key, value in entries.items())


@pytest.mark.parametrize("order", ["pre", "post", "none"])
def test_resume_is_exact_through_a_file(order):
    model = Net()
    optimizer = for_model(model, lr=0.1, fallback_lr=0.01, order=order)
    for step in range(2):
        backward(model, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = Net()
    twin.load_state_dict(saved["model"])
    resumed = for_model(twin, lr=9.0, order=order)
    resumed.load_state_dict(saved["optimizer"])
    for step in range(2, 5):
        for m, o in ((model, optimizer), (twin, resumed)):
            backward(m, step)
            o.step()
    assert same(model, twin)


def test_deep_copy_goes_on_by_itself():
    model = Net()
    optimizer = for_model(model, lr=0.1)
    backward(model)
    optimizer.step()
    twin, copied = copy.deepcopy((model, optimizer))
    before = copy.deepcopy(model)
    backward(twin, 1)
    copied.step()
    assert same(model, before) and not same(model, twin)
    backward(model, 1)
    optimizer.step()
    assert same(model, twin)
    assert copied.routing.equals(optimizer.routing)


def test_one_scheduler_moves_both_parts():
    model = Net()
    optimizer = for_model(model, lr=0.1, fallback_lr=0.01)
    scheduler = schedulers.OneCycleLR(optimizer, max_lr=[0.2, 0.02], total_steps=6)
    seen = []
    for step in range(4):
        seen.append([group["lr"] for group in optimizer.param_groups])
        backward(model, step)
        optimizer.step()
        scheduler.step()
    assert all(a != b for a, b in zip(seen[0], seen[1], strict=True))
    assert [part.param_groups[0]["lr"] for part in optimizer.parts] == [g["lr"] for g in optimizer.param_groups]


def test_zero_grad_and_closure_serve_both_parts():
    model = Net()
    optimizer, calls = for_model(model, lr=0.1), []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(torch.arange(5)[None]).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert calls == [True]
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_report_is_that_of_the_parts_and_says_whose(name):
    model = Net()
    optimizer = for_model(model, name, lr=0.01)
    with pytest.raises(ParameterError, match="gradient"):
        optimizer.report()
    backward(model)
    optimizer.step()
    options = {"time": False} if name == "muon" else {}  # what is timed differs from call to call
    frame = optimizer.report(**options)
    assert list(frame.columns[:2]) == ["matrix", "optimizer"]
    assert set(frame["optimizer"]) == {OPTIMIZERS[name].__name__}
    routed = optimizer.routing
    assert list(frame["matrix"]) == list(routed["name"][routed["optimizer"] == OPTIMIZERS[name].__name__])
    pd.testing.assert_frame_equal(frame.drop(columns="optimizer"), optimizer.matrix.report(**options))


def test_reports_of_several_parts_stand_under_each_other_and_none_is_said():
    class Plain(Muon):
        report = None

    model = Net()
    optimizer = for_model(model, lr=0.01)
    backward(model)
    optimizer.step()
    once = optimizer.report(time=False)
    optimizer.parts = [*optimizer.parts, optimizer.matrix]
    assert list(optimizer.report(time=False)["matrix"]) == [*once["matrix"], *once["matrix"]]
    with pytest.raises(ParameterError, match="Plain and AdamW make no report"):
        for_model(Net(), Plain, lr=0.01).report()


def test_no_further_groups():
    optimizer = for_model(Net(), lr=0.1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ParameterError, match="for_model again"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})
    assert optimizer.state_dict() == before


def test_class_and_name_are_the_same_and_others_are_refused():
    by_name, by_class = for_model(Net(), "muon", lr=0.1), for_model(Net(), Muon, lr=0.1)
    assert owners(by_name) == owners(by_class)
    with pytest.raises(UnknownNameError, match="did you mean 'muon'"):
        for_model(Net(), "muonn", lr=0.1)
    for bad in ({"lr": -1.0}, {"lr": 0.1, "fallback_lr": -1.0}):
        with pytest.raises(OptionError, match="lr must be at least 0"):
            for_model(Net(), **bad)


def test_training_lowers_the_loss():
    model = Net()
    optimizer = for_model(model, lr=0.05)
    ids = torch.arange(20).reshape(4, 5)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
