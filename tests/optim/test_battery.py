"""What every optimizer of the library must do, in every order: one battery over ``optim.OPTIMIZERS``."""

import copy
import inspect
import io

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

from orthokit._threads import seat
from orthokit.errors import NonFiniteError, OptionError, ParameterError
from orthokit.optim import OPTIMIZERS, _pieces, base

ORDERS = ("pre", "post", "none")
CASES = [
    pytest.param(kind, {"order": order} if order else {}, id=f"{name}-{order or 'only'}")
    for name, kind in OPTIMIZERS.items()
    for order in (ORDERS if "order" in inspect.signature(kind).parameters else (None,))
]
SHAPES = [(6, 4), (4, 6), (5, 5), (1, 7), (7, 1), (3, 4, 6), (6, 3, 2, 2), (4, 2, 2, 3, 2)]
# What an optimizer says it does not take; it must then refuse it, before it has kept anything.
REAL_ONLY = {OPTIMIZERS["pion"]}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]
SCHEDULES = {
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=8, base_momentum=0.8, max_momentum=0.9),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 0.1, step_size_up=2, base_momentum=0.8, max_momentum=0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 4]),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=4),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=4),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
}

pytestmark = pytest.mark.parametrize(("kind", "options"), CASES)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameters(dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(randn(*shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    for i, p in enumerate(params):
        p.grad = randn(*p.shape, seed=100 * step + i + 50).to(p.dtype)


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def refused(kind, options, dtype: torch.dtype) -> bool:
    """Whether the optimizer declares that it takes no such parameters; that it says so itself is checked on the way."""
    if kind not in REAL_ONLY or not dtype.is_complex:
        return False
    with pytest.raises(ParameterError, match=r"'parameter 0' is torch\.complex64"):
        kind(parameters(dtype), lr=0.1, **options)
    return True


def first_momentum(group: dict) -> float:
    return group["betas"][0] if "betas" in group else group["momentum"]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape_moves_in_place_and_gradients_stay(kind, options, dtype):
    if refused(kind, options, dtype):
        return
    params = parameters(dtype)
    start, places = values(params), [p.data_ptr() for p in params]
    optimizer = kind(params, lr=0.1, **options)
    for step in range(3):
        give_gradients(params, step)
        gradients, kept = [p.grad for p in params], [p.grad.clone() for p in params]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, gradients, strict=True))
        assert same([p.grad for p in params], kept)
    assert [p.data_ptr() for p in params] == places
    assert all(p.dtype == dtype and p.isfinite().all() for p in params)
    assert all(not torch.equal(p, before) for p, before in zip(params, start, strict=True))


def test_weights_descend_along_the_gradient(kind, options):
    params = parameters(torch.float64)
    optimizer = kind(params, lr=0.1, weight_decay=0.0, **options)
    start = values(params)
    give_gradients(params, 0)
    optimizer.step()
    assert all(((p - before) * p.grad).sum() < 0 for p, before in zip(params, start, strict=True))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (2, 0, 3), (0, 3, 2, 2)], ids=str)
def test_empty_parameters_are_stepped_over(kind, options, shape):
    empty, full = nn.Parameter(torch.empty(shape)), nn.Parameter(randn(3, 4))
    optimizer = kind([empty, full], lr=0.1, **options)
    before = full.detach().clone()
    empty.grad, full.grad = torch.empty(shape), randn(3, 4, seed=1)
    optimizer.step()
    assert not torch.equal(full, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_gradient_leaves_only_the_decay(kind, options, dtype):
    if refused(kind, options, dtype):
        return
    params = parameters(dtype)
    start = values(params)
    optimizer = kind(params, lr=0.5, weight_decay=0.25, **options)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, before in zip(params, start, strict=True):
        torch.testing.assert_close(p.detach(), before * (1 - 0.5 * 0.25))


def test_zero_learning_rate_leaves_the_weights(kind, options):
    params = parameters()
    start = values(params)
    optimizer = kind(params, lr=0.0, **options)
    give_gradients(params, 0)
    optimizer.step()
    assert same(values(params), start)


def test_a_parameter_without_gradient_is_left_alone_and_gets_no_state(kind, options):
    params = parameters()
    start = values(params)
    optimizer = kind(params, lr=0.1, **options)
    give_gradients(params, 0)
    params[0].grad = None
    optimizer.step()
    assert torch.equal(params[0], start[0]) and not optimizer.state[params[0]]
    optimizer.zero_grad()
    after = values(params)
    optimizer.step()
    assert same(values(params), after)


def test_layout_in_memory_does_not_matter(kind, options):
    base, conv = randn(6, 4, dtype=torch.float64), randn(6, 3, 2, 2, seed=1, dtype=torch.float64)
    plain = [nn.Parameter(base.clone()), nn.Parameter(conv.clone())]
    other = [
        nn.Parameter(base.T.contiguous().T),
        nn.Parameter(conv.to(memory_format=torch.channels_last)),
    ]
    for params in (plain, other):
        optimizer = kind(params, lr=0.1, **options)
        for step in range(3):
            give_gradients(params, step)
            if params is other:
                params[1].grad = params[1].grad.to(memory_format=torch.channels_last)
            optimizer.step()
    assert not other[0].is_contiguous() and other[1].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_experts_of_a_stack_are_updated_each_by_itself(kind, options):
    stack = nn.Parameter(randn(3, 5, 4, dtype=torch.float64))
    single = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    together, apart = kind([stack], lr=0.1, **options), kind(single, lr=0.1, **options)
    for step in range(3):
        # Very different scales: one polar factor over all experts would drown the small one.
        stack.grad = randn(3, 5, 4, seed=step, dtype=torch.float64) * torch.tensor([1.0, 1e-4, 100.0])[:, None, None]
        for p, g in zip(single, stack.grad, strict=True):
            p.grad = g.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in single]), rtol=1e-10, atol=1e-12)


