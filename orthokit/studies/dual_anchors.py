"""Functional dual anchors of real experts: searches whose bound is known, merges by them, and the way they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.diagnostics import collect_activations
from orthokit.errors import OptionError, unknown_name
from orthokit.lab.families import FAMILIES, Expert, expert_scores, family_base, family_retention, train_expert
from orthokit.lab.image_tasks import SomeClasses
from orthokit.lab.vision import SmallViT, load_small_vit
from orthokit.merging import (
    Anchors,
    construct_anchors,
    loss_plane,
    merge,
    merge_with_anchors,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ANCHOR_BLOCKS",
    "ANCHOR_TASKS",
    "ANCHOR_TOKENS",
    "AnchorExperts",
    "adapted_to",
    "anchor_curves",
    "anchor_experts",
    "anchor_inputs",
    "anchor_landscape",
    "anchor_scores",
    "layer_searches",
    "tuned_task_arithmetic",
]

State = Mapping[str, Tensor]
"""Name to tensor."""

ANCHOR_TASKS = ("footwear", "high digits")
"""The two experts of the family "pictures" that lose most of each other's task."""

_FAMILY = "pictures"
ANCHOR_BLOCKS = FAMILIES[_FAMILY].blocks
"""Pattern of the blocks that anchors are constructed for."""

ANCHOR_TOKENS = 16
"""Tokens of an anchor: a picture has as many patches."""

_SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


@dataclass(frozen=True, eq=False, repr=False)
class AnchorExperts:
    """A pretrained model and experts of it, as modules that merging takes.

    Args:
        base: The pretrained model.
        models: The experts in the order of ``experts``, under the head of the base.
        experts: Task to expert, with its own head.
        small: As in training.
    """

    base: SmallViT
    models: tuple[SmallViT, ...]
    experts: dict[str, Expert]
    small: bool

    @property
    def trunk(self) -> dict[str, Tensor]:
        """The tensors of the base without its head."""
        return family_base(_FAMILY, small=self.small)

    @property
    def trunks(self) -> list[dict[str, Tensor]]:
        """Those of the experts."""
        return [expert.trunk for expert in self.experts.values()]

    def __repr__(self) -> str:
        return f"AnchorExperts({' and '.join(self.experts)})"


def anchor_experts(
    tasks: Sequence[str] = ANCHOR_TASKS, *, seed: int = 0, steps: int | None = None, small: bool = False
) -> AnchorExperts:
    """Fine-tune the small vision transformer to some tasks of the family "pictures".

    Args:
        tasks: Names of its tasks, at least two.
        seed: Of the batches.
        steps: Length of the training; default the task's.
        small: Fewer examples, for tests and the smallest notebooks.

    Returns:
        :class:`AnchorExperts`.

    Raises:
        OptionError: Fewer than two tasks.
        UnknownNameError: A task that the family does not have.

    Example:
        >>> setting = anchor_experts(steps=1, small=True)
        >>> setting, len(setting.models)
        (AnchorExperts(footwear and high digits), 2)
    """
    if len(set(tasks)) < 2:
        raise OptionError(f"need at least two different tasks; got {list(tasks)}.")
    experts = {task: train_expert(_FAMILY, task, seed=seed, steps=steps, small=small) for task in tasks}
    models = tuple(_module(expert.trunk) for expert in experts.values())
    return AnchorExperts(load_small_vit().eval(), models, experts, small)


def layer_searches(
    setting: AnchorExperts,
    layer: str,
    *,
    counts: Sequence[int] = (2, 8, 32),
    expert: int = 0,
    steps: int = 150,
    lr: float = 3e-2,
    seed: int = 0,
) -> dict[str, Anchors]:
    """Anchors of one linear layer without its bias, whose bound is known; half squares as the distance.

    Args:
        setting: The experts.
        layer: Name of a linear layer.
        counts: Numbers of anchors (of one token) to try.
        expert: Whose change it is.
        steps: Of the search.
        lr: Of the search.
        seed: Of the initial inputs, scaled Gaussian.

    Returns:
        "2 inputs", ... to anchors, each with its bound.

    Raises:
        UnknownNameError: No such linear layer.
    """
    layers = {name: one for name, one in setting.base.named_modules() if isinstance(one, nn.Linear)}
    if layer not in layers:
        raise unknown_name("linear layer", layer, tuple(layers))
    old, new = (_unbiased(m.get_parameter(f"{layer}.weight")) for m in (setting.base, setting.models[expert]))
    options = {"tokens": 1, "init": "gaussian", "sigma": 0.1, "distance": "l2", "steps": steps, "lr": lr, "seed": seed}
    return {f"{count} inputs": construct_anchors(old, new, count=count, **options) for count in counts}


