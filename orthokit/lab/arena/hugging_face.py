"""Any causal language model of Hugging Face as a ground of the arena, by its name or folder."""

from __future__ import annotations

import copy
import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.errors import MissingExtraError, OptionError
from orthokit.lab.arena.ground import Ground
from orthokit.lab.corpora import corpus
from orthokit.lab.tasks import Batch, Task, _step_generator, _to_model

__all__ = ["CausalLM", "TokenModelling", "hugging_face_ground"]

_METRIC = "validation_bits_per_byte"
# Rows of a batch when judging.
_AT_ONCE = 4


class CausalLM(nn.Module):
    """A model of transformers that takes tokens and gives the logits of the next, and nothing else.

    Args:
        lm: A causal language model of transformers.
    """

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, ids: Int64[Tensor, "batch time"]) -> Float[Tensor, "batch time vocabulary"]:
        """Logits of the next token at every position, in float32."""
        return self.lm(input_ids=ids, use_cache=False).logits.float()


class TokenModelling(Task):
    """Next-token prediction on a corpus, judged in bits per byte, so that tokenizers are comparable.

    Args:
        name: A corpus of the package.
        tokenizer: ``tokenizer(text)`` gives the tokens of a text.
        context: Tokens of a window, ``>= 1``.
        batch: Windows a step, ``>= 1``.
        seed: Of the stream of windows.
        windows: Evenly spaced windows of the validation part that are judged, ``>= 1``.
        characters: Beginning of the training part that is used; of the validation part at most a fifth of it.

    Raises:
        UnknownNameError: No such corpus.
        OptionError: A size out of range, or a text that is shorter than a window.
    """

    metric = _METRIC
    unit = "bits per byte"

    def __init__(
        self, name: str, tokenizer: Any, *, context: int, batch: int, seed: int, windows: int, characters: int
    ) -> None:
        if min(context, batch, windows, characters) < 1:
            raise OptionError(f"every size must be at least 1; got {context, batch, windows, characters}.")
        self.name, self.context, self.batch_size, self.seed, self.windows = name, context, batch, seed, windows
        data = corpus(name)
        parts = []
        for bytes_, most in ((data.train, characters), (data.validation, max(1, characters // 5))):
            text = bytes(bytes_[:most].numpy()).decode("utf-8", errors="ignore")
            ids = torch.tensor(tokenizer(text), dtype=torch.int64)
            if len(ids) <= context + 1:
                raise OptionError(f"a window of {context} tokens needs a longer text; got {len(ids)} tokens of {name}.")
            parts.append((ids, len(text.encode("utf-8"))))
        (self.train, _), (self.validation, length) = parts
        self.bytes_per_token = length / len(self.validation)

    def _windows(self, data: Tensor, starts: Tensor) -> Batch:
        rows = data[starts[:, None] + torch.arange(self.context + 1)]
        return rows[:, :-1], rows[:, 1:]

    def batch(self, step: int) -> Batch:
        """Windows that start at random tokens of the training part."""
        last = len(self.train) - self.context - 1
        return self._windows(
            self.train, torch.randint(last, (self.batch_size,), generator=_step_generator(self.seed, step))
        )

    def held_out(self) -> list[Batch]:
        """The windows that are judged, a few at a time."""
        starts = torch.linspace(0, len(self.validation) - self.context - 1, self.windows).long()
        return [self._windows(self.validation, some) for some in starts.split(_AT_ONCE)]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the next token in nats."""
        inputs, targets = _to_model(model, batch)
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Bits per byte over the fixed validation windows."""
        total = sum(float(self.loss(model, batch)) * len(batch[0]) for batch in self.held_out())
        return {_METRIC: total / self.windows / math.log(2) / self.bytes_per_token}

    def describe(self) -> dict[str, object]:
        """Name and sizes."""
        sizes = {"context": self.context, "batch": self.batch_size, "windows": self.windows}
        return {"task": "token_modelling", "corpus": self.name, **sizes, "data_seed": self.seed}


def _loaded(name_or_path: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError(
            "models of Hugging Face are loaded by the package transformers. Install it with: pip install 'orthokit[hf]'"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer  # pyright: ignore[reportMissingImports]

    lm = AutoModelForCausalLM.from_pretrained(name_or_path, **{"dtype": torch.float32, **options})
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **{k: v for k, v in options.items() if k != "dtype"})
    return lm.eval(), tokenizer


def _layers(lm: nn.Module, block: int) -> dict[str, nn.Linear]:
    """The linear layers of a model that a block divides, its head apart."""
    head = cast("Any", lm).get_output_embeddings()
    found = {
        f"lm.{name}": layer for name, layer in lm.named_modules() if type(layer) is nn.Linear and layer is not head
    }
    return {name: layer for name, layer in found.items() if layer.in_features % block == 0}


def hugging_face_ground(
    name_or_path: str | os.PathLike[str],
    *,
    target: str = "moby_dick",
    general: str = "addresses",
    targets: Sequence[str] | None = None,
    context: int = 256,
    batch: int = 4,
    windows: int = 32,
    steps: int = 50,
    block: int = 32,
    characters: int = 1_000_000,
    device: str | torch.device = "cpu",
    **options: Any,
) -> Ground:
    """A causal language model by its name or folder, fine-tuned on one corpus of the package and judged on another.

    Args:
        name_or_path: Of the model and its tokenizer, as transformers takes it.
        target: Corpus it is fine-tuned on; default ``"moby_dick"``.
        general: Corpus that shows what it forgets; default ``"addresses"``.
        targets: Patterns of the layers to adapt, with ``"lm."`` in front; default all linear layers but the head whose
            inputs ``block`` divides.
        context: Tokens of a window.
        batch: Windows a step.
        windows: Windows that are judged, of each corpus.
        steps: Length of a run.
        block: Block size of OFT, which sets the budget of all methods.
        characters: Beginning of each corpus that is used.
        device: Where the model is; default the CPU.
        **options: For ``from_pretrained`` of model and tokenizer, such as ``gguf_file``, ``revision`` or
            ``local_files_only``; ``dtype`` of the model, default float32.

    Returns:
        The ground, to be entered under a name of your choice with :func:`orthokit.lab.arena.add_ground`. The model is
        loaded once, here; every run has a copy.

    Raises:
        MissingExtraError: transformers is not installed.
        OptionError: The model cannot be loaded, or has no layer to adapt.
        UnknownNameError: No such corpus.

    Example:
        >>> from orthokit.lab.arena import add_ground, compete
        >>> ground = hugging_face_ground("HuggingFaceTB/SmolLM2-135M", device="cuda")  # doctest: +SKIP
        >>> add_ground("smollm2", ground)  # doctest: +SKIP
        >>> rows = compete("smollm2", "oft", lr=1e-3, seed=0, portrait=True)  # doctest: +SKIP

    Numerics:
        Bits per byte from the tokens' loss and the mean bytes of a token of the judged corpus. Activations are compared
        for those layers that ``windows * context`` tokens are four times as many as the outputs of.
    """
    try:
        lm, tokenizer = _loaded(str(name_or_path), options)
    except (OSError, ValueError) as error:
        raise OptionError(f"transformers cannot load {str(name_or_path)!r}: {error}") from error
    layers = _layers(lm, block)
    if not layers:
        raise OptionError(
            f"{type(lm).__name__} has no linear layer whose inputs are a multiple of block={block}; give another block."
        )
    model, chosen = CausalLM(lm).to(device).eval(), tuple(targets or layers)
    seen = tuple(name for name, layer in layers.items() if 4 * layer.out_features <= windows * context)

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    tasks = {
        (name, small): TokenModelling(
            name,
            tokens,
            context=min(context, 16) if small else context,
            batch=1 if small else batch,
            seed=0,
            windows=2 if small else windows,
            characters=min(characters, 20_000) if small else characters,
        )
        for name in (target, general)
        for small in (True, False)
    }

    def task(seed: int, small: bool) -> Task:
        found = copy.copy(tasks[target, small])
        found.seed = seed
        return found

    def inputs(which: str, small: bool) -> list[Tensor]:
        return [ids.to(device) for ids, _ in tasks[general if which == "general" else target, small].held_out()]

    label = Path(str(name_or_path)).name
    return Ground(
        label=f"{label}, to {target.replace('_', '-')}",
        model=lambda _: copy.deepcopy(model),
        task=task,
        general=lambda model, small: {"general": tasks[general, small].evaluate(model)[_METRIC]},
        targets=chosen,
        few=tuple(layers)[:2] if targets is None else chosen,
        steps=steps,
        loss=_METRIC,
        unit="bits per byte",
        error="",
        other=f"bits per byte of {general}",
        block=block,
        inputs=inputs,
        seen=seen,
        tokens=windows * context,
    )
