"""One self-contained HTML page from a run's records. It reads records, never models."""

from topd.report.page import write_report
from topd.report.reading import ReportError

__all__ = ["ReportError", "write_report"]
