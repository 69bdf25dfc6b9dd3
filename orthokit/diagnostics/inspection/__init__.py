"""A look at a whole model: every matrix measured, alone or against the model that it was trained from."""

from orthokit.diagnostics.inspection.columns import COLUMNS, GROUPS, Column
from orthokit.diagnostics.inspection.result import Inspection, InspectionProgress
from orthokit.diagnostics.inspection.run import inspect

__all__ = ["COLUMNS", "GROUPS", "Column", "Inspection", "InspectionProgress", "inspect"]
