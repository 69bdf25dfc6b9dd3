"""What merging with anchors is made of: matching models, one block, what is outside blocks, and the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthokit.errors import OptionError, OrthokitError, ShapeError, unknown_name
from orthokit.merging._called import Call, Called, check_fit, check_parameters
from orthokit.merging._common import finished, gathered, task_vectors, weighted_sum
from orthokit.merging._saved import digest, read_saved, write_saved
from orthokit.merging.adaptation import Adapted, adapt_block
from orthokit.merging.anchors import Anchors, construct_anchors

__all__ = [
    "Ticker",
    "adapted_block",
    "block_rows",
    "check_anchors",
    "constructed",
    "matched",
    "options_of",
    "outside_rule",
    "put",
    "rest",
]

_OUTSIDE = ("mean", "task_arithmetic", "base", "start")


class Ticker:
    """Counts steps of all blocks together for one progress callback.

    Args:
        progress: The callback, or None.
        of: How many steps there are.
    """

    def __init__(self, progress: Callable[[int, dict[str, float]], object] | None, of: int) -> None:
        self.progress, self.of, self.past = progress, of, 0

    def within(self, step: int, values: dict[str, float]) -> None:
        """One step of the part that is being done."""
        if self.progress is not None:
            self.progress(self.past + step, values | {"of": float(self.of)})

    def over(self, steps: int) -> None:
        """A part is done, or was done before."""
        self.past += steps


def options_of(name: str, given: Mapping[str, Any] | None, known: Sequence[str]) -> dict[str, Any]:
    """Options as a dictionary; an unknown one is refused."""
    for key in given or {}:
        if key not in known:
            raise unknown_name(f"{name} option", key, known)
    return dict(given or {})


def check_anchors(
    anchors: Mapping[str, Sequence[Anchors | None]], names: Sequence[str], experts: int, searched: Mapping[str, Any]
) -> None:
    """Raise unless there are anchors of every block and expert, and nothing is asked of their construction."""
    if searched:
        raise OptionError(f"anchors are given, so none are constructed; leave out construct={dict(searched)!r}.")
    for name in names:
        if len(anchors.get(name, ())) != experts:
            raise OptionError(
                f"anchors must hold one entry for each of {experts} experts of block {name!r}; got "
                f"{len(anchors.get(name, ()))}. Take them from the report of a merge of the same models and blocks."
            )


def outside_rule(outside: str | None, start: str | Mapping[str, Tensor]) -> str:
    """How tensors outside blocks are merged."""
    if outside is None:
        return "start" if isinstance(start, Mapping) else "mean" if start == "pretrained" else "task_arithmetic"
    if outside not in _OUTSIDE:
        raise unknown_name("rule for tensors outside blocks", outside, _OUTSIDE)
    if outside == "start" and not isinstance(start, Mapping):
        raise OptionError(f"outside='start' needs the state dict of a merged model as start; got start={start!r}.")
    return outside


def matched(
    base: nn.Module, experts: Sequence[nn.Module], names: Sequence[str]
) -> dict[str, tuple[nn.Module, list[nn.Module]]]:
    """Block to itself in the base and in each expert, checked."""
    found = {}
    for name in names:
        block0, others = base.get_submodule(name), []
        check_parameters(block0, what=f"{name or 'the base'}")
        for index, expert in enumerate(experts):
            try:
                other = expert.get_submodule(name)
            except AttributeError:
                raise ShapeError(
                    f"expert {index} has no module {name!r}; experts must be built like the base."
                ) from None
            check_fit(block0, other, what=f"{name} of expert {index}")
            check_parameters(other, what=f"{name} of expert {index}")
            others.append(other)
        found[name] = (block0, others)
    return found


def rest(
    base: nn.Module,
    experts: Sequence[nn.Module],
    names: Sequence[str],
    rule: str,
    weights: Sequence[float] | None,
    scale: float,
    start: str | Mapping[str, Tensor],
    untouched: Sequence[str],
) -> dict[str, Tensor]:
    """The state dict of the base with everything outside blocks merged."""
    state, others = base.state_dict(), [expert.state_dict() for expert in experts]
    parameters = {name for name, _ in base.named_parameters(remove_duplicate=False)}
    result = {}
    for name, t in state.items():
        fixed = any(fnmatchcase(name, pattern) for pattern in untouched)
        if name not in parameters or fixed or any(within(name, block) for block in names):
            result[name] = t.detach().clone()
            continue
        missing = [i for i, other in enumerate(others) if name not in other]
        if missing:
            raise ShapeError(f"expert {missing[0]} has no {name}; experts must be built like the base.")
        if rule == "start" and isinstance(start, Mapping):
            if name not in start:
                raise ShapeError(f"start has no {name}; give a whole state dict, or another rule with outside=.")
            others_here = [start[name]]
        else:
            others_here = [other[name] for other in others]
        try:
            result[name] = _merged(t, others_here, rule, weights, scale)
        except OrthokitError as cause:
            raise type(cause)(f"{name}: {cause} Or leave it to the base with untouched=.") from cause
    return result


def within(name: str, block: str) -> bool:
    """Whether a parameter belongs to a block."""
    return block == "" or name.startswith(block + ".")


def constructed(
    block0: nn.Module, other: nn.Module, steps: int, options: dict[str, Any], ticker: Ticker
) -> Anchors | None:
    """The anchors of one expert in one block; None where it did not change the block."""
    own, new = dict(block0.named_parameters()), dict(other.named_parameters())
    changed = any(not torch.equal(p, new[name].to(p)) for name, p in own.items())
    found = construct_anchors(block0, other, **options, progress=ticker.within) if changed else None
    ticker.over(steps + 1)
    return found


def adapted_block(
    block0: nn.Module,
    others: Sequence[nn.Module],
    anchors: Sequence[Anchors | None],
    options: dict[str, Any],
    epochs: int,
    call: Call | None,
    path: Path | None,
    ticker: Ticker,
) -> Adapted:
    """The merged block, from disk where it is there."""
    inputs = [None if one is None else one.X for one in anchors]
    if not any(X is not None for X in inputs):
        nothing = (None,) * len(inputs)
        own = {name: p.detach().clone() for name, p in Called(block0, call).own().items()}
        ticker.over(epochs)
        return Adapted(own, torch.zeros(1, dtype=torch.float64), nothing, nothing)
    start = options["start"]
    if isinstance(start, Mapping):
        absent = [name for name, _ in block0.named_parameters() if name not in start]
        if absent:
            raise ShapeError(f"start has no {absent[0]} of a block; give the state dict of a whole merged model.")
    recipe = "" if path is None else _recipe(block0, others, inputs, options)
    found = None if path is None else read_saved(path, recipe=recipe)
    if found is None:
        made = adapt_block(block0, others, inputs, **options, call=call, progress=ticker.within)
        if path is not None:
            _save(path, made, recipe)
    else:
        made = _restored(*found, like=next(block0.parameters()))
    ticker.over(epochs)
    return made


def block_rows(name: str, block0: nn.Module, anchors: Sequence[Anchors | None], made: Adapted) -> list[dict[str, Any]]:
    """One row an expert."""
    before = {n: p.detach().to(made.parameters[n]) for n, p in block0.named_parameters()}
    change = sum(float((made.parameters[n] - p).double().square().sum()) for n, p in before.items())
    size = sum(float(p.double().square().sum()) for p in before.values())
    return [
        {
            "block": name,
            "expert": index,
            "cosine_before": None if one is None else float(one.cosines[0]),
            "cosine": None if one is None else one.cosine,
            "norm": None if one is None else float(one.norms.median()),
            "loss_before": made.before[index],
            "loss_after": made.after[index],
            "moved": (change / size) ** 0.5 if size else None,
        }
        for index, one in enumerate(anchors)
    ]


def put(state: Mapping[str, Tensor], blocks: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The state dict with the parameters of blocks in their places, in its dtypes."""
    result = {name: t.clone() for name, t in state.items()}
    for block, parameters in blocks.items():
        for name, value in parameters.items():
            whole = f"{block}.{name}" if block else name
            result[whole] = value.detach().to(result[whole])
    return result


