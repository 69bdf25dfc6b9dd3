"""Anchors of real experts: searches stay below their bound, merges are those of the library, losses are recomputed."""

import pytest
import torch
from torch.nn import functional as F

from orthokit.errors import OptionError, UnknownNameError
from orthokit.figures import anchor_alignment
from orthokit.lab import FAMILIES, expert_scores
from orthokit.merging import merge, merge_with_anchors
from orthokit.studies.dual_anchors import (
    ANCHOR_BLOCKS,
    ANCHOR_TASKS,
    ANCHOR_TOKENS,
    adapted_to,
    anchor_curves,
    anchor_experts,
    anchor_inputs,
    anchor_landscape,
    anchor_scores,
    layer_searches,
    tuned_task_arithmetic,
)

FEW = {"blocks": ANCHOR_BLOCKS, "tokens": ANCHOR_TOKENS, "untouched": ["head.*"], "start": "task_arithmetic"}


@pytest.fixture(scope="module")
def setting():
    return anchor_experts(steps=3, small=True)


@pytest.fixture(scope="module")
def merged(setting):
    sizes = {"construct": {"count": 3, "steps": 2, "keep": [0, 2]}, "adapt": {"epochs": 2}}
    return merge_with_anchors(setting.base, setting.models, scale=0.5, **FEW, **sizes)


def test_models_have_the_trunks_of_the_experts_under_one_head(setting):
    for model, expert in zip(setting.models, setting.experts.values(), strict=True):
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in expert.trunk.items())
        assert torch.equal(model.head.weight, setting.base.head.weight) and not model.training


def test_one_task_has_nothing_to_be_merged_with():
    with pytest.raises(OptionError, match="two different tasks"):
        anchor_experts(["footwear", "footwear"])


def test_searches_stay_below_their_bound_and_come_near_it(setting):
    found = layer_searches(setting, "blocks.0.attn.v", counts=(2, 8), steps=120)
    for count, anchors in found.items():
        assert anchors.X.shape == (int(count.split()[0]), 1, 64)
        assert float(anchors.cosines.max()) <= anchors.bound + 1e-6
        assert anchors.cosine > max(0.97 * anchors.bound, float(anchors.cosines[0]))
    # The bias is no part of it: with it the bound would be a mean over two tensors.
    change = setting.models[0].blocks[0].attn.v.weight - setting.base.blocks[0].attn.v.weight
    s = torch.linalg.svdvals(change.detach()).square()
    assert found["2 inputs"].bound == pytest.approx(float((s[:2].sum() / s.sum()).sqrt()), rel=1e-5)


def test_curves_are_those_of_the_figure_with_bounds_for_single_layers_alone(setting, merged):
    single = layer_searches(setting, "blocks.0.attn.v", counts=(2,), steps=3)
    told = anchor_curves(single)
    assert told["bounds"] == {"2 inputs": single["2 inputs"].bound} and len(told["curves"]["2 inputs"][0]) == 4
    blocks = anchor_curves({"blocks.0": merged[1].anchors["blocks.0"], "same": (None, None)}, names=["a", "b"])
    assert list(blocks["curves"]) == ["blocks.0, a", "blocks.0, b"] and blocks["bounds"] == {}
    assert anchor_alignment(**blocks)["data"][1]["name"] == "blocks.0, b"


def test_a_search_needs_a_linear_layer(setting):
    with pytest.raises(UnknownNameError, match="linear layer"):
        layer_searches(setting, "blocks.0.norm1")


def test_inputs_are_what_the_block_of_the_pretrained_model_gets(setting):
    found = anchor_inputs(setting, task="footwear", block="blocks.1", count=4, skip=2)
    seen = []
    with setting.base.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        pictures = FAMILIES["pictures"].tasks["footwear"].task(0, True).train_images
        every = len(pictures) // 12
        with torch.no_grad():
            setting.base(pictures[::every][2:6])
    assert found.shape == (4, ANCHOR_TOKENS, 64) and torch.equal(found, seen[0])


@pytest.mark.parametrize(("task", "block", "kind"), [("hats", "blocks.0", "task"), ("footwear", "blocks.9", "block")])
def test_inputs_of_what_is_not_there_are_refused(setting, task, block, kind):
    with pytest.raises(UnknownNameError, match=kind):
        anchor_inputs(setting, task=task, block=block, count=2)


