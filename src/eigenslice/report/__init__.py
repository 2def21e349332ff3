"""Reports on a result for people: an HTML page, and the model card in its folder."""

from eigenslice.options.report import ReportOptions
from eigenslice.report.page import report

__all__ = ["ReportOptions", "report"]