def test_convolution_is_the_flattened_matrix(kind, options):
    conv = nn.Parameter(randn(6, 3, 2, 2, dtype=torch.float64))
    flat = nn.Parameter(conv.detach().flatten(1).clone())
    for p in (conv, flat):
        optimizer = kind([p], lr=0.1, **options)
        for step in range(3):
            p.grad = randn(6, 3, 2, 2, seed=step, dtype=torch.float64).reshape(p.shape)
            optimizer.step()
    torch.testing.assert_close(conv.detach().flatten(1), flat.detach(), rtol=1e-12, atol=1e-13)


def test_closure_is_called_once_with_gradients_on(kind, options):
    p = nn.Parameter(randn(4, 6))
    slope, optimizer, calls = randn(4, 6, seed=1), kind([p], lr=0.1, **options), []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p * slope).sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True] and not torch.equal(p, before)
    assert loss.item() == pytest.approx((before * slope).sum().item())


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_schedulers_of_torch_drive_it(kind, options, name):
    params = parameters(shapes=[(4, 6), (6, 4)])
    optimizer = kind(params, lr=0.1, **options)
    scheduler, seen = SCHEDULES[name](optimizer), []
    for step in range(6):
        group = optimizer.param_groups[0]
        seen.append((group["lr"], first_momentum(group)))
        before = values(params)
        give_gradients(params, step)
        optimizer.step()
        scheduler.step()
        if group["lr"] > 0:
            assert not same(values(params), before)
    assert len({lr for lr, _ in seen}) > 1
    if name in ("OneCycleLR", "CyclicLR"):
        assert len({momentum for _, momentum in seen}) > 1


def test_tensor_learning_rate_is_read_at_every_step(kind, options):
    one, two = parameters(torch.float64), parameters(torch.float64)
    rate = torch.tensor(0.1, dtype=torch.float64)
    tensor, number = kind(one, lr=rate, **options), kind(two, lr=0.1, **options)
    for step in range(3):
        rate.fill_(0.1 / (step + 1))
        number.param_groups[0]["lr"] = 0.1 / (step + 1)
        for params, optimizer in ((one, tensor), (two, number)):
            give_gradients(params, step)
            optimizer.step()
    assert same(values(one), values(two))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("through_file", [False, True], ids=["memory", "file"])
def test_resume_is_exact_to_the_bit(kind, options, dtype, through_file):
    if refused(kind, options, dtype):
        return
    straight = parameters(dtype)
    first = kind(straight, lr=0.1, **options)
    for step in range(2):
        give_gradients(straight, step)
        first.step()
    state = copy.deepcopy(first.state_dict())
    if through_file:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    resumed = [nn.Parameter(p.detach().clone()) for p in straight]
    second = kind(resumed, lr=0.7, **options)  # the options of the state win
    second.load_state_dict(state)
    for step in range(2, 5):
        for params, optimizer in ((straight, first), (resumed, second)):
            give_gradients(params, step)
            optimizer.step()
    assert same(values(straight), values(resumed))


def test_deep_copy_goes_on_by_itself(kind, options):
    params = parameters()
    optimizer = kind(params, lr=0.1, **options)
    give_gradients(params, 0)
    optimizer.step()
    twins, twin = copy.deepcopy((params, optimizer))
    after = values(params)
    give_gradients(twins, 1)
    twin.step()
    assert same(values(params), after)
    give_gradients(params, 1)
    optimizer.step()
    assert same(values(params), values(twins))


