"""The page "Momentum gap" without its looks: settings in, figures and numbers out."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import numpy as np
import param
import torch

from orthokit.diagnostics.momentum import effective_samples
from orthokit.diagnostics.randommatrix import noise_edge, spike_positions
from orthokit.errors import OrthokitError
from orthokit.figures import gap_by_beta, spectrum_bars
from orthokit_widgets._charts import arrows
from orthokit_widgets.fields import Settings
from orthokit_widgets.momentum_data import (
    BETAS,
    CURVE,
    PUBLISHED_GAPS,
    STEPS,
    Cache,
    Curves,
    Stream,
    draw,
    factored_alignment,
    filter_curves,
    post_curve,
    signal,
)
from orthokit_widgets.worker import Job, Worker

__all__ = ["MomentumState"]

_RANKS = [1, 3, 5, 10, 15]
# Buffers of 200 x 200 take 32 MB; a server with 1 GB of memory should hold a few.
_STREAMS = Cache(128e6, lambda stream: stream.nbytes)
_CURVES = Cache(256)
_POSTS = Cache(256)
_NAMES = {"pre": "momentum, then polar", "post": "polar, then momentum", "none": "polar, no momentum"}


class MomentumState(Settings):
    """What the page knows: the settings, the last snapshot, and a thread for what takes longer than an answer may."""

    beta = param.Number(0.9, bounds=(0.0, 0.995), step=0.005, label="Momentum β", doc="Weight of the past.")
    sigma = param.Number(1.0, bounds=(0.2, 5.0), label="Noise σ", doc="Standard deviation of every gradient entry.")
    rank = param.Selector(default=3, objects=_RANKS, label="Signal rank r")
    size = param.Integer(100, bounds=(20, 200), step=10, label="Matrix size n", doc="Gradients are n × n.")
    order = param.Selector(default="pre", objects=["pre", "post", "none"], label="Order")
    noise = param.Selector(default="iid", objects=["iid", "arch"], label="Noise")
    seed = param.Integer(0, bounds=(0, 99), step=1, label="Seed")

    SETTINGS = ("beta", "sigma", "rank", "size", "order", "noise", "seed")
    LOGARITHMIC = frozenset({"sigma"})
    TYPED = frozenset({"seed"})
    SEGMENTS: ClassVar = {
        "rank": {rank: str(rank) for rank in _RANKS},
        "order": {"pre": "pre", "post": "post", "none": "none"},
        "noise": {"iid": "Gaussian", "arch": "ARCH"},
    }

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.worker = Worker(self._keep, self._fail)
        #: Milliseconds of the last :meth:`snapshot`.
        self.last_ms = 0.0
        #: Why a computation failed; empty when none did.
        self.error = ""
        self._shown: dict[str, Any] | None = None
        self._failed: Hashable = None
        self._missing = False

    # --- keys of what is cached

    @property
    def _stream_key(self) -> tuple[Hashable, ...]:
        return ("stream", self.size, self.noise, self.seed)

    @property
    def _curve_key(self) -> tuple[Hashable, ...]:
        return (*self._stream_key[1:], self.rank, self.sigma)

    # --- asking

    @property
    def busy(self) -> str:
        """What is being computed, as a sentence; empty when the snapshot is complete."""
        job = self.worker.job
        if job is None:
            return ""
        if isinstance(job.key, tuple) and job.key[0] == "post":
            return f"Orthogonalising {STEPS} gradients for the order post: {job.progress:.0%}"
        return f"Drawing {STEPS} gradients of {self.size} × {self.size}"

    def wait(self, timeout: float = 60.0) -> dict[str, Any]:
        """The snapshot when nothing is left to compute, or what there is after ``timeout`` seconds."""
        end = time.monotonic() + timeout
        found = self.snapshot()
        while found["busy"] and time.monotonic() < end:
            self.worker.join(end - time.monotonic())
            found = self.snapshot()
        return found

    def close(self) -> None:
        """Give up what is being computed: nobody looks any more."""
        self.worker.forget()

    def snapshot(self) -> dict[str, Any]:
        """Everything the page shows for the settings as they are.

        Returns:
            ``figures`` (spectrum, gap, arrows; figure dictionaries), ``facts`` (named numbers), ``values`` (floats:
            gap, alignment, above, edge), ``settings`` and ``busy``. While the gradients of a new size, law or seed are
            drawn, the last figures stay, with the ``settings`` they belong to; ``figures`` is empty before the first.
        """
        started = time.perf_counter()
        self._missing = False
        stream = _STREAMS.get(self._stream_key)
        if stream is None:
            size, noise, seed = self.size, self.noise, self.seed
            self._want(self._stream_key, lambda job: draw(size, noise, seed))
            found = self._shown or {"figures": {}, "facts": [], "values": {}, "settings": {}}
        else:
            found = self._shown = self._compute(stream)
        self.last_ms = 1e3 * (time.perf_counter() - started)
        # What was missing above may be there by now: it is not in these figures, so another look is due.
        return found | {"busy": self.busy or ("Drawing the charts" if self._missing else "")}

    # --- computing

    def _want(self, key: Hashable, compute: Callable[[Job], Any]) -> None:
        if key != self._failed:  # what failed would fail again at every look
            self._missing = True
            self.worker.want(key, compute)

    def _compute(self, stream: Stream) -> dict[str, Any]:
        truth, sigma, shape = signal(self.size, self.rank), self.sigma, (self.size, self.size)
        at = int(np.abs(BETAS - self.beta).argmin())
        curves: Curves | None = _CURVES.get(self._curve_key)
        if curves is None:
            curves = filter_curves(stream, truth, sigma)
            _CURVES.put(self._curve_key, curves)
        post = self._post(stream)
        M = stream.momentum(at, truth.signal, sigma)
        U, s, V = torch.linalg.svd(M, full_matrices=False)
        values = s.double().numpy()
        edge = float(noise_edge(shape, sigma, self.beta, steps=STEPS))
        figures = {
            "spectrum": spectrum_bars(
                values,
                rank=self.rank,
                edge=edge,
                spikes=spike_positions(truth.strengths, shape, sigma, self.beta, steps=STEPS),
                limit=max(20, self.rank + 5),
                ymax=1.06 * curves.top,
            ),
            "gap": self._gap_figure(curves, post),
            "arrows": arrows(
                {
                    "signal S": (float(truth.signal.norm()), 0.0),
                    "momentum M": _plane(M, truth.signal),
                    "gradient G": _plane(truth.signal + sigma * stream.noise, truth.signal),
                }
            ),
        }
        aligned = {
            "pre": float(factored_alignment(U, V, truth)),
            "post": None if post is None else float(post[at]),
            "none": curves.none,
        }
        numbers = {
            "gap": float(values[self.rank - 1] - values[self.rank]),
            "alignment": aligned[self.order],
            "above": int((values > edge).sum()),
            "edge": edge,
            "samples": float(effective_samples(self.beta)),
        }
        return {"figures": figures, "facts": self._facts(numbers), "values": numbers, "settings": self.values()}

    def _post(self, stream: Stream) -> np.ndarray | None:
        """The curve of the order post if it is there; asked for when that order is chosen, else not waited for."""
        key = ("post", *self._curve_key)
        found = _POSTS.get(key)
        if found is None and self.order == "post":
            truth, sigma = signal(self.size, self.rank), self.sigma
            self._want(key, lambda job: post_curve(stream, truth, sigma, job))
        else:
            self.worker.forget()
        return found

    def _gap_figure(self, curves: Curves, post: np.ndarray | None) -> dict[str, Any]:
        betas = BETAS[CURVE]
        lines = {_NAMES["pre"]: curves.pre, _NAMES["none"]: np.full(len(betas), curves.none)}
        if post is not None:
            lines[_NAMES["post"]] = post[CURVE]
        standard = (self.rank, self.sigma, self.size) == (3, 1.0, 100)
        published = PUBLISHED_GAPS if standard else None
        return gap_by_beta(betas, curves.gap, lines, current=self.beta, published=published)

    def _facts(self, numbers: dict[str, Any]) -> list[dict[str, str]]:
        aligned = numbers["alignment"]
        ratio = "" if aligned is None else _NAMES[self.order]
        return [
            {"name": "gap σᵣ − σᵣ₊₁", "value": f"{numbers['gap']:.2f}", "unit": ""},
            {
                "name": f"alignment, order {self.order}",
                "value": "…" if aligned is None else f"{aligned:.3f}",
                "unit": ratio and "of 1",
            },
            {"name": "above the noise edge", "value": f"{numbers['above']}", "unit": f"of {self.rank} sought"},
            {"name": "noise edge", "value": f"{numbers['edge']:.2f}", "unit": ""},
            {"name": "gradients averaged", "value": f"{numbers['samples']:.3g}", "unit": "(1+β)/(1−β)"},
        ]

    # --- called in the worker's thread

    def _keep(self, key: Hashable, result: Any) -> None:
        self.error = ""
        (_STREAMS if isinstance(result, Stream) else _POSTS).put(key, result)

    def _fail(self, key: Hashable, error: Exception) -> None:
        self._failed = key
        self.error = str(error) if isinstance(error, OrthokitError) else f"{type(error).__name__}: {error}"


def _plane(X: torch.Tensor, S: torch.Tensor) -> tuple[float, float]:
    """Length along S and length of all the rest: the angle in the picture is the angle between the matrices."""
    along = float((X * S).sum() / S.norm())
    return along, float((X.square().sum() - along**2).clamp(min=0).sqrt())
