"""`fastres report`: runs beside each other in one HTML page that needs nothing else."""

from fastres.report.page import ReportConfig, render, report
from fastres.report.runs import RunRecord, read_run

__all__ = ["ReportConfig", "RunRecord", "read_run", "render", "report"]
