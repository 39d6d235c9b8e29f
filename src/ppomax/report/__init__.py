"""Reports: run directories in, one self-contained page and its numbers out.

Reads files only, never a model or a live trainer.
"""

from ppomax.report.page import write_preference_report, write_report
from ppomax.report.read import RunData, read_run, read_runs

__all__ = ["RunData", "read_run", "read_runs", "write_preference_report", "write_report"]
