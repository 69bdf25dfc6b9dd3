"""What is claimed of the geometry of checkpoints, as numbers with a rule that decides, and what must hold exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from orthokit.diagnostics.inspection import Inspection, inspect
from orthokit.errors import OptionError
from orthokit.lab.pretrained import load_pretrained
from orthokit.linalg import random_orthogonal
from orthokit.studies.checkpoint_geometry import noise_spectra
from orthokit.studies.training_spectra import SpectraAlong, monitor_differences, training_changes, training_curves

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "SPECTRUM_QUANTITIES",
    "checkpoint_identities",
    "exponent_findings",
    "naming_findings",
    "near_random_findings",
    "noise_findings",
    "stored_ranks",
    "training_findings",
    "training_summary",
]

Finding = dict[str, Any]
"""Keywords of :meth:`orthokit.reports.Claims.measure`: name, text, values, the rule, and where it comes from."""
SPECTRUM_QUANTITIES: dict[str, str] = {
    "bits": "bits per byte",
    "mp_distance": "from random",
    "above_edge": "above edge",
    "effective_rank": "effective rank",
    "exponent": "exponent",
    "with_alpha": "shown",
}
"""Quantity of :func:`~orthokit.studies.training_curves` to what a table calls it."""
_TAILS, _MUON, _QUALITY, _OURS = "arXiv 1810.01075", "arXiv 2502.16982", "arXiv 2002.06716", "our question"
# One in twenty: what is called rare.
_RARE = 0.05
_ALONG = (
    ("leave", "mp_distance", "{}: spectra leave the law of noise (mean distance, end minus start).", "greater_than"),
    (
        "above",
        "above_edge",
        "{}: more singular values stand above the edge of noise than before.",
        "greater_than",
    ),
    ("falls", "exponent", "{}: the exponent of the tail falls along training.", "less_than"),
)
_RIVALS = (
    ("bits", "bits", "{1} ends with a lower loss than {0}.", "less_than", _OURS),
    ("noise", "mp_distance", "{1} ends further from noise than {0}.", "greater_than", _TAILS),
    ("exponent", "exponent", "{1} ends with a lower exponent than {0}.", "less_than", _QUALITY),
    ("rank", "effective_rank", "{1} ends with a higher effective rank than {0}.", "greater_than", _MUON),
)
_CASES: dict[str, tuple[int, float]] = {
    "128 x 128": (128, 0.0),
    "384 x 384": (384, 0.0),
    "128 x 128, unequal rows": (128, 0.5),
}


def training_findings(trained: SpectraAlong) -> list[Finding]:
    """What is claimed of spectra along training, one number a seed.

    Args:
        trained: With two seeds at least.

    Returns:
        For each optimizer: whether spectra leave the law of noise, whether values rise above its edge, whether the
        exponent falls, whether most matrices have one that is shown at the end. Of the second optimizer against the
        first, if there are two: loss, distance from noise, exponent and effective rank at the end.

    Example:
        >>> from orthokit.studies import spectra_along_training
        >>> tiny = {"size": "0.2M", "layers": 1, "context": 8, "batch": 1, "windows": 2}
        >>> found = training_findings(spectra_along_training(seeds=[0, 1], steps=1, **tiny))
        >>> len(found), found[0]["name"], len(found[0]["values"])
        (12, 'leave-adamw', 2)
    """
    found: list[Finding] = []
    for name, quantity, text, rule in _ALONG:
        for label, values in training_changes(trained, quantity).items():
            words = {"name": f"{name}-{label.lower()}", "text": text.format(label)}
            found.append({**words, "values": values, rule: 0, "paper": _TAILS})
    for label, (_, rows) in training_curves(trained, "with_alpha").items():
        text = f"{label}: at the end most matrices have an exponent that can be shown."
        words = {"name": f"shown-{label.lower()}", "text": text, "values": [row[-1] for row in rows]}
        found.append({**words, "greater_than": 0.5, "paper": _TAILS})
    for name, quantity, text, rule, paper in _RIVALS:
        ends = {label: [row[-1] for row in rows] for label, (_, rows) in training_curves(trained, quantity).items()}
        if len(ends) == 2:
            (first, a), (second, b) = ends.items()
            gaps = [other - one for one, other in zip(a, b, strict=True)]
            words = {"name": f"{second.lower()}-{name}", "text": text.format(first, second)}
            found.append({**words, "values": gaps, rule: 0, "paper": paper})
    return found


def training_summary(trained: SpectraAlong) -> pd.DataFrame:
    """Means over seeds of all quantities, at the start and at the end.

    Args:
        trained: The trainings.

    Returns:
        By optimizer and step, the columns of :data:`SPECTRUM_QUANTITIES`.
    """
    import pandas as pd

    rows: dict[tuple[str, int], dict[str, float]] = {}
    for quantity, name in SPECTRUM_QUANTITIES.items():
        for label, (steps, values) in training_curves(trained, quantity).items():
            for place in (0, -1):
                rows.setdefault((label, steps[place]), {})[name] = float(np.mean([row[place] for row in values]))
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["optimizer", "step"])


def near_random_findings(tables: Mapping[str, Sequence[pd.DataFrame]]) -> list[Finding]:
    """Whether matrices within noise are rare in real models.

    Args:
        tables: Model to tables of :func:`~orthokit.studies.near_random`, one for each seed of the random matrices.

    Returns:
        One finding a model.
    """
    return [
        {
            "name": f"within-{model.lower()}",
            "text": f"{model}: fewer than one matrix in twenty has a spectrum within noise.",
            "values": [_mean(table["within"]) for table in of],
            "less_than": _RARE,
            "how": "seeds of the random matrices that it is compared with",
        }
        for model, of in tables.items()
    ]


def exponent_findings(looks: Mapping[str, Inspection]) -> list[Finding]:
    """Whether the exponents that real models have lie between 2 and 6.

    Args:
        looks: Model to its inspection.

    Returns:
        One finding for each model with two exponents at least; its values are one a matrix.
    """
    found: list[Finding] = []
    for model, look in looks.items():
        outside = [float(not 2 <= row["alpha"] <= 6) for row in look.rows if row["alpha"] is not None]
        if len(outside) > 1:
            text = f"{model}: of its exponents fewer than one in twenty lies outside of 2 to 6."
            words = {"name": f"range-{model.lower()}", "text": text, "values": outside, "less_than": _RARE}
            how = "one value a matrix that has an exponent; matrices of one model are not independent"
            found.append({**words, "paper": _QUALITY, "how": how})
    return found


def noise_findings(*, seeds: Sequence[int] = range(5), draws: int = 10) -> tuple[list[Finding], pd.DataFrame]:
    """What exponents matrices have that nobody trained.

    Args:
        seeds: Of the random matrices, two at least.
        draws: Matrices a seed and case.

    Returns:
        Three findings: whether a random matrix rarely has an exponent between 2 and 6, whether it is rarely shown, and
        whether that is so for rows of unequal length too. And by case the shares, as means over the seeds.

    Raises:
        OptionError: ``draws`` below 1.

    Example:
        >>> found, table = noise_findings(seeds=[0, 1], draws=2)
        >>> [finding["name"] for finding in found], float(table.loc["384 x 384", "shown"])
        (['noise-range', 'noise-shown', 'rows-shown'], 0.0)
    """
    import pandas as pd

    if draws < 1:
        raise OptionError(f"draws must be at least 1; got {draws}.")
    shares: dict[str, dict[str, list[float]]] = {}
    for case, (width, spread) in _CASES.items():
        drawn = [noise_spectra([(width, width)], draws=draws, seed=seed, row_spread=spread) for seed in seeds]
        shares[case] = {
            "from 2 to 6": [_mean(table["exponent"].between(2, 6)) for table in drawn],
            "shown": [1 - _mean(table["refused"]) for table in drawn],
        }
    asked = (
        (
            "noise-range",
            "128 x 128",
            "from 2 to 6",
            "random 128 x 128 matrices {} has an exponent from 2 to 6",
            _QUALITY,
        ),
        ("noise-shown", "128 x 128", "shown", "random 128 x 128 matrices {} has one that is shown", ""),
        ("rows-shown", "128 x 128, unequal rows", "shown", "those with unequal rows {} has one that is shown", _OURS),
    )
    found: list[Finding] = [
        {
            **{"name": name, "text": f"Of {text.format('fewer than one in twenty')}.", "values": shares[case][what]},
            **{"less_than": _RARE, "paper": paper, "how": f"{draws} matrices a seed"},
        }
        for name, case, what, text, paper in asked
    ]
    means = {case: {what: float(np.mean(values)) for what, values in of.items()} for case, of in shares.items()}
    return found, pd.DataFrame.from_dict(means, orient="index")


def naming_findings(tables: Sequence[pd.DataFrame], stored: Sequence[pd.DataFrame] = ()) -> list[Finding]:
    """Whether the method is named right from two checkpoints.

    Args:
        tables: Of :func:`~orthokit.studies.told_apart`, one a seed.
        stored: The same of rounded files; default none.

    Returns:
        One finding a method; and one for all methods together in rounded files.
    """
    rule = {"greater_than": 1 - _RARE, "paper": _OURS}
    found: list[Finding] = []
    for label in tables[0].index if tables else ():
        shares = [_share(table.loc[[label]]) for table in tables]
        text = f"More than 19 of 20 matrices that {label} trained are named right."
        found.append({"name": f"named-{str(label).split()[0].lower()}", "text": text, "values": shares, **rule})
    if stored:
        shares = [_share(table) for table in stored]
        text = "In bfloat16 more than 19 of 20 matrices are named right, over all methods."
        found.append({"name": "named-bfloat16", "text": text, "values": shares, **rule})
    return found


def checkpoint_identities(*, seed: int = 0) -> dict[str, float]:
    """What must hold exactly, of the pretrained TinyGPT.

    Args:
        seed: Of the rotation and of a short training.

    Returns:
        Sentence to the largest relative error.

    Example:
        >>> max(checkpoint_identities().values()) < 1e-5
        True
    """
    model = load_pretrained()
    found = inspect(model)
    weights = {row["name"]: model.get_parameter(row["name"]).detach().double() for row in found.rows}
    sums = [
        abs(float(np.square(sigma.astype(np.float64)).sum()) / float(weights[name].square().sum()) - 1)
        for name, sigma in found.spectra.items()
    ]
    name, W = next(iter(weights.items()))
    generator = torch.Generator().manual_seed(seed)
    turned = W @ random_orthogonal(W.shape[1], W.shape[1], generator=generator, dtype=torch.float64)
    change = inspect({name: turned}, base={name: W})[name]["spectrum_change"]
    return {
        "Squares of singular values sum to the squares of the entries.": max(sums),
        "A rotation of the inputs leaves the spectrum.": change,
        "A monitor records along training what an inspection finds.": max(monitor_differences(seed=seed).values()),
    }


def stored_ranks(*, size: int = 64, rank: int = 24, seed: int = 0) -> pd.DataFrame:
    """A matrix of known rank, stored in three types, and what an inspection says of each.

    Args:
        size: Rows and columns, ``> rank``.
        rank: Its rank, ``>= 1``.
        seed: Of the matrix.

    Returns:
        By type: ``condition``, ``rounding_floor``, ``above_floor`` and ``effective_rank``.

    Raises:
        OptionError: A rank that does not fit.

    Example:
        >>> stored_ranks(rank=20)["above_floor"].tolist()
        [20, 20, 20]
    """
    import pandas as pd

    if not 1 <= rank < size:
        raise OptionError(f"need 1 <= rank < size; got {rank} and {size}.")
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for _ in range(2))
    types = (torch.float32, torch.float16, torch.bfloat16)  # the product is exact to far below all of them
    forms = {f"{str(dtype).removeprefix('torch.')}.weight": (A @ B.mT).to(dtype) for dtype in types}
    columns = ("condition", "rounding_floor", "above_floor", "effective_rank")
    rows = {row["stored"]: {name: row[name] for name in columns} for row in inspect(forms).rows}
    return pd.DataFrame.from_dict(rows, orient="index")


def _mean(values: Any) -> float:
    return float(np.mean(np.asarray(values, dtype=np.float64)))


def _share(table: Any) -> float:
    """How many of the trained matrices are named right."""
    return float(table["named"].sum() / table["trained"].sum())
