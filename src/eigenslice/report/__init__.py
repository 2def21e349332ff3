"""What people read about a result: an HTML page, and the model card in its folder."""

from eigenslice.report.page import ReportOptions, report

__all__ = ["ReportOptions", "report"]