def test_adapting_again_is_the_merge_that_made_the_anchors(setting, merged):
    state, report = merged
    again = adapted_to(setting, report.anchors, epochs=2, scale=0.5)
    assert set(again) == set(setting.trunk)
    assert all(torch.equal(again[name], state[name]) for name in again)


def test_other_inputs_take_the_place_of_the_anchors(setting, merged):
    anchors = merged[1].anchors
    same = adapted_to(setting, anchors, inputs={b: [a.X for a in own] for b, own in anchors.items()}, epochs=2)
    other = adapted_to(setting, anchors, inputs={b: [a.kept[0] for a in own] for b, own in anchors.items()}, epochs=2)
    assert torch.equal(same["blocks.0.mlp.up.weight"], merged[0]["blocks.0.mlp.up.weight"])
    assert not torch.equal(other["blocks.0.mlp.up.weight"], merged[0]["blocks.0.mlp.up.weight"])


def test_without_epochs_the_start_is_what_comes_out(setting, merged):
    anchors, summed = merged[1].anchors, merge(setting.trunk, setting.trunks, method="task_arithmetic", scale=0.5)
    begun = {"task_arithmetic": summed, "tsv": merge(setting.trunk, setting.trunks, method="tsv")}
    for name, expected in begun.items():
        start = name if name == "task_arithmetic" else expected
        found = adapted_to(setting, anchors, start=start, epochs=0)
        # base + A * (merged - base) and the merge itself differ by rounding.
        assert all(torch.allclose(found[k], expected[k], atol=1e-6) for k in expected), name


def test_the_scale_of_task_arithmetic_is_the_best_on_the_validation_half(setting):
    scales = (0.1, 0.6, 3.0)
    best, trunk = tuned_task_arithmetic(setting, scales=scales)
    scores = {}
    for scale in scales:
        one = merge(setting.trunk, setting.trunks, method="task_arithmetic", scale=scale)
        scores[scale] = sum(expert_scores("pictures", one, setting.experts, part="validation", small=True).values())
        if scale == best:
            assert all(torch.equal(one[name], trunk[name]) for name in one)
    assert scores[best] == max(scores.values())


def test_scores_are_those_of_the_family_and_the_loss_is_of_the_same_pictures(setting):
    expert = setting.experts["footwear"]
    table = anchor_scores(setting, {"expert": setting.models[0].state_dict(), "base": setting.trunk})
    found = expert_scores("pictures", expert.trunk, setting.experts, small=True)
    assert table.loc["expert", list(ANCHOR_TASKS)].to_dict() == pytest.approx(found)
    assert table.loc["expert", "mean"] == pytest.approx(sum(found.values()) / 2)
    losses = []
    for name, one in setting.experts.items():
        task = FAMILIES["pictures"].tasks[name].task(0, True)
        with torch.no_grad():
            features = setting.models[0].features(task.test_images[1::2])
            scores = features @ one.head["head.weight"].T + one.head["head.bias"]
        losses.append(float(F.cross_entropy(scores, task.test_labels[1::2])))
    assert table.loc["expert", "loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_the_landscape_places_models_and_gives_paths_their_own_losses(setting):
    line = [merge(setting.trunk, setting.trunks, method="task_arithmetic", scale=s) for s in (0.0, 1.0)]
    found = anchor_landscape(setting, {"task arithmetic": line}, grid=2, pictures=8)
    assert list(found["points"]) == ["pretrained", *ANCHOR_TASKS] and found["points"]["pretrained"] == (0.0, 0.0)
    places, losses = found["paths"]["task arithmetic"]
    # The sum of both task vectors lies on the plane, at the sum of the places.
    total = torch.tensor([found["points"][task] for task in ANCHOR_TASKS]).sum(0).double()
    assert torch.allclose(places[1], total, rtol=1e-4) and float(found["off"]["task arithmetic"].max()) < 1e-4
    whole = anchor_landscape(setting, {"path": [setting.trunk]}, grid=2)["paths"]["path"][1]
    assert whole == pytest.approx([anchor_scores(setting, {"base": setting.trunk}).loc["base", "loss"]])
    assert losses[0] != losses[1] and found["losses"].shape == (2, 2)


def test_a_plane_goes_through_two_experts():
    three = anchor_experts(["footwear", "low digits", "high digits"], steps=1, small=True)
    with pytest.raises(OptionError, match="two experts; got 3"):
        anchor_landscape(three, {})
