"""Report: say what a run proved, as JSON for programs, as a page for people, and in the terminal."""

from finetune.report.build import build_report
from finetune.report.html import render_html
from finetune.report.terminal import print_report

__all__ = ["build_report", "print_report", "render_html"]
