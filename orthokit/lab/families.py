"""Families of experts: one pretrained model fine-tuned to several tasks, to be merged and judged on all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orthokit.errors import OptionError, unknown_name
from orthokit.lab.family_tasks import FAMILIES, HEAD, PARTS, Family, FamilyTask, parted, with_part
from orthokit.lab.fisher import fisher_diagonal
from orthokit.lab.input_subspaces import layer_inputs
from orthokit.lab.racer import Racer

__all__ = [
    "Expert",
    "expert_model",
    "expert_scores",
    "expert_statistics",
    "family_base",
    "family_retention",
    "train_expert",
]


@dataclass(frozen=True)
class Expert:
    """A fine-tuned model in two parts, and what its training knows of it.

    Args:
        trunk: The tensors that all models of the family have.
        head: Those of its own head; empty for language models.
        second_moments: AdamW's, of the trunk, at the end of training.
        loss: Mean training loss over the last quarter, in nats.
    """

    trunk: dict[str, Tensor]
    head: dict[str, Tensor]
    second_moments: dict[str, Tensor]
    loss: float


def family_base(family: str, *, small: bool = False) -> dict[str, Tensor]:
    """The tensors of the pretrained model of a family, without a head.

    Args:
        family: A name in :data:`FAMILIES`.
        small: Of the smallest runs.

    Example:
        >>> "blocks.0.attn.q.weight" in family_base("pictures", small=True)
        True
    """
    first = next(iter(_named(family).tasks.values()))
    return parted(first.model(small))[0]


def train_expert(family: str, task: str, *, seed: int, steps: int | None = None, small: bool = False) -> Expert:
    """Fine-tune all weights of the pretrained model of a family to one of its tasks.

    AdamW with a cosine schedule; the head, fitted to the frozen trunk before, is trained along.

    Args:
        family: A name in :data:`FAMILIES`.
        task: One of its tasks.
        seed: Of the batches.
        steps: Length; default the task's.
        small: Fewer and shorter examples, for tests and the smallest notebooks.

    Returns:
        :class:`Expert`.

    Raises:
        UnknownNameError: No such family or task.

    Example:
        >>> expert = train_expert("pictures", "footwear", seed=0, steps=2, small=True)
        >>> sorted(expert.head), expert.loss > 0
        (['head.bias', 'head.weight'], True)
    """
    place = _task(family, task)
    model = place.model(small).train()
    rest = {name: p for name, p in model.named_parameters() if not name.startswith(HEAD)}
    head = [p for name, p in model.named_parameters() if name.startswith(HEAD)]
    groups: list[dict[str, Any]] = [{"params": list(rest.values()), "lr": place.lr}]
    groups += [{"params": head, "lr": 1e-3}] * bool(head)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    length = place.steps if steps is None else steps
    racer = Racer(model, place.task(seed, small), optimizer, steps=length)
    losses = [racer.advance() for _ in range(length)]
    trunk, own = parted(model)
    moments = {name: optimizer.state[p]["exp_avg_sq"] for name, p in rest.items()}
    last = losses[-max(1, length // 4) :]
    return Expert(trunk, own, moments, sum(last) / len(last))


def expert_model(
    family: str, task: str, expert: Expert, *, trunk: Mapping[str, Tensor] | None = None, small: bool = False
) -> nn.Module:
    """An expert as a module, in evaluation mode.

    Args:
        family: A name in :data:`FAMILIES`.
        task: One of its tasks, which says what the head is for.
        expert: Whose head it is.
        trunk: Default the expert's own.
        small: As in training.
    """
    model = _task(family, task).model(small)
    model.load_state_dict({**(expert.trunk if trunk is None else trunk), **expert.head})
    return model.eval()


def expert_scores(
    family: str,
    trunk: Mapping[str, Tensor],
    experts: Mapping[str, Expert],
    *,
    part: str = "test",
    small: bool = False,
) -> dict[str, float]:
    """How well one trunk does each task, with the heads of the experts.

    Args:
        family: A name in :data:`FAMILIES`.
        trunk: For example merged.
        experts: Task to expert, whose head is used.
        part: ``"test"`` (default) or ``"validation"``, which options are chosen by; the two share no example.
        small: As in training.

    Returns:
        Task to score, higher is better: accuracy in [0, 1], or minus bits per byte.

    Raises:
        UnknownNameError: No such family, task or part.
    """
    if part not in PARTS:
        raise unknown_name("part", part, PARTS)
    found = {}
    for name, expert in experts.items():
        place = _task(family, name)
        model = expert_model(family, name, expert, trunk=trunk, small=small)
        figures = with_part(place.task(0, small), part).evaluate(model)
        found[name] = 1 - figures["test_error"] if "test_error" in figures else -figures["validation_bits_per_byte"]
    return found


def family_retention(family: str, trunk: Mapping[str, Tensor], *, small: bool = False) -> float:
    """What a trunk still does of what the pretrained model could do; higher is better.

    Args:
        family: A name in :data:`FAMILIES`, which says what it is.
        trunk: For example merged.
        small: As in training.
    """
    place = _named(family)
    model = next(iter(place.tasks.values())).model(small)
    model.load_state_dict({**parted(model)[1], **trunk})
    with torch.no_grad():
        return place.general(model.eval(), small)


def expert_statistics(
    family: str, experts: Mapping[str, Expert], *, samples: int = 128, small: bool = False
) -> dict[str, list[dict[str, Tensor]]]:
    """What the methods that look at data need of each expert, by the keyword they take it under.

    Args:
        family: A name in :data:`FAMILIES`.
        experts: Task to expert.
        samples: Training examples, ``>= 1``; default 128.
        small: As in training.

    Returns:
        ``grams`` (second moments of the inputs of each linear layer), ``fishers`` and ``second_moments``: one mapping
        per expert, from parameter to tensor.
    """
    if samples < 1:
        raise OptionError(f"samples must be at least 1; got {samples}.")
    grams, fishers = [], []
    for name, expert in experts.items():
        place = _task(family, name)
        model, task = expert_model(family, name, expert, small=small), place.task(0, small)
        layers = {at: one for at, one in model.named_modules() if isinstance(one, nn.Linear)}
        seen = layer_inputs(model, task, layers, samples=samples)
        rows = {at: X[:, : layers[at].in_features].double() for at, X in seen.items()}
        grams.append({f"{at}.weight": X.mT @ X / len(X) for at, X in rows.items() if not at.startswith("head")})
        diagonal = fisher_diagonal(model, task, samples=samples)
        # Relative to its mean: the floor of the method is absolute.
        mean = sum(float(F.sum()) for F in diagonal.values()) / sum(F.numel() for F in diagonal.values())
        fishers.append({at: F / mean for at, F in diagonal.items() if not at.startswith(HEAD)})
    moments = [expert.second_moments for expert in experts.values()]
    return {"grams": grams, "fishers": fishers, "second_moments": moments}


def _named(family: str) -> Family:
    if family not in FAMILIES:
        raise unknown_name("family", family, tuple(FAMILIES))
    return FAMILIES[family]


def _task(family: str, task: str) -> FamilyTask:
    tasks = _named(family).tasks
    if task not in tasks:
        raise unknown_name(f"task of {family}", task, tuple(tasks))
    return tasks[task]
