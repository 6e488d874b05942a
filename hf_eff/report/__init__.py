"""What a run predicted beside what it measured, and the cards that describe methods and runs."""

from __future__ import annotations

from hf_eff.report.comparison import build_report
from hf_eff.report.run_card import render_run_card
from hf_eff.report.run_report import render_report

__all__ = ["build_report", "render_report", "render_run_card"]
