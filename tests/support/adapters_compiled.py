"""Adapters under ``torch.compile``; run by ``tests/adapters/test_frameworks.py`` in a process of its own.

The compiler does not trace the annotation checks of the tests, so here they are off.
"""

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from adapters_models import KINDS, adapted, agree, outcome
from torch import Tensor

from orthokit.adapters import adapter_parameters, attach, disabled, set_adapters
from orthokit.adapters.lora import LoRA
from orthokit.adapters.oft import OFT
from orthokit.adapters.paths import rewind

# Sums in another order, through another backward pass than the one written by hand.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def rows() -> Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(7))


def one_graph(kind: str, backend: str = "aot_eager") -> None:
    """``fullgraph`` raises where the compiler would give up on a piece."""
    model, x = adapted(KINDS[kind]), rows()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    agree(outcome(model, x, compiled), outcome(model, x), **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), **CLOSE)


def settings() -> None:
    """What is set on adapters after compilation acts."""
    model, x, seen = attach(adapted(OFT(4)), LoRA(2), targets=["0", "2"], name="other"), rows(), []
    with torch.no_grad():
        for p in adapter_parameters(model, "other").values():
            p.fill_(0.1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def same() -> None:
        with torch.no_grad():
            seen.append(compiled(x))
            torch.testing.assert_close(seen[-1], model(x), **CLOSE)

    same()
    rewind(model, 0.25)
    same()
    set_adapters(model, "other")
    same()
    with disabled(model):
        same()
    rewind(set_adapters(model, "default"), 0.5, path="dense")
    same()
    if any(torch.allclose(a, b, atol=1e-3) for i, a in enumerate(seen) for b in seen[:i]):
        raise AssertionError("two settings gave the same outputs")


def main(names: list[str]) -> None:
    """Run some checks and print as JSON what each of them said."""
    checks: dict[str, Callable[[], None]] = {kind: lambda kind=kind: one_graph(kind) for kind in KINDS}
    checks["settings"] = settings
    checks.update({f"inductor {kind}": lambda kind=kind: one_graph(kind, "inductor") for kind in KINDS})
    said = {}
    for name in names:
        torch._dynamo.reset()
        try:
            checks[name]()
            said[name] = "passed"
        except Exception:
            said[name] = traceback.format_exc()[-2000:]
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
