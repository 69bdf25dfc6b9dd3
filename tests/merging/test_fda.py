"""Merging with anchors: the closed form for a matrix, adaptation of a block, and whole networks."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import nn

from orthokit.errors import CheckpointError, DtypeError, NonFiniteError, OptionError, ShapeError, UnknownNameError
from orthokit.lab import SmallViT, TinyGPT
from orthokit.lab.encoder import EncoderConfig, SentenceEncoder
from orthokit.merging import _anchor_search
from orthokit.merging.adaptation import adapt_block
from orthokit.merging.anchor_analysis import anchor_spectra, projection_energy, subspace_overlap, update_projection
from orthokit.merging.anchors import induced_update
from orthokit.merging.dual_anchors import fda, merge_with_anchors
from orthokit.merging.landscape import loss_plane


def randoms(count, *shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(count)]


def drifted(module, *, seed=1, by=0.05):
    twin, g = copy.deepcopy(module), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(by * torch.randn(p.shape, generator=g).to(p))
    return twin


def vit(seed=0, layers=2):
    return SmallViT(classes=3, dim=8, layers=layers, heads=2, hidden=12, seed=seed).eval()


def reference(base, experts, *, count, pull, weights, start):
    """Least squares row by row, with numpy: anchors beside each other, the pull as further inputs."""
    rows, targets = [], []
    mean = sum(weights) / len(weights)
    for expert, weight in zip(experts, weights, strict=True):
        V = np.linalg.svd((expert - base).numpy())[2][:count]
        rows.append(np.sqrt(weight / mean) * V)
        targets.append(np.sqrt(weight / mean) * V @ (expert - start).numpy().T)
    rows.append(np.sqrt(pull) * np.eye(base.shape[1]))
    targets.append(np.zeros((base.shape[1], base.shape[0])))
    change = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)[0].T
    return start + torch.from_numpy(change)


# --- one matrix ----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    shape=st.sampled_from([(5, 5), (3, 7), (7, 3)]),
    experts=st.integers(1, 3),
    count=st.integers(1, 3),
    pull=st.sampled_from([0.0, 0.1, 2.0]),
    begun=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_the_closed_form_is_least_squares(shape, experts, count, pull, begun, seed):
    base, start, *others = randoms(experts + 2, *shape, seed=seed)
    weights = [1.0 + i for i in range(experts)]
    found = fda(base, others, weights=weights, count=count, pull=pull, start=start if begun else None)
    want = reference(base, others, count=count, pull=pull, weights=weights, start=start if begun else base)
    # Nearly dependent anchors without pull: errors of both grow with the change they ask for.
    assert torch.allclose(found, want, atol=1e-8 * (1 + float((want - base).norm()) ** 2))


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_one_expert_is_met_exactly_on_its_anchors_and_elsewhere_nothing_changes(seed, count):
    base, expert = randoms(2, 4, 6, seed=seed)
    V = torch.linalg.svd(expert - base).Vh
    found = fda(base, [expert], count=count, pull=0)
    assert torch.allclose(found @ V[:count].T, expert @ V[:count].T, atol=1e-9)
    assert torch.allclose(found @ V[count:].T, base @ V[count:].T, atol=1e-9)


def test_experts_on_different_inputs_are_kept_whole_and_on_the_same_are_averaged():
    base, A, B = randoms(3, 4, 6)
    left, right = torch.zeros(4, 6).double(), torch.zeros(4, 6).double()
    left[:, :3], right[:, 3:] = A[:, :3], B[:, 3:]
    assert torch.allclose(fda(base, [base + left, base + right], count=3, pull=0), base + left + right)
    square, C, D = randoms(3, 5, 5)
    assert torch.allclose(fda(square, [C, D], count=5, pull=0), (C + D) / 2)
    assert torch.allclose(fda(square, [C, D], count=5, pull=0.5), square + (C + D - 2 * square) / 2.5)


def test_only_ratios_of_weights_count_and_scale_goes_along_the_change():
    base, A, B = randoms(3, 5, 6)
    one = fda(base, [A, B], weights=[1, 3])
    assert torch.allclose(one, fda(base, [A, B], weights=[10, 30]))
    assert torch.allclose(fda(base, [A, B], weights=[1, 3], scale=0.5), base + (one - base) / 2)
    assert torch.equal(fda(base, [A], count=2), fda(base, [A], weights=[7], count=2))


def test_a_pull_keeps_nearly_equal_directions_from_blowing_up():
    base = torch.zeros(2, 2, dtype=torch.float64)
    u, tilt = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[1.0, 1e-4]]).double()
    A, B = torch.tensor([[1.0], [0.0]]).double() @ u, torch.tensor([[0.0], [1.0]]).double() @ tilt
    assert float(fda(base, [A, B], count=1, pull=0).norm()) > 1e3
    assert float(fda(base, [A, B], count=1).norm()) < 1.5


def test_vectors_scalars_and_empty_tensors_get_the_weighted_mean_of_changes():
    base, a, b = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0]), torch.tensor([1.0, 4.0])
    assert torch.allclose(fda(base, [a, b], weights=[1, 3]), torch.tensor([1.5, 3.0]))
    assert fda(torch.tensor(1.0), [torch.tensor(3.0)]).item() == 3
    assert fda(torch.zeros(0, 3), [torch.zeros(0, 3)]).shape == (0, 3)


def test_batches_strides_half_precision_and_unchanged_or_deficient_experts():
    base, A, B = randoms(3, 3, 4, 5)
    batched = fda(base, [A, B], count=2)
    assert torch.allclose(batched[1], fda(base[1], [A[1], B[1]], count=2))
    strided = fda(base[0].T.contiguous().T, [A[0].T.contiguous().T, B[0]], count=2)
    assert torch.allclose(strided, batched[0])
    half = fda(base[0].bfloat16(), [A[0].bfloat16(), B[0].bfloat16()], count=2)
    assert half.dtype == torch.bfloat16
    assert float((half.double() - batched[0]).norm() / batched[0].norm()) < 0.02  # three roundings of 2^-9
    assert torch.equal(fda(base[0], [base[0], base[0]]), base[0])
    low = base[0] + torch.ones(4, 1).double() @ torch.ones(1, 5).double()
    # One direction changed: further anchors would be arbitrary, and do not exist.
    assert torch.allclose(fda(base[0], [low, base[0]], count=3, pull=0), low)
    keep = A[0].clone()
    fda(base[0], [A[0], B[0]], start=B[0])
    assert torch.equal(A[0], keep)


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (OptionError, {"count": 0}),
        (OptionError, {"count": 4}),
        (OptionError, {"pull": -1.0}),
        (OptionError, {"weights": [1.0]}),
        (OptionError, {"weights": [-1.0, 2.0]}),
        (ShapeError, {"start": torch.zeros(2, 2)}),
        (NonFiniteError, {"start": torch.full((3, 4), float("nan"))}),
    ],
)
def test_bad_options_of_a_matrix_are_refused(unchecked, error, options):
    with pytest.raises(error):
        fda(torch.zeros(3, 4), [torch.ones(3, 4), torch.ones(3, 4)], **options)


def test_bad_experts_of_a_matrix_are_refused(unchecked):
    base = torch.zeros(3, 4)
    with pytest.raises(OptionError, match="empty"):
        fda(base, [])
    with pytest.raises(ShapeError, match="expert 1"):
        fda(base, [base, torch.zeros(4, 3)])
    with pytest.raises(NonFiniteError, match="expert 0"):
        fda(base, [torch.full((3, 4), float("nan")), base])
    with pytest.raises(DtypeError):
        fda(base, [torch.zeros(3, 4, dtype=torch.long)])


# --- one block -----------------------------------------------------------------------------------------------------


def linear(seed, out=4, width=5):
    layer = nn.Linear(width, out, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(randoms(1, out, width, seed=seed)[0])
    return layer


@pytest.mark.parametrize("distance", ["l2", "cosine", "l1"])
def test_a_small_first_step_goes_along_the_task_vector(distance):
    old = vit(layers=1).blocks[0].double()
    new = drifted(old)
    X = randoms(1, 6, 4, 8)[0]
    made = adapt_block(old, [new], [X], distance=distance, lr=1e-6, epochs=1)
    own, expert = dict(old.named_parameters()), dict(new.named_parameters())
    moved = {name: made.parameters[name] - p.detach() for name, p in own.items()}
    along = sum(float((moved[name] * (expert[name] - p).detach()).sum()) for name, p in own.items())
    assert along > 0
    # Adam's first step has the sign of the descent direction, entry by entry.
    step = induced_update(old, new, X, distance=distance)["mlp.up.weight"]
    clear = step.abs() > 1e-6 * step.abs().max()
    assert torch.equal(moved["mlp.up.weight"].sign()[clear], step.sign()[clear])


def test_one_task_with_enough_anchors_is_learnt_on_their_span_and_nowhere_else():
    old = linear(0)
    new = drifted(old, by=0.3)
    X = torch.linalg.qr(randoms(1, 5, 3, seed=2)[0]).Q.T[:, None].contiguous()
    made = adapt_block(old, [new], [X], distance="l2", lr=0.1, epochs=150)
    inside = torch.linalg.pinv(X[:, 0]) @ X[:, 0]
    W = made.parameters["weight"]
    assert torch.allclose(W @ inside, (new.weight @ inside).detach(), atol=1e-3)
    full = adapt_block(old, [new], [torch.eye(5).double()[:, None]], distance="l2", lr=0.1, epochs=150)
    assert torch.allclose(full.parameters["weight"], new.weight.detach(), atol=1e-3)
    assert made.after[0] < 1e-5 * made.before[0]
    assert float(made.losses[0]) == pytest.approx(made.before[0]) and float(made.losses[-1]) < 1e-5


def test_coefficients_start_as_task_arithmetic_or_as_the_merged_model_and_improve():
    old, a, b = linear(0), linear(1), linear(2)
    X = [x[:, None] for x in randoms(2, 4, 5, seed=3)]
    begin = adapt_block(old, [a, b], X, start="task_arithmetic", scale=0.3, epochs=0)
    want = old.weight + 0.3 * (a.weight + b.weight - 2 * old.weight)
    assert torch.allclose(begin.parameters["weight"], want.detach())
    merged = {"weight": ((a.weight + b.weight) / 2).detach()}
    assert torch.allclose(adapt_block(old, [a, b], X, start=merged, epochs=0).parameters["weight"], merged["weight"])
    for start in ("task_arithmetic", merged):
        made = adapt_block(old, [a, b], X, start=start, distance="l2", lr=0.05, epochs=40, batch=3, keep=[0, 40])
        assert float(made.losses[-1]) < 0.8 * float(made.losses[0])
        assert made.kept.keys() == {0, 40} and torch.equal(made.kept[40]["weight"], made.parameters["weight"])


def test_weights_decide_whom_the_block_follows_and_experts_without_anchors_have_no_say():
    old = linear(0)
    a, b = drifted(old, seed=1, by=0.3), drifted(old, seed=2, by=0.3)
    X = torch.eye(5).double()[:, None]
    options = {"distance": "l2", "lr": 0.1, "epochs": 150}
    W = adapt_block(old, [a, b], [X, X], weights=[3, 1], **options).parameters["weight"]
    assert torch.allclose(W, (0.75 * a.weight + 0.25 * b.weight).detach(), atol=1e-3)
    W = adapt_block(old, [a, b], [None, X], **options).parameters["weight"]
    assert torch.allclose(W, b.weight.detach(), atol=1e-3)
    # Experts count equally, whatever the number of their anchors.
    W = adapt_block(old, [a, b], [X, X.repeat(3, 1, 1)], **options).parameters["weight"]
    assert torch.allclose(W, ((a.weight + b.weight) / 2).detach(), atol=1e-3)


def test_bad_input_of_an_adaptation_is_refused(unchecked):
    old, new, X = linear(0), linear(1), torch.ones(2, 1, 5)
    for error, options in (
        (UnknownNameError, {"start": "merged"}),
        (UnknownNameError, {"distance": "kl"}),
        (OptionError, {"epochs": -1}),
        (OptionError, {"batch": 0}),
        (OptionError, {"lr": 0.0}),
        (OptionError, {"weights": [-1.0]}),
        (ShapeError, {"start": {"weight": torch.zeros(2, 2)}}),
        (ShapeError, {"start": {}}),
        (OptionError, {"start": {"weight": old.weight.detach()}}),
    ):
        with pytest.raises(error):
            adapt_block(old, [new], [X], **options)
    with pytest.raises(OptionError, match="experts"):
        adapt_block(old, [], [])
    with pytest.raises(OptionError, match="anchors"):
        adapt_block(old, [new], [None])


# --- networks ------------------------------------------------------------------------------------------------------

SIZES = {"tokens": 4, "construct": {"steps": 8, "count": 6}, "adapt": {"lr": 3e-3, "epochs": 8, "keep": [0, 4]}}


def gpt_call(model):
    return lambda block, x: block(x, model.cos[: x.shape[1]], model.sin[: x.shape[1]])


def networks():
    gpt = TinyGPT("0.2M", dim=8, heads=2, hidden=12, layers=2)
    shape = EncoderConfig(vocabulary=20, dim=8, layers=2, heads=2, hidden=12, positions=6)
    bert = drifted(SentenceEncoder(shape), by=0.2, seed=9)
    yield vit(), "blocks.*", None
    yield gpt, "blocks.*", gpt_call(gpt)
    yield bert, "encoder.layer.*", lambda block, x: block(x, None)


def test_all_three_kinds_of_network_are_merged_and_agree_better_with_their_experts():
    for base, blocks, call in networks():
        experts = [drifted(base, seed=s) for s in (1, 2)]
        before = {name: t.clone() for name, t in base.state_dict().items()}
        state, report = merge_with_anchors(base, experts, blocks=blocks, call=call, **SIZES)
        assert state.keys() == before.keys()
        assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items())
        copy.deepcopy(base).load_state_dict(state)
        sums = {k: sum(row[k] for row in report.rows) for k in ("loss_before", "loss_after")}
        assert len(report.rows) == 4 and sums["loss_after"] < sums["loss_before"]
        assert all(row["cosine"] > row["cosine_before"] and row["moved"] > 0 for row in report.rows)
        assert report.trajectory.keys() == {0, 4}
        name = next(name for name, _ in base.named_parameters())  # before the blocks: outside
        want = sum(e.state_dict()[name] for e in experts) / 2
        assert torch.allclose(state[name], want, atol=1e-6)
        inside = next(name for name in state if name.startswith(report.rows[0]["block"]))
        assert torch.equal(report.trajectory[0][inside], before[inside])


def test_a_merge_that_was_killed_ends_bit_for_bit_as_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(_anchor_search, "_EVERY", 3)
    base = vit()
    experts = [drifted(base, seed=s) for s in (1, 2)]
    whole, plain = merge_with_anchors(base, experts, blocks="blocks.*", **SIZES)
    seen = []

    def note(done, values):
        seen.append(done)
        assert values["of"] == 2 * (2 * 9 + 8)
        if len(seen) in (15, 33):
            raise KeyboardInterrupt

    result = None
    for _ in range(3):
        try:
            result = merge_with_anchors(base, experts, blocks="blocks.*", **SIZES, progress=note, resume=tmp_path)
        except KeyboardInterrupt:
            continue
    assert result is not None
    state, report = result
    assert all(torch.equal(t, state[name]) for name, t in whole.items())
    assert report.rows == plain.rows and max(seen) == 2 * (2 * 9 + 8) - 1
    assert all(torch.equal(t, report.trajectory[4][n]) for n, t in plain.trajectory[4].items())
    count = len(seen)
    again, _ = merge_with_anchors(base, experts, blocks="blocks.*", **SIZES, progress=note, resume=tmp_path)
    assert len(seen) == count and all(torch.equal(t, again[name]) for name, t in whole.items())
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".safetensors"] * 6
    with pytest.raises(CheckpointError, match="other weights"):
        merge_with_anchors(base, experts[::-1], blocks="blocks.*", **SIZES, resume=tmp_path)
    other = {**SIZES, "adapt": {"epochs": 3}}
    with pytest.raises(CheckpointError, match="other options"):
        merge_with_anchors(base, experts, blocks="blocks.*", **other, resume=tmp_path)


def test_starts_from_merged_models_take_their_tensors_outside_blocks():
    base = vit(layers=1)
    experts = [drifted(base, seed=s) for s in (1, 2)]
    merged = {n: (experts[0].state_dict()[n] + experts[1].state_dict()[n]) / 2 for n in base.state_dict()}
    short = {**SIZES, "adapt": {"epochs": 0}}
    state, report = merge_with_anchors(base, experts, blocks="blocks.*", start=merged, **short)
    assert report.outside == "start"
    assert all(torch.allclose(state[n], t, atol=1e-6) for n, t in merged.items())
    state, report = merge_with_anchors(base, experts, blocks="blocks.*", start="task_arithmetic", scale=0.4, **short)
    assert report.outside == "task_arithmetic"
    for name, t in base.state_dict().items():
        want = t + 0.4 * sum(e.state_dict()[name] - t for e in experts)
        assert torch.allclose(state[name], want, atol=1e-6)
    state, _ = merge_with_anchors(base, experts, blocks="blocks.*", outside="base", **short)
    assert torch.equal(state["head.weight"], base.head.weight)


def test_heads_that_differ_can_be_left_to_the_base_and_half_precision_comes_back():
    base = vit(layers=1).bfloat16()
    experts = [drifted(base, seed=s) for s in (1, 2)]
    experts[1].head = nn.Linear(8, 7).bfloat16()
    options = {**SIZES, "blocks": "blocks.*"}
    with pytest.raises(ShapeError, match=r"head\.weight.*untouched="):
        merge_with_anchors(base, experts, **options)
    state, _ = merge_with_anchors(base, experts, untouched=["head.*"], **options)
    assert torch.equal(state["head.weight"], base.head.weight)
    assert all(t.dtype == torch.bfloat16 for t in state.values())


def test_an_unchanged_block_has_no_anchors_and_is_left_alone():
    base = vit()
    one, two = drifted(base, seed=1), drifted(base, seed=2)
    for expert in (one, two):
        expert.blocks[0].load_state_dict(base.blocks[0].state_dict())
    two.blocks[1].load_state_dict(base.blocks[1].state_dict())
    state, report = merge_with_anchors(base, [one, two], blocks="blocks.*", **SIZES)
    assert report.anchors["blocks.0"] == (None, None) and report.rows[0]["cosine"] is None
    assert report.rows[0]["moved"] == 0 and report.rows[2]["moved"] > 0
    assert report.anchors["blocks.1"][1] is None and report.rows[3]["loss_after"] is None
    assert all(torch.equal(state[n], t) for n, t in base.state_dict().items() if n.startswith("blocks.0."))


def test_the_report_is_a_table_and_a_file(tmp_path):
    base = vit(layers=1)
    _, report = merge_with_anchors(base, [drifted(base)], blocks="blocks.*", **SIZES)
    frame = report.to_frame()
    assert list(frame["block"]) == ["blocks.0"] and "mean cosine" in repr(report)
    saved = json.loads(report.to_json(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == saved
    assert saved["rows"] == report.rows and "attn.k.bias" in saved["left_out"]["blocks.0"]


def test_models_that_cannot_be_merged_are_refused_before_any_work(unchecked):
    base = vit(layers=1)
    expert = drifted(base)
    options = {**SIZES, "blocks": "blocks.*"}

    def never(done, values):
        raise AssertionError("work was begun")

    bad = drifted(base)
    bad.blocks[0].mlp.up.weight.data[0, 0] = float("nan")
    outside = drifted(base)
    outside.positions.data[0, 0] = float("inf")
    for error, match, experts, more in (
        (OptionError, "empty", [], {}),
        (ShapeError, "expert 0", [nn.Linear(2, 2)], {}),
        (ShapeError, "expert 1", [expert, SmallViT(classes=3, dim=16, layers=1, heads=2, hidden=12)], {}),
        (NonFiniteError, "expert 0", [bad], {}),
        (NonFiniteError, "positions", [outside], {}),
        (UnknownNameError, "layers", [expert], {"blocks": "layers.*"}),
        (UnknownNameError, "rank", [expert], {"construct": {"rank": 2}}),
        (UnknownNameError, "momentum", [expert], {"adapt": {"momentum": 2}}),
        (UnknownNameError, "outside blocks", [expert], {"outside": "ties"}),
        (OptionError, "state dict", [expert], {"outside": "start"}),
        (OptionError, "weights", [expert], {"weights": [-1.0]}),
        (ShapeError, "start has no", [expert], {"start": {"head.bias": torch.zeros(3)}}),
    ):
        with pytest.raises(error, match=match):
            merge_with_anchors(base, experts, **{**options, **more}, progress=never)


# --- what anchors are like -----------------------------------------------------------------------------------------


def test_spectra_and_overlaps_of_known_matrices():
    X = torch.diag(torch.tensor([5.0, 4.0, 1.0, 0.5])).double()
    assert torch.allclose(anchor_spectra(X[None]), torch.tensor([1.0, 0.8, 0.2, 0.1]).double())
    assert subspace_overlap(X, X, rank=2) == pytest.approx(1)
    assert subspace_overlap(X, X.flip(1), rank=2) == pytest.approx(0)
    assert subspace_overlap(X[:, None], X, share=0.5) == pytest.approx(1)
    c = 0.6
    Y = torch.tensor([[c, (1 - c * c) ** 0.5, 0, 0]]).double()
    assert subspace_overlap(X, Y, rank=1) == pytest.approx(c * c)
    for bad in (lambda: subspace_overlap(X, Y, rank=2), lambda: subspace_overlap(X, X, share=0.0)):
        with pytest.raises(OptionError):
            bad()
    with pytest.raises(OptionError, match="zero"):
        anchor_spectra(torch.zeros(2, 2))


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 6), st.booleans())
def test_projection_energy_is_that_of_scipy_and_the_cone_lies_in_the_span(seed, m, twice):
    (u,), (D,) = randoms(1, 5, seed=seed), randoms(1, m, 5, seed=seed + 1)
    D = torch.cat([D, D[:1] * 3]) if twice else D
    size = float(u.norm())
    rest = nnls(D.T.numpy(), u.numpy())[1]
    cone, span = projection_energy(u, D), projection_energy(u, D, onto="span")
    assert cone == pytest.approx(1 - (rest / size) ** 2, abs=1e-9)
    fitted = D.T @ torch.linalg.pinv(D.T) @ u
    assert span == pytest.approx(float(fitted.norm() / size) ** 2, abs=1e-9)
    assert -1e-12 <= cone <= span + 1e-9
    assert projection_energy(-D.sum(0), D) <= projection_energy(D.sum(0), D) == pytest.approx(1, abs=1e-9)


def test_real_inputs_reach_the_update_of_anchors_that_are_among_them():
    old = vit(layers=1).blocks[0].double()
    new = drifted(old)
    H = randoms(1, 6, 4, 8)[0]
    assert update_projection(old, new, H[:2], H) == pytest.approx(1, abs=1e-9)
    other = randoms(1, 2, 4, 8, seed=5)[0]
    cone, span = (update_projection(old, new, other, H, onto=onto) for onto in ("cone", "span"))
    assert 0 < cone <= span < 1
    assert projection_energy(torch.ones(3), torch.zeros(2, 3)) == 0
    with pytest.raises(OptionError, match="zero"):
        projection_energy(torch.zeros(3), torch.ones(2, 3))


def test_a_plane_shows_a_quadratic_loss_as_it_is():
    model = nn.Linear(3, 1, bias=False).double()
    a, b, c = ({"weight": t} for t in randoms(3, 1, 3))
    path = [{"weight": a["weight"] + s * (b["weight"] - a["weight"])} for s in (0.0, 0.5, 1.0)]
    off = {"weight": a["weight"] + torch.linalg.cross(b["weight"] - a["weight"], c["weight"] - a["weight"])}

    def loss(m):
        return float(m.weight.square().sum())

    before = model.weight.clone()
    plane = loss_plane(model, {"base": a, "one": b, "two": c}, loss, grid=4, paths={"ta": path, "off": [a, off]})
    assert torch.equal(model.weight, before)
    x1 = plane.points["one"][0]
    assert x1 == pytest.approx(float((b["weight"] - a["weight"]).norm())) and plane.points["base"] == (0, 0)
    assert torch.allclose(plane.paths["ta"], torch.tensor([[0, 0], [x1 / 2, 0], [x1, 0]]).double(), atol=1e-9)
    assert torch.allclose(plane.paths["off"], torch.zeros(2, 2).double(), atol=1e-9)
    assert plane.off["off"][1] == pytest.approx(float((off["weight"] - a["weight"]).norm()))
    # |a + x u + y v|^2 has second derivatives of 2 along both axes and none across.
    hx = float(plane.x[1] - plane.x[0])
    second = (plane.losses[:, 2:] - 2 * plane.losses[:, 1:-1] + plane.losses[:, :-2]) / hx**2
    assert torch.allclose(second, torch.full_like(second, 2), atol=1e-6)
    with pytest.raises(OptionError, match="one line"):
        loss_plane(model, {"a": a, "b": b, "c": path[1]}, loss)
    with pytest.raises(OptionError, match="three"):
        loss_plane(model, {"a": a, "b": b}, loss)
    with pytest.raises(UnknownNameError):
        loss_plane(model, {k: {"bias": torch.ones(1)} for k in "abc"}, loss)


def test_anchors_of_an_earlier_merge_are_used_again_and_no_others_are_taken():
    base = vit()
    experts = [drifted(base, seed=s) for s in (1, 2)]
    sizes = {"blocks": "blocks.*", "tokens": 3, "adapt": {"epochs": 3, "lr": 1e-2}}
    first, report = merge_with_anchors(base, experts, **sizes, construct={"steps": 3, "count": 4})
    seen = []
    again, other = merge_with_anchors(
        base, experts, **sizes, anchors=report.anchors, progress=lambda done, values: seen.append((done, values["of"]))
    )
    assert all(torch.equal(first[name], again[name]) for name in first) and other.rows == report.rows
    assert {of for _, of in seen} == {2 * 3} and len(seen) == 2 * 3  # epochs of blocks alone
    with pytest.raises(OptionError, match="construct"):
        merge_with_anchors(base, experts, **sizes, anchors=report.anchors, construct={"steps": 3})
    with pytest.raises(OptionError, match=r"blocks\.1"):
        merge_with_anchors(base, experts, **sizes, anchors={"blocks.0": report.anchors["blocks.0"]})