def _merged(base: Tensor, others: list[Tensor], rule: str, weights: Sequence[float] | None, scale: float) -> Tensor:
    if rule == "base":
        return base.detach().clone()
    if rule == "start":
        return finished(gathered(base, others).experts[0].clone(), gathered(base, others))
    inputs = gathered(base, others, weights, positive=True)
    factors = inputs.weights / inputs.weights.sum() if rule == "mean" else inputs.weights
    change = weighted_sum(task_vectors(inputs), factors)
    return finished(change, inputs, scale=1.0 if rule == "mean" else scale, moved=True)


def _recipe(
    block0: nn.Module, others: Sequence[nn.Module], inputs: Sequence[Tensor | None], options: dict[str, Any]
) -> str:
    tensors = [(f"{i}/{name}", p) for i, of in enumerate((block0, *others)) for name, p in of.named_parameters()]
    tensors += [(f"X{i}", X) for i, X in enumerate(inputs) if X is not None]
    plain = dict(options)
    if isinstance(options["start"], Mapping):
        tensors += [(f"start/{name}", options["start"][name]) for name, _ in block0.named_parameters()]
        plain["start"] = "given"
    return digest(plain, tensors)


def _save(path: Path, made: Adapted, recipe: str) -> None:
    tensors = {f"at/{name}": t for name, t in made.parameters.items()} | {"losses": made.losses}
    tensors |= {f"kept/{epoch}/{name}": t for epoch, of in made.kept.items() for name, t in of.items()}
    write_saved(path, tensors, {"before": made.before, "after": made.after}, recipe=recipe)


def _restored(tensors: dict[str, Tensor], values: dict[str, Any], *, like: Tensor) -> Adapted:
    kept: dict[int, dict[str, Tensor]] = {}
    for key, t in tensors.items():
        if key.startswith("kept/"):
            _, epoch, name = key.split("/", 2)
            kept.setdefault(int(epoch), {})[name] = t.to(like.device)
    at = {key.removeprefix("at/"): t.to(like.device) for key, t in tensors.items() if key.startswith("at/")}
    return Adapted(at, tensors["losses"], tuple(values["before"]), tuple(values["after"]), kept)
