"""Orthogonalising one 384 x 1536 matrix in bfloat16: how near to 1 the singular values come, in times of five steps.

Three spectra: independent Gaussian entries, singular values 1/k, and log-uniform between 1 and 1e-3. The baseline is
five steps with the coefficients of ``torch.optim.Muon``. At the end: which recipes reach the aims of mean |s - 1| on
all three within 1.35 times that cost.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.harness import Case, Options, Result, run
from orthokit.linalg import polar
from orthokit.studies.coefficients import orthogonality
from orthokit.studies.recipes import PLAIN, SPECTRA, lab_recipes, with_spectrum

__all__ = ["AIMS", "cases", "main", "reached"]

AIMS = {"gaussian": 0.003, "1/k": 0.005, "log-uniform": 0.10}
AFFORDABLE = 1.35


def text(value: float, digits: int) -> str:
    """A number with ``digits`` decimals; what has diverged with its power of ten only."""
    return f"{value:.{digits}f}" if value < 10 else f"{value:.0e}"


def cases(options: Options) -> Iterator[Case]:
    """One case a spectrum; ``--quick`` takes 48 x 96."""
    shape = (48, 96) if options.quick else (384, 1536)
    for spectrum in SPECTRA:
        X = with_spectrum(spectrum, shape, dtype=torch.bfloat16)
        exact = polar(X.float())
        found = {recipe.name: orthogonality(recipe(X), exact) for recipe in lab_recipes()}
        columns = {
            "mean |s-1|": {name: text(q["mean_error"], 4) for name, q in found.items()},
            "range": {name: f"{text(q['smallest'], 2)}-{text(q['largest'], 2)}" for name, q in found.items()},
            "from the polar factor": {name: text(q["from_polar"], 3) for name, q in found.items()},
        }
        candidates: dict[str, Callable[[], object]] = {recipe.name: partial(recipe, X) for recipe in lab_recipes()}
        title = f"{spectrum}: {shape[0]} x {shape[1]} bfloat16, aim {AIMS[spectrum]:g}"
        yield Case(title, candidates, baseline=PLAIN.name, columns=columns)


def reached(results: list[Result]) -> list[str]:
    """The recipes that meet every aim within the affordable time, cheapest first; one result a spectrum."""
    costs: dict[str, list[float]] = {}
    for aim, result in zip(AIMS.values(), results, strict=True):
        rows = result.as_json()["candidates"]
        for name, row in rows.items():
            if float(row["mean |s-1|"]) <= aim and row["median_ratio"] <= AFFORDABLE:
                costs.setdefault(name, []).append(row["median_ratio"])
    everywhere = {name: max(found) for name, found in costs.items() if len(found) == len(AIMS)}
    return [f"{name} ({cost:.2f}x)" for name, cost in sorted(everywhere.items(), key=lambda item: item[1])]


def main(arguments: list[str] | None = None) -> list[Result]:
    """Run this benchmark."""
    results = run("orthogonality", __doc__, cases, arguments)
    aims = ", ".join(f"{aim:g} ({spectrum})" for spectrum, aim in AIMS.items())
    print(f"\nmean |s-1| at most {aims} within {AFFORDABLE}x: {', '.join(reached(results)) or 'none'}")
    return results


if __name__ == "__main__":
    main()