def anchor_curves(
    anchors: Mapping[str, Anchors] | Mapping[str, Sequence[Anchors | None]], *, names: Sequence[str] = ()
) -> dict[str, Any]:
    """The course of constructions, as :func:`orthokit.figures.anchor_alignment` takes it.

    Args:
        anchors: Label to anchors, or block to those of each expert.
        names: Of the experts, in the second case.

    Returns:
        ``curves`` and ``bounds``; the latter for single linear layers alone.
    """
    found: dict[str, Anchors] = {}
    for label, own in anchors.items():
        if isinstance(own, Anchors):
            found[label] = own
        else:
            found |= {f"{label}, {name}": one for name, one in zip(names, own, strict=True) if one is not None}
    return {
        "curves": {label: (range(len(one.cosines)), one.cosines) for label, one in found.items()},
        "bounds": {label: one.bound for label, one in found.items() if one.bound is not None},
    }


def anchor_inputs(
    setting: AnchorExperts, *, task: str, block: str, count: int, skip: int = 0
) -> Float[Tensor, "count tokens d"]:
    """What the pretrained model feeds to a block on training pictures of a task.

    Args:
        setting: The experts.
        task: Whose pictures.
        block: Name of a block.
        count: Pictures.
        skip: Leave out so many pictures before them.

    Returns:
        Hidden states, shape ``(count, 16, 64)``.

    Raises:
        UnknownNameError: No such task or block.
    """
    pictures = _task(setting, task).train_images
    # Spread over the set, whatever order it is in.
    every = max(1, len(pictures) // (2 * (count + skip)))
    some = pictures[::every][skip : skip + count]
    return _entering(setting.base, some, block)


def adapted_to(
    setting: AnchorExperts,
    anchors: Mapping[str, Sequence[Anchors]],
    *,
    inputs: Mapping[str, Sequence[Tensor]] | None = None,
    start: Literal["pretrained", "task_arithmetic"] | State = "task_arithmetic",
    scale: float = 0.5,
    lr: float | None = None,
    epochs: int = 100,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A merge by anchors that are there already, or by other inputs in their place.

    Args:
        setting: The experts.
        anchors: Block to the anchors of each expert, as in ``FDAReport.anchors``.
        inputs: Block to inputs to be used instead, such as real hidden states.
        start: As for :func:`orthokit.merging.merge_with_anchors`; a mapping is a merged trunk.
        scale: Of task arithmetic, for the first coefficients and for the tensors outside blocks.
        lr: Of the adaptation; default as for :func:`orthokit.merging.adapt_block`.
        epochs: Of the adaptation.
        seed: Of the order of inputs.

    Returns:
        The merged trunk.

    Raises:
        OptionError, ShapeError, UnknownNameError: As :func:`orthokit.merging.merge_with_anchors`.
    """
    if inputs is not None:
        anchors = {
            block: [replace(one, X=X) for one, X in zip(own, inputs[block], strict=True)]
            for block, own in anchors.items()
        }
    given = isinstance(start, Mapping)
    options: dict[str, Any] = {"tokens": ANCHOR_TOKENS, "untouched": ["head.*"], "scale": scale, "seed": seed}
    # The whole model, as the base has a head; without a merged trunk the rest is that of task arithmetic.
    options["start"] = {**setting.base.state_dict(), **start} if given else start
    options["outside"] = None if given else "task_arithmetic"
    tuned = {"epochs": epochs} | ({} if lr is None else {"lr": lr})
    merged, _ = merge_with_anchors(
        setting.base, setting.models, blocks=ANCHOR_BLOCKS, anchors=anchors, adapt=tuned, **options
    )
    return {name: merged[name] for name in setting.trunk}


def tuned_task_arithmetic(
    setting: AnchorExperts, *, scales: Sequence[float] = _SCALES
) -> tuple[float, dict[str, Tensor]]:
    """Task arithmetic with the scale that does best on the validation half.

    Args:
        setting: The experts.
        scales: To choose from.

    Returns:
        The scale and the merged trunk.
    """
    merged = {s: merge(setting.trunk, setting.trunks, method="task_arithmetic", scale=s) for s in scales}
    scores = {
        s: expert_scores(_FAMILY, m, setting.experts, part="validation", small=setting.small) for s, m in merged.items()
    }
    best = max(scores, key=lambda s: sum(scores[s].values()))
    return best, dict(merged[best])


def anchor_scores(setting: AnchorExperts, trunks: Mapping[str, State]) -> pd.DataFrame:
    """How well trunks do the tasks of all experts, on the test half, and what they still do of the old one.

    Args:
        setting: The experts, whose heads are used.
        trunks: Name to trunk.

    Returns:
        One row a trunk: accuracy for each task, their ``mean``, ``retained`` (accuracy on the garments that the
        pretrained model knew) and ``loss`` (mean cross-entropy over the tasks, in nats).
    """
    import pandas as pd

    rows = {}
    for name, trunk in trunks.items():
        trunk = {key: trunk[key] for key in setting.trunk}
        found = expert_scores(_FAMILY, trunk, setting.experts, small=setting.small)
        whole = {"mean": sum(found.values()) / len(found)}
        whole["retained"] = family_retention(_FAMILY, trunk, small=setting.small)
        rows[name] = found | whole | {"loss": _loss(setting, None, _module(trunk))}
    return pd.DataFrame.from_dict(rows, orient="index")


def anchor_landscape(
    setting: AnchorExperts, paths: Mapping[str, Sequence[State]], *, grid: int = 11, pictures: int = 200
) -> dict[str, Any]:
    """The loss of both tasks on the plane through the pretrained model and two experts, with paths of merges.

    Args:
        setting: Two experts.
        paths: Name to trunks along a path.
        grid: Points along each axis.
        pictures: Test pictures of each task.

    Returns:
        The arguments of :func:`orthokit.figures.loss_landscape`; losses of a path are those of its trunks themselves.

    Raises:
        OptionError: Not two experts.
    """
    if len(setting.experts) != 2:
        raise OptionError(f"a plane goes through the base and two experts; got {len(setting.experts)} experts.")
    loss = partial(_loss, setting, pictures)
    points = {"pretrained": setting.trunk, **dict(zip(setting.experts, setting.trunks, strict=True))}
    plane = loss_plane(setting.base, points, loss, grid=grid, paths=paths)
    ways = {name: (plane.paths[name], [loss(_module(state)) for state in states]) for name, states in paths.items()}
    told = {"x": plane.x, "y": plane.y, "losses": plane.losses, "points": plane.points, "paths": ways}
    return told | {"off": plane.off}


def _module(trunk: State) -> SmallViT:
    """A trunk under the head of the base."""
    model = load_small_vit()
    model.load_state_dict({**model.state_dict(), **trunk})
    return model.eval()


def _task(setting: AnchorExperts, task: str) -> SomeClasses:
    if task not in setting.experts:
        raise unknown_name("task", task, tuple(setting.experts))
    return cast("SomeClasses", FAMILIES[_FAMILY].tasks[task].task(0, setting.small))


def _entering(model: SmallViT, pictures: Tensor, block: str) -> Tensor:
    blocks = [name for name, _ in model.named_modules()]
    if block not in blocks:
        raise unknown_name("block", block, tuple(blocks))
    with torch.no_grad():
        rows = collect_activations(model, [pictures], [block], what="input", call=_features)[block]
    return rows.reshape(len(pictures), -1, rows.shape[-1])


def _features(model: nn.Module, pictures: Tensor) -> Tensor:
    return cast("SmallViT", model).features(pictures)


def _loss(setting: AnchorExperts, pictures: int | None, model: nn.Module) -> float:
    """Mean cross-entropy over the tasks, each with the head of its expert, on the test half."""
    losses = []
    with torch.no_grad():
        for name, expert in setting.experts.items():
            task = _task(setting, name)
            images, labels = (side[1::2][:pictures] for side in (task.test_images, task.test_labels))
            features = _features(model, images)
            scores = F.linear(features, expert.head["head.weight"], expert.head["head.bias"])
            losses.append(float(F.cross_entropy(scores, labels)))
    return sum(losses) / len(losses)


def _unbiased(weight: Tensor) -> nn.Linear:
    layer = cast("nn.Linear", nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=False))
    layer.weight.data.copy_(weight.detach())
    return layer
