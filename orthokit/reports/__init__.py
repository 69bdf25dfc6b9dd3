"""Executed notebooks, an offline HTML report, and the ledger of claims."""

from orthokit.figures.intervals import mean_interval
from orthokit.reports.claims import Claim, Ledger, decide, read_metrics, record_metrics
from orthokit.reports.inspection import inspection_page
from orthokit.reports.notebook import SIZES, Setup, setup
from orthokit.reports.reading import Claims, Reading, reading
from orthokit.reports.runner import Report, report
from orthokit.reports.sources import find_notebooks, read_source
from orthokit.reports.status import STATES, Folder, Status

__all__ = [
    "SIZES",
    "STATES",
    "Claim",
    "Claims",
    "Folder",
    "Ledger",
    "Reading",
    "Report",
    "Setup",
    "Status",
    "decide",
    "find_notebooks",
    "inspection_page",
    "mean_interval",
    "read_metrics",
    "read_source",
    "reading",
    "record_metrics",
    "report",
    "setup",
]
