"""Reports on a result for people: an HTML page, and the model card in its folder."""

from eigenslice.options.reporting import ReportOptions
from eigenslice.report.page import report

__all__ = ["ReportOptions", "report"]