def test_group_options_override_the_defaults(kind, options):
    slow, fast = (nn.Parameter(randn(4, 6, dtype=torch.float64)) for _ in range(2))
    start = slow.detach().clone()
    # So small that a step is proportional to the learning rate even where it turns.
    groups = [{"params": [slow]}, {"params": [fast], "lr": 5e-6}]
    optimizer = kind(groups, lr=1e-6, weight_decay=0.0, **options)
    for p in (slow, fast):
        p.grad = randn(4, 6, seed=9, dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close((fast - start).detach(), 5 * (slow - start).detach(), rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize(
    ("group", "error"),
    [
        ({"params": [torch.zeros(3)]}, ParameterError),
        ({"params": [torch.zeros(3, 4), torch.tensor(1.0)]}, ParameterError),
        ({"params": [torch.zeros(3, 4)], "lr": -1.0}, OptionError),
        ({"params": [torch.zeros(3, 4)], "momentum": 1.0}, OptionError),
    ],
    ids=["vector", "scalar", "lr", "momentum"],
)
def test_a_refused_group_leaves_the_optimizer_as_it_was(kind, options, group, error):
    params = parameters()
    optimizer = kind(params, lr=0.1, **options)
    before = copy.deepcopy(optimizer.state_dict())
    group = {**group, "params": [nn.Parameter(p) for p in group["params"]]}
    with pytest.raises(error):
        optimizer.add_param_group(group)
    assert optimizer.state_dict() == before
    give_gradients(params, 0)
    optimizer.step()


def test_added_group_is_stepped(kind, options):
    params = parameters()
    optimizer = kind(params[:2], lr=0.1, **options)
    optimizer.add_param_group({"params": params[2:], "lr": 0.2})
    start = values(params)
    give_gradients(params, 0)
    optimizer.step()
    assert all(not torch.equal(p, before) for p, before in zip(params, start, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_that_is_not_finite_stops_before_anything_moves(kind, options, bad, dtype):
    if refused(kind, options, dtype):
        return
    params = parameters(dtype)
    optimizer = kind([(f"layer{i}.weight", p) for i, p in enumerate(params)], lr=0.1, **options)
    give_gradients(params, 0)
    optimizer.step()
    start, state = values(params), copy.deepcopy(optimizer.state_dict())
    give_gradients(params, 1)
    params[-1].grad.view(-1)[-1] = bad  # the last one: everything before it would have moved
    with pytest.raises(NonFiniteError, match=f"'layer{len(params) - 1}.weight'"):
        optimizer.step()
    assert same(values(params), start)
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"] and after["state"].keys() == state["state"].keys()
    for index, entries in state["state"].items():
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(after["state"][index][key]), torch.as_tensor(value))


def test_names_in_messages_are_those_of_the_whole_optimizer(kind, options):
    params = parameters(shapes=[(3, 4), (4, 3), (2, 2)])
    optimizer = kind([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, **options)
    give_gradients(params, 0)
    params[2].grad[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="'parameter 2'"):
        optimizer.step()


def test_sparse_gradients_are_refused(kind, options):
    p = nn.Parameter(randn(4, 6))
    optimizer = kind([p], lr=0.1, **options)
    p.grad = torch.eye(4, 6).to_sparse()
    with pytest.raises(ParameterError, match="sparse"):
        optimizer.step()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -0.1},
        {"lr": float("nan")},
        {"lr": torch.tensor([0.1, 0.2])},
        {"weight_decay": -1.0},
        {"momentum": -0.1},
        {"momentum": 1.0},
        {"eps": 0.0},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(kind, options, bad):
    with pytest.raises(OptionError, match=next(iter(bad))):
        kind(parameters(), **{"lr": 0.1, **options, **bad})


def test_nothing_draws_from_the_global_generator(kind, options):
    state = torch.get_rng_state()
    params = parameters()
    optimizer = kind(params, lr=0.1, **options)
    give_gradients(params, 0)
    optimizer.step()
    assert torch.equal(state, torch.get_rng_state())


def test_a_compiled_model_trains_alike(kind, options):
    def train(wrap) -> list[Tensor]:
        model = nn.Sequential(*(nn.utils.skip_init(nn.Linear, 6, 6, bias=False) for _ in range(2))).double()
        for i, p in enumerate(model.parameters()):
            p.data.copy_(randn(6, 6, seed=i))
        optimizer, forward = kind(list(model.parameters()), lr=0.1, **options), wrap(model)
        for step in range(3):
            optimizer.zero_grad()
            forward(randn(5, 6, seed=step, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        return values(list(model.parameters()))

    # "eager" traces and guards like any backend and needs no C++ compiler.
    compiled = train(lambda model: torch.compile(model, backend="eager"))
    for a, b in zip(train(lambda model: model), compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_matrices_moved_side_by_side_end_where_they_end_one_by_one(monkeypatch, kind, options):
    """To the last bit: each goes through the same operations on one core."""
    monkeypatch.setattr(base, "_WORTH", 0.0)
    for name in ("_CHUNK", "_CHUNK_OF_CORE", "_CHUNK_LEAST"):
        monkeypatch.setattr(_pieces, name, 1)
    products = {"dtype" if kind in REAL_ONLY else "ns_dtype": torch.float32}
    before, found = torch.get_num_threads(), []
    seats: set[int] = set()
    share = base.share_out
    monkeypatch.setattr(
        base,
        "share_out",
        lambda work, *args: share(lambda item: (seats.add(seat()), work(item)), *args),
    )
    for threads in (1, 2):
        torch.set_num_threads(threads)
        params = parameters(shapes=SHAPES * 3)
        optimizer = kind(params, lr=0.1, **options, **products)
        for step in range(3):
            give_gradients(params, step)
            optimizer.step()
        found.append(values(params))
    torch.set_num_threads(before)
    assert seats == {1, 2}  # the second time really went through the threads
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
