"""The recorded studies by name, and how one is made."""

from __future__ import annotations

from pathlib import Path

from orthokit.errors import unknown_name
from orthokit.studies._engine import Study, run_study
from orthokit.studies.adapter_study import ADAPTERS
from orthokit.studies.arena_study import ARENA
from orthokit.studies.continual import CONTINUAL
from orthokit.studies.merging_study import MERGING
from orthokit.studies.pion import PION_DRIFT
from orthokit.studies.pipelines import PIPELINES
from orthokit.studies.poet import POET_STUDY
from orthokit.studies.race_study import RACE
from orthokit.studies.representation_study import REPRESENTATION
from orthokit.studies.synthetic import SYNTHETIC_GAP

__all__ = ["STUDIES", "names", "run"]

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        ADAPTERS,
        ARENA,
        CONTINUAL,
        MERGING,
        PION_DRIFT,
        PIPELINES,
        POET_STUDY,
        RACE,
        REPRESENTATION,
        SYNTHETIC_GAP,
    )
}
"""Every study that can be recorded, by name."""


def names() -> list[str]:
    """The studies that :func:`run` knows.

    Example:
        >>> names()  # doctest: +ELLIPSIS
        ['adapters', 'arena', 'continual', 'merging', 'pion_drift', 'pipelines', 'poet_drift', 'race', ...]
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
