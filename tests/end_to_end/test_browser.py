"""The report in a real browser: it fits a phone and a desk, and text of the data stays text."""

import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from ropo.report import write_report
from ropo.run.ledger import ledger_table

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
HOSTILE = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
# A page of another window measures the report in a frame: the report itself runs no script but its own.
FRAME = """<iframe id="frame" width="{width}" height="900" src="{url}"></iframe><pre id="found"></pre><script>
document.getElementById("frame").onload = event => {{
  const page = event.target.contentDocument, count = name => page.querySelectorAll(name).length;
  document.getElementById("found").textContent =
    ["found", page.documentElement.scrollWidth, count("script"), count("img"), count("svg"), page.title].join("|");
}};
</script>"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")]


@pytest.mark.parametrize("width", [390, 1280])
def test_report_fits_and_runs_nothing_of_the_data(width, pairs, tmp_path):
    unfit = "a" * 300  # a word that no line can break
    hostile = [
        replace(pair, prompt=f"{HOSTILE} {pair.prompt}", chosen=f"{pair.chosen} {HOSTILE}", annotator=HOSTILE, id="")
        for pair in pairs
    ]
    hostile[0] = replace(hostile[0], rejected=unfit, id="")
    margins = np.linspace(-3.0, 3.0, 20)
    ledger = ledger_table(
        hostile,
        round_number=0,
        margins=margins,
        losses=np.ones(20),
        weights=np.ones(20),
        p_flip=np.linspace(0.99, 0.01, 20),
        decisions=["drop"] * 6 + ["keep"] * 14,
        held_out_margins=margins,
    )
    rate = {"estimate": 0.3, "low": 0.2, "high": 0.4}
    worst = {"name": HOSTILE, "num_pairs": 20, "rate": 0.6, "low": 0.5, "high": 0.7}
    summary = {
        "task": "audit", "flip_rate": rate, "is_informative": True, "reason": HOSTILE, "rho": 0.3, "alpha": 5.0,
        "annotators": [worst], "command": HOSTILE,
        "scorers": [{"name": HOSTILE, "agreement": 0.6, "low": 0.5, "high": 0.7, "is_taken": True}],
    }  # fmt: skip
    checks = {row: [1.0, -1.0, float(margin)] for row, margin in enumerate(margins)}
    write_report(tmp_path / "O", ledger=ledger, summary=summary, pairs=hostile, training_log=[], checks=checks)
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width, url=(tmp_path / "O" / "report.html").as_uri()))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    done = subprocess.run(
        [str(BROWSER), *flags, "--virtual-time-budget=10000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         frame.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    found = done.stdout.split('<pre id="found">')[1].split("</pre>")[0].split("|")
    assert found[0] == "found", done.stderr[-500:]
    assert int(found[1]) <= width
    assert int(found[2]) <= 1  # at most ours
    assert found[3] == "0"
    assert int(found[4]) > 5
    assert "owned" not in found[5]
