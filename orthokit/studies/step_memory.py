"""What a model holds in memory through a training step, measured tensor by tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["step_bytes"]


def step_bytes(model: nn.Module, *inputs: Tensor) -> dict[str, int]:
    """Bytes that a step with AdamW holds: weights, gradients, moments, and what lies between the two passes.

    Args:
        model: Any module that returns one tensor; its trainable parameters get a gradient and one update of AdamW with
            a learning rate of 0.
        inputs: Of the model.

    Returns:
        ``weights`` (parameters, codes and other buffers), ``gradients``, ``moments`` (the optimizer's state) and
        ``kept`` (what the forward pass keeps for the backward, inputs included, each storage once).

    Example:
        >>> found = step_bytes(nn.Linear(8, 4, bias=False), torch.zeros(16, 8))
        >>> found["weights"], found["gradients"], found["moments"], found["kept"]
        (128, 128, 256, 512)

    Numerics:
        Counted from the tensors that autograd saves, so it holds on every device and does not depend on an allocator.
    """
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(*inputs)
    y.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    optimizer.step()
    states = [value for p in trained for value in optimizer.state[p].values() if value.ndim]
    found = {
        "weights": sum(held.values()),
        "gradients": sum(p.grad.nbytes for p in trained if p.grad is not None),
        "moments": sum(value.nbytes for value in states),
        "kept": sum(kept.values()),
    }
    model.zero_grad(set_to_none=True)
    return found


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
