"""Reading and writing blocks: true views, exact writes, every entry covered once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthokit.errors import DtypeError, ShapeError
from orthokit.matrices import MatrixTable, matrices

SIZES = st.integers(2, 5)


KINDS = ("linear", "conv", "grouped", "transposed", "stack", "conv1d", "fused", "heads", "out")
SPECS = st.tuples(st.sampled_from(KINDS), SIZES, SIZES, st.integers(1, 3), st.integers(1, 3), st.booleans())


def build(spec: tuple[str, int, int, int, int, bool]) -> tuple[MatrixTable, torch.Tensor]:
    """A one-parameter table under one of the rules, and the parameter."""
    kind, a, b, k, h, flag = spec
    if kind in ("conv", "grouped"):
        groups = h if kind == "grouped" else 1
        conv = torch.nn.Conv2d(b * groups, a * groups, (k, 2), groups=groups)
        return matrices(conv), conv.weight.detach()
    if kind == "transposed":
        up = torch.nn.ConvTranspose2d(a * h, b * h, (k, 2), groups=h)
        return matrices(up), up.weight.detach()
    if kind == "conv1d":
        name, width = "h.0.attn.c_attn.weight", a * h
        weights = {name: torch.randn(width, 3 * width), "h.0.attn.c_attn.bias": torch.zeros(3 * width)}
        return matrices(weights, split_fused=flag, split_heads=h if flag else None), weights[name]
    name, shape = {
        "linear": ("l.weight", (a, b)),
        "stack": ("experts.w", (h, a, b)),
        "fused": ("qkv.weight", (a + 2 * b, k + 1)),
        "heads": ("q_proj.weight", (h * a, b)),
        "out": ("o_proj.weight", (b, h * a)),
    }[kind]
    weight = torch.randn(shape)
    if kind == "fused":
        return matrices({name: weight}, split_fused={name: [a, b, b]}), weight
    return matrices({name: weight}, split_heads=h if kind in ("heads", "out") else None), weight


@given(SPECS, st.sampled_from([torch.float32, torch.bfloat16, torch.complex64]))
@settings(max_examples=80, deadline=None)
def test_blocks_are_views_and_cover_each_entry_once(spec, dtype):
    table, like = build(spec)
    tensor = torch.randn(like.shape).to(dtype)
    before, hits = tensor.clone(), torch.zeros(like.shape)
    for block in table:
        view = block.view(tensor)
        assert view.shape == block.shape
        assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        block.view(hits).add_(1)
        view.mul_(3)
    assert (hits == 1).all()
    assert torch.equal(tensor, before * 3)


@given(SPECS, st.booleans(), st.data())
@settings(max_examples=80, deadline=None)
def test_writing_twice_the_view_doubles_that_block_and_nothing_else(spec, contiguous, data):
    table, like = build(spec)
    # Reversed memory order: no rule that merges dimensions has a view of it, and write must not need one.
    dims = tuple(range(like.ndim - 1, -1, -1))
    tensor = torch.randn([like.shape[d] for d in dims]).permute(dims)
    if contiguous:
        tensor = tensor.contiguous()
    before = tensor.clone()
    block = data.draw(st.sampled_from(list(table)))
    mask = torch.zeros(like.shape)
    block.view(mask).fill_(1)
    block.write(tensor, block.read(tensor) * 2)
    assert torch.equal(tensor, before * (1 + mask))
    assert int(mask.sum()) == block.numel


def test_a_view_that_strides_forbid_is_refused_not_copied():
    conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    block = matrices(conv)[0]
    with pytest.raises(ShapeError, match=r"\.read\(tensor\).*\.write"):
        block.view(conv.weight)
    assert torch.equal(block.read(conv.weight), conv.weight.flatten(1))
    wanted = torch.randn(4, 27)
    block.write(conv.weight, wanted)
    assert torch.equal(conv.weight.flatten(1), wanted)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_matrix_of_a_transposed_convolution_is_its_linear_map():
    conv = torch.nn.ConvTranspose1d(3, 4, 5, bias=False).double()
    W = matrices(conv)[0].read(conv.weight.detach())
    x = torch.randn(3, 1, dtype=torch.float64)  # one position in: the output is exactly one kernel
    torch.testing.assert_close(conv(x[None])[0].flatten(), W @ x[:, 0])


def test_the_blocks_of_a_grouped_convolution_are_its_linear_maps():
    conv = torch.nn.Conv2d(4, 6, 3, groups=2, bias=False).double()
    blocks = matrices(conv)[0].read(conv.weight.detach())
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    patches = x.reshape(2, 18, 1)  # one output position: the patch is the whole image
    torch.testing.assert_close(conv(x).flatten(), (blocks @ patches).flatten())


def test_head_blocks_compose_to_the_projection():
    q, o = torch.randn(12, 8), torch.randn(8, 12)
    table = matrices({"attn.q_proj.weight": q, "attn.o_proj.weight": o}, split_heads=3)
    heads = table["attn.o_proj.weight"].view(o) @ table["attn.q_proj.weight"].view(q)
    assert heads.shape == (3, 8, 8)
    torch.testing.assert_close(heads.sum(0), o @ q)


def test_wrong_tensors_and_values_are_refused_and_change_nothing(unchecked):
    block = matrices({"a.weight": torch.randn(3, 4)})[0]
    weight = torch.randn(3, 4)
    before = weight.clone()
    with pytest.raises(ShapeError, match=r"\(3, 4\).*\(4, 3\)"):
        block.view(weight.T)
    with pytest.raises(ShapeError, match=r"\(3, 4\).*\(3, 1\)"):
        block.write(weight, torch.ones(3, 1))
    with pytest.raises(DtypeError, match="complex64"):
        block.write(weight, torch.ones(3, 4, dtype=torch.complex64))
    assert torch.equal(weight, before)


def test_writing_reaches_a_parameter_that_takes_gradients():
    layer = torch.nn.Linear(4, 3)
    block = matrices(layer)["weight"]
    block.write(layer.weight, torch.ones(3, 4))
    assert layer.weight.requires_grad and torch.equal(layer.weight, torch.ones(3, 4))
