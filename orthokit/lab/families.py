"""Families of experts: one pretrained model fine-tuned to several tasks, to be merged and judged on all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from orthokit.errors import OptionError, unknown_name
from orthokit.lab.arena import GROUNDS
from orthokit.lab.arena.ground import fitted_head
from orthokit.lab.arena.texts import ground_texts
from orthokit.lab.fisher import fisher_diagonal
from orthokit.lab.glosses import glosses
from orthokit.lab.image_tasks import SomeClasses, some_classes
from orthokit.lab.input_subspaces import layer_inputs
from orthokit.lab.pretrained import load_pretrained
from orthokit.lab.racer import Racer
from orthokit.lab.tasks import LanguageModelling, Task, language_modelling
from orthokit.lab.vision import load_small_vit

__all__ = [
    "FAMILIES",
    "Expert",
    "Family",
    "FamilyTask",
    "expert_model",
    "expert_scores",
    "expert_statistics",
    "family_base",
    "family_retention",
    "train_expert",
]

PARTS = ("validation", "test")
_HEAD = "head."
# Examples of a task that options are chosen by; all others of its half are not looked at.
_CHOSEN_BY = 384


@dataclass(frozen=True)
class FamilyTask:
    """What an expert is trained on.

    Args:
        model: ``model(small)``: the pretrained model with a head fitted to the task, the rest as it was.
        task: ``task(seed, small)``: data, loss and evaluation.
        lr: Learning rate of the trunk.
        steps: Length of the training.
    """

    model: Callable[[bool], nn.Module]
    task: Callable[[int, bool], Task]
    lr: float
    steps: int


@dataclass(frozen=True)
class Family:
    """A pretrained model and the tasks that experts of it are trained on.

    Args:
        label: What figures call it.
        tasks: By name; their models differ in the head alone.
        score: What tasks are scored by, higher is better, with its unit.
        retained: What the model could do before, likewise.
        general: ``general(model, small)``: that figure of a model of one of the tasks.
        blocks: The blocks that anchors are constructed for, as a pattern of names.
    """

    label: str
    tasks: Mapping[str, FamilyTask]
    score: str
    retained: str
    general: Callable[[nn.Module, bool], float]
    blocks: str


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
    return _parted(first.model(small))[0]


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
    rest = {name: p for name, p in model.named_parameters() if not name.startswith(_HEAD)}
    head = [p for name, p in model.named_parameters() if name.startswith(_HEAD)]
    groups: list[dict[str, Any]] = [{"params": list(rest.values()), "lr": place.lr}]
    groups += [{"params": head, "lr": 1e-3}] * bool(head)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    length = place.steps if steps is None else steps
    racer = Racer(model, place.task(seed, small), optimizer, steps=length)
    losses = [racer.advance() for _ in range(length)]
    trunk, own = _parted(model)
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
        part: ``"test"`` (default) or ``"validation"``, two halves of the held-out examples; of the second, at most 384.
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
        figures = _half(place.task(0, small), PARTS.index(part)).evaluate(model)
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
    model.load_state_dict({**_parted(model)[1], **trunk})
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
        fishers.append({at: F / mean for at, F in diagonal.items() if not at.startswith(_HEAD)})
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


def _parted(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    head = {name: state.pop(name) for name in list(state) if name.startswith(_HEAD)}
    return state, head


def _half(task: Task, which: int) -> Task:
    """The task with every second of its held-out examples; those to choose by evenly spaced, and not too many."""
    half = copy.copy(task)
    for name in ("test_images", "test_ids", "test_labels", "validation_starts"):
        if hasattr(half, name):
            kept = getattr(half, name)[which::2]
            every = -(-len(kept) // _CHOSEN_BY) if which == PARTS.index("validation") else 1
            setattr(half, name, kept[::every])
    return half


class _Definitions(LanguageModelling):
    """Next-byte prediction on the definitions of nouns, one a line."""

    def __init__(self, *, context: int, batch: int, seed: int, validation_windows: int) -> None:
        super().__init__("moby_dick", context=context, batch=batch, seed=seed, validation_windows=1)
        self.name = "definitions"
        self.train, self.validation = _lines("train"), _lines("test")
        last = len(self.validation) - context - 1
        self.validation_starts = torch.linspace(0, last, validation_windows).long()


@lru_cache(maxsize=2)
def _lines(split: str) -> Tensor:
    text = "\n".join(definition for definition, _ in getattr(glosses("noun"), split))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _language(which: str, seed: int, small: bool) -> LanguageModelling:
    sizes = {"context": 32, "batch": 2} if small else {"context": 128, "batch": 8}
    windows = 4 if small else 64
    if which == "definitions":
        return _Definitions(**sizes, seed=seed, validation_windows=windows)
    return language_modelling(which, **sizes, seed=seed, validation_windows=windows)


def _addresses(model: nn.Module, small: bool) -> float:
    return -GROUNDS["tinygpt"].general(model, small)["general"]


def _pictures(name: str, classes: tuple[int, ...], seed: int, small: bool) -> SomeClasses:
    sizes = {"batch": 8, "test": 32} if small else {"batch": 64}
    return some_classes(name, classes, seed=seed, **sizes)


def _vit(name: str, classes: tuple[int, ...], small: bool) -> nn.Module:
    model, head = load_small_vit(), _picture_head(name, classes, small)
    # Without a draw from the global generator.
    model.head = cast("nn.Linear", nn.utils.skip_init(nn.Linear, head["weight"].shape[1], len(classes)))
    model.head.load_state_dict(head)
    return model


@lru_cache(maxsize=8)
def _picture_head(name: str, classes: tuple[int, ...], small: bool) -> dict[str, Tensor]:
    task = some_classes(name, classes, batch=8)
    every = max(1, len(task.train_labels) // (200 if small else 2000))
    with torch.no_grad():
        vectors = load_small_vit().features(task.train_images[::every])
    return fitted_head(vectors, task.train_labels[::every], len(classes))


def _garments(model: nn.Module, small: bool) -> float:
    """Accuracy on the five garments that the model knew, by the head that it had."""
    task, old = _pictures("fashion", (0, 1, 2, 3, 4), 0, small), load_small_vit()
    old.load_state_dict({**_parted(old)[1], **_parted(model)[0]})
    return 1 - task.evaluate(old.eval())["test_error"]


def _picture_task(name: str, *classes: int) -> FamilyTask:
    return FamilyTask(partial(_vit, name, classes), partial(_pictures, name, classes), lr=2e-3, steps=60)


def _texts(part: str, seed: int, small: bool) -> Task:
    # More than the ground has, since differences between merged models are small.
    return ground_texts(part, seed, small, test=None if small else 1024 if part == "era" else 1536)


def _text_task(part: str) -> FamilyTask:
    return FamilyTask(GROUNDS[part].model, partial(_texts, part), lr=1e-4, steps=160)


def _similar(model: nn.Module, small: bool) -> float:
    geometry = cast("Callable[[nn.Module, bool], float]", GROUNDS["noun"].geometry)
    return 1 - geometry(model, small)


def _gpt(small: bool) -> nn.Module:
    return load_pretrained()


FAMILIES: dict[str, Family] = {
    "pictures": Family(
        label="ViT of five garments, to other garments and to digits",
        tasks={
            "footwear": _picture_task("fashion", 5, 7, 9),
            "low digits": _picture_task("digits", 0, 1, 2, 3, 4),
            "high digits": _picture_task("digits", 5, 6, 7, 8, 9),
        },
        score="accuracy",
        retained="accuracy on the garments it knew",
        general=_garments,
        blocks="blocks.*",
    ),
    "texts": Family(
        label="MiniLM, to classes of nouns, of verbs, and to eras",
        tasks={part: _text_task(part) for part in ("noun", "verb", "era")},
        score="accuracy",
        retained="correlation of sentence similarities with those before",
        general=_similar,
        blocks="encoder.encoder.layer.*",
    ),
    "language": Family(
        label="TinyGPT of the addresses, to Moby-Dick and to definitions",
        tasks={
            "moby_dick": FamilyTask(_gpt, partial(_language, "moby_dick"), lr=3e-3, steps=50),
            "definitions": FamilyTask(_gpt, partial(_language, "definitions"), lr=3e-3, steps=50),
        },
        score="minus bits per byte",
        retained="minus bits per byte of the addresses",
        general=_addresses,
        blocks="blocks.*",
    ),
}
"""The families of the recorded study, by name."""
