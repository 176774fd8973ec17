"""What a run found and did, as a page that a person can read: report.html, report.md and report.json.

In: ledger, summary, pairs and training log of a run. Out: three files from one dict of plain values.

The way: `tables` (numbers and, from `texts`, `biases` and `sentences`, the rest) -> `plots` (SVG strings) -> `html`
(files).
"""

from ropo.report.html import write_report

__all__ = ["write_report"]
