"""bandwidth_analysis/page.py: what the page holds, and what a browser makes of it."""

import csv
import io
import json
import re
import shutil
import subprocess
import time
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers.run_folders import edit, write_run

from bandwidth_analysis import Run, read_run
from bandwidth_analysis.__main__ import main
from bandwidth_analysis.groups import group_runs
from bandwidth_analysis.page import answer, page
from bandwidth_analysis.page_charts import Scale
from bandwidth_analysis.records import make_records

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HARD_NAME = "</script><b>&\"'$title\u732b\x1b"


def six_runs(folder: Path) -> list[Run]:
    """Three settings of two seeds; the last one sends as float32 and has a hard name."""
    runs = []
    for name, size, mean in (("a", 10_000, 0.5), ("b", 400_000, 0.8), ("c", 4_000_000, 0.7)):
        for seed in (0, 1):
            run = read_run(write_run(folder, name, seed, bytes_up=size))
            runs.append(replace(run, mean_accuracy=mean + seed / 100))
    return [*runs[:4], *(replace(run, name=HARD_NAME) for run in runs[4:])]


class Tags(HTMLParser):
    """Counts the tags, and the attributes that a browser would follow."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href")]


def test_the_page_holds_the_answer_the_rows_and_the_settings(tmp_path):
    records = make_records(group_runs(six_runs(tmp_path)))
    text = page(records)
    tags = Tags(text)
    assert tags.links == ["data:,"] and "http://" not in text and "https://" not in text
    assert tags.tags.count("script") == 1 and tags.tags.count("figure") == 5
    assert "b" not in tags.tags, "a name is text, not HTML"
    assert answer(records) == (
        "b (80.50 %) is the most accurate, for 14.4 MB. With fewer bytes nothing beats "
        "a (50.50 %) for 12.06 MB."
    )
    [embedded] = re.findall(r'<pre id="csv">(.*?)</pre>', text, re.S)
    rows = list(csv.DictReader(io.StringIO(unescape(embedded))))
    assert [row["mb_up_mean"] for row in rows] == ["0.06", "2.4", "24"]
    assert "b (2 runs): 80.5 (80 to 81) % for 14.4 MB" in unescape(text)
    assert "b (2 runs): 25 % at round 1" in unescape(text)


def test_commands_versions_and_differences_are_in_the_page(tmp_path):
    folders = [write_run(tmp_path, name) for name in ("a", "b")]
    edit(folders[1] / "config.yaml", "resnet18", "resnet50")
    environment = json.loads((folders[0] / "environment.json").read_text())
    environment |= {"argv": ["main.py", "name=a b"], "git": {"commit": "c0ffee", "dirty": True}}
    environment |= {"versions": {"torch": "2.14"}, "gpus": ["H100"], "python": "3.11.2"}
    (folders[0] / "environment.json").write_text(json.dumps(environment))
    text = unescape(page(make_records(group_runs([read_run(folder) for folder in folders]))))
    assert "python main.py 'name=a b'" in text and "b-s0: its command is not recorded" in text
    assert "c0ffee with local changes" in text and "Python 3.11.2, torch 2.14" in text
    assert "unknown cores, H100" in text
    assert '<td>model.name</td><td>"resnet18"</td><td>"resnet50"</td>' in text


def test_a_page_of_runs_without_a_round_yet_says_so(tmp_path):
    run = read_run(write_run(tmp_path, accuracies=(), finished=False))
    text = page(make_records(group_runs([run])))
    assert "No run is finished yet." in text and "No round has been evaluated yet." in text


def test_a_long_comparison_stays_below_two_megabytes(tmp_path):
    accuracies = np.linspace(0.1, 0.9, 3000)
    run = read_run(write_run(tmp_path, accuracies=tuple(accuracies), finished=False))
    runs = [replace(run, name=f"run{place}", config={"place": place}) for place in range(40)]
    begin = time.perf_counter()
    size = len(page(make_records(group_runs(runs))).encode())
    assert size < 2e6 and time.perf_counter() - begin < 20


def test_the_command_writes_the_page_and_nothing_else(tmp_path, capsys):
    folder, file = write_run(tmp_path / "runs"), tmp_path / "page.html"
    assert main([str(folder), "--html", str(file)]) == 0
    assert file.stat().st_size < 2e6 and capsys.readouterr().out == ""
    assert not (folder / "plots").exists()
    assert main([str(folder), "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "the page cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.037), (10.2, 97), (0, 51_234)])
def test_linear_ticks_are_few_and_inside(low, high):
    ticks = Scale(low, high, 0, 100).ticks()
    assert 2 <= len(ticks) <= 7 and low <= min(ticks) and max(ticks) <= high * 1.001
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0])


def test_logarithmic_ticks_and_places():
    scale = Scale(1, 100, 0, 200, is_log=True)
    assert scale.ticks() == [1, 2, 5, 10, 20, 50, 100] and scale(10) == pytest.approx(100)
    assert Scale(0.001, 1000, 0, 1, is_log=True).ticks() == [10.0**d for d in range(-3, 4)]


# --- in a browser ---------------------------------------------------------------------------------

BEFORE = "<script>window.errors = []; onerror = (said) => { errors.push(said); };</script>"
AFTER = """<pre id="result"></pre><script>
const headings = document.querySelectorAll(".sortable th");
const names = () => [...document.querySelectorAll(".sortable tbody tr")].map(
  (row) => row.cells[0].textContent.slice(0, 3));
const orders = [];
for (const column of [7, 7, 0, 14]) {
  headings[column].firstChild.click();
  orders.push(names().join(" "));
}
const point = document.querySelector(".point circle");
point.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: 9, clientY: 9}));
document.getElementById("result").textContent = JSON.stringify({
  errors, orders, tip: document.getElementById("tip").textContent,
  requests: performance.getEntriesByType("resource").map((entry) => entry.name),
});
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium; apt-get install chromium")
def test_in_a_browser_the_table_sorts_points_speak_and_nothing_is_requested(tmp_path):
    text = page(make_records(group_runs(six_runs(tmp_path))))
    file = tmp_path / "page.html"
    file.write_text(text.replace("<body>", f"<body>{BEFORE}").replace("</body>", f"{AFTER}</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    [result] = re.findall(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)
    found = json.loads(unescape(result))
    assert found["errors"] == [] and found["requests"] == []
    # By MB up, upwards and downwards; by name; by a column that is alike in all rows.
    assert found["orders"] == ["a b </s", "</s b a", "</s a b", "</s a b"]
    assert found["tip"] == "a (2 runs): 50.5 (50 to 51) % for 12.06 MB"
