"""Studies that need many seeds: run once with ``orthokit study``, kept under ``evidence/``, shown by the notebooks."""

from __future__ import annotations

from pathlib import Path

from orthokit.errors import unknown_name
from orthokit.studies._engine import Study, evidence_root, load_evidence, run_study
from orthokit.studies.energy import energies, energy_changes, spread_on_sphere
from orthokit.studies.pipelines import (
    ORDERS,
    PIPELINES,
    at_rates,
    best_lr,
    compare_optimizers,
    curves,
    final_values,
    race,
    rate_curves,
    train_pipeline,
)
from orthokit.studies.probe import (
    Probe,
    alignments,
    measure_probe,
    pipeline_lead,
    polar_alignment,
    probe_along_training,
)
from orthokit.studies.synthetic import (
    BETAS,
    PUBLISHED_RANK_3,
    SYNTHETIC_GAP,
    compare_with_published,
    measure_gap,
    side_by_side,
)

__all__ = [
    "BETAS",
    "ORDERS",
    "PUBLISHED_RANK_3",
    "STUDIES",
    "Probe",
    "Study",
    "alignments",
    "at_rates",
    "best_lr",
    "compare_optimizers",
    "compare_with_published",
    "curves",
    "energies",
    "energy_changes",
    "evidence_root",
    "final_values",
    "load_evidence",
    "measure_gap",
    "measure_probe",
    "names",
    "pipeline_lead",
    "polar_alignment",
    "probe_along_training",
    "race",
    "rate_curves",
    "run",
    "side_by_side",
    "spread_on_sphere",
    "train_pipeline",
]

STUDIES: dict[str, Study] = {study.name: study for study in (PIPELINES, SYNTHETIC_GAP)}


def names() -> list[str]:
    """The studies that :func:`run` knows.

    Example:
        >>> names()
        ['pipelines', 'synthetic_gap']
    """
    return sorted(STUDIES)


def run(
    name: str,
    *,
    out: str | Path | None = None,
    jobs: int = 1,
    seeds: int | None = None,
    size: str = "full",
    fresh: bool = False,
    progress: bool = True,
) -> Path:
    """Make a study by name and record it; see :func:`orthokit.studies._engine.run_study` for the options.

    Args:
        name: One of :func:`names`.
        out: Folder of evidence; default the checkout's.
        jobs: Worker processes, ``>= 1``.
        seeds: Number of seeds, ``>= 2``; default the study's own.
        size: ``"full"`` or ``"smoke"``.
        fresh: Start anew instead of going on with an interrupted study.
        progress: Show a progress line.

    Returns:
        The folder with ``results.csv`` and ``study.json``.

    Raises:
        UnknownNameError: No such study or size.
        OptionError: A number out of range.
        ReportError: An interrupted study was left by another version of the code.
    """
    if name not in STUDIES:
        raise unknown_name("study", name, STUDIES)
    return run_study(STUDIES[name], out=out, jobs=jobs, seeds=seeds, size=size, fresh=fresh, progress=progress)
