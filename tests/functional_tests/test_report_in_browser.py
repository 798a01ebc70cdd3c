"""The page of results as a browser shows it."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.processes import PATIENCE

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_browser_shows_pictures_and_tables_and_runs_no_name(root, tmp_path):
    from matplotlib import image

    hostile = "<img src=x onerror=\"document.title='run'\">"
    rows = [
        {"metric": "perplexity", "name": name, "context_length": n, "perplexity": value + n}
        for n in (64, 128)
        for name, value in (("base", 9.5), (hostile, 99.5))
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = [sys.executable, root / "tools/report.py", tmp_path / "results.jsonl"]
    subprocess.run([*report, "--output", tmp_path / "report.html"], check=True, timeout=PATIENCE)

    def browse(*flags):
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *flags]
        command += [f"--user-data-dir={tmp_path / 'profile'}", str(tmp_path / "report.html")]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, check=True
        ).stdout

    shown = browse("--dump-dom")
    assert "<title>Results</title>" in shown and "<td>73.50</td>" in shown
    browse(f"--screenshot={tmp_path / 'page.png'}", "--window-size=1000,1400")
    pixels = image.imread(tmp_path / "page.png")[..., :3]
    blue = abs(pixels - [0x1F / 255, 0x77 / 255, 0xB4 / 255]).max(-1) < 0.02  # the first curve's
    assert blue.sum() > 100
