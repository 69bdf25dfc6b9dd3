"""A training state as flat tensors and JSON, and back: what a checkpoint of a run holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from orthokit.errors import CheckpointError

__all__ = ["restore", "snapshot"]


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything the next step depends on: weights, buffers, optimizer state, torch's generator, the step itself."""
    tensors = {f"model/{name}": t for name, t in _unique(model.state_dict(keep_vars=False)).items()}
    state = optimizer.state_dict()
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                values.setdefault(str(index), {})[key] = value
    tensors["generator/cpu"] = torch.get_rng_state()
    groups = [{k: _plain(v) for k, v in group.items()} for group in state["param_groups"]]
    kind = type(optimizer).__name__
    meta = {"step": step, "training": model.training, "optimizer": kind, "groups": groups, "state": values}
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, meta


def restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], meta: dict[str, Any]
) -> int:
    """Put a :func:`snapshot` back; the model and optimizer must be built as they were.

    Returns:
        The step to go on from.

    Raises:
        CheckpointError: Names or shapes differ from the model's, or the optimizer is another; nothing was changed.
    """
    weights = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
    _check_fit(model, weights)
    _check_optimizer(optimizer, meta)
    state: dict[int, dict[str, Any]] = {int(i): dict(entries) for i, entries in meta["state"].items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            state.setdefault(int(index), {})[key] = tensor
    current = optimizer.state_dict()["param_groups"]
    groups = [_like(group, saved) for group, saved in zip(current, meta["groups"], strict=True)]
    model.load_state_dict(weights, strict=False)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    torch.set_rng_state(tensors["generator/cpu"])
    return int(meta["step"])


def _unique(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights once: a file of tensors holds each memory a single time."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    kept = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        kept[name] = tensor
    return kept


def _check_fit(model: nn.Module, weights: dict[str, Tensor]) -> None:
    own = _unique(model.state_dict())
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape]
    if missing or extra or shapes:
        raise CheckpointError(
            "the checkpoint is of another model: "
            f"{len(missing)} tensors are missing {missing[:3]}, {len(extra)} are unknown {extra[:3]}, "
            f"{len(shapes)} differ in shape {sorted(shapes)[:3]}. Build the model with the options of the first run."
        )


def _check_optimizer(optimizer: torch.optim.Optimizer, meta: dict[str, Any]) -> None:
    own = (type(optimizer).__name__, [len(group["params"]) for group in optimizer.param_groups])
    saved = (meta.get("optimizer", own[0]), [len(group["params"]) for group in meta["groups"]])
    if own != saved:
        raise CheckpointError(
            f"the checkpoint is of another optimizer: {saved[0]} over groups of {saved[1]} parameters, and this is "
            f"{own[0]} over {own[1]}. Build the optimizer with the options of the first run."
        )


def _plain(value: Any) -> Any:
    """A group option as JSON keeps it; a dtype by name."""
    if isinstance(value, Tensor):
        return value.tolist()
    return str(value) if isinstance(value, torch.dtype) else value


def _like(group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Saved options in the types of the live group: JSON turned tuples into lists and dtypes into names."""
    result = dict(group)
    for key, value in saved.items():
        live = group.get(key)
        if isinstance(value, str) and value.startswith("torch."):
            result[key] = getattr(torch, value.removeprefix("torch."))
        elif isinstance(live, tuple):
            result[key] = tuple(value)
        elif isinstance(live, Tensor):
            result[key] = torch.tensor(value, dtype=live.dtype, device=live.device)
        else:
            result[key] = value
    return result
