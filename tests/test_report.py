import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_claims import none
from test_tables import record, sealed

from r2 import store
from r2.record import read_all
from r2.report import claims, figures, gpu, page, tables

ROOT = Path(__file__).parents[1]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def folder(tmp_path):
    """Records of three seeds, one of them with another weight of the regularizer."""
    values = {"l2": 10, "linf": 30, "margin": 40}
    records = [none(reg, seed, top1 + seed) for seed in range(3) for reg, top1 in values.items()]
    records.append(record(command="reg.weight=0.1"))
    (tmp_path / "records").mkdir()
    for i, found in enumerate(records):
        found |= {"versions": {"torch": "2"}, "device": {"type": "cpu", "threads": 1}, "commit": "0123456789"}
        found |= {"sha256": {"pretrained": "f"}, "seconds": {}, "size": {"file_mib": 0.1, "bits_per_weight": 4.0}}
        (tmp_path / "records" / f"{i}.json").write_text(json.dumps(sealed(found)))
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "notes.md").write_text("A *finding* <script>alert(1)</script>")
    page.write(tmp_path)
    return tmp_path


class Page(HTMLParser):
    """Tags and the addresses that a page loads from."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        loads = {"src", "srcset"} | ({"href"} if tag == "link" else set())
        self.loads += [value for name, value in attributes if name in loads]


def test_the_page_stands_alone(folder):
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert not page.loads and "script" not in page.tags and "@import" not in text and "url(http" not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_the_page_shows_what_was_measured_and_how_to_repeat_it(folder):
    text = (folder / "report.html").read_text()
    assert "<td>10.00</td>" not in text and ">31.00 ± 1.00</td>" in text  # L-inf over its seeds
    assert text.count("python -m r2.run data=digits reg=linf seed=2") == 1
    assert "L-inf, weight 0.1" in text
    assert '<td class="verdict holds">holds</td>' in text and "A <em>finding</em> &lt;script&gt;" in text
    written = {p.name for p in (folder / "digits").iterdir()} | {p.name for p in folder.iterdir()}
    assert {"tables.md", "tables.csv", "tables.tex", "claims.md"} <= written


def test_only_the_repository_s_own_results_feed_its_readme(tmp_path, monkeypatch):
    """Records of anybody's runs, in a folder inside the checkout, leave the README as it is."""
    readme = ROOT / "README.md"
    before = readme.read_bytes()
    (tmp_path / "README.md").write_text(f"mine\n{page.MARKS[0]}\n{page.MARKS[1]}\n")
    for number, path in enumerate(sorted((ROOT / "results" / "records").glob("*.json"))[:4]):
        store.make_directory(tmp_path / "outputs" / "records")
        (tmp_path / "outputs" / "records" / f"{number}.json").write_bytes(path.read_bytes())
    written = page.write(tmp_path / "outputs")
    assert readme.read_bytes() == before and readme not in written
    assert (tmp_path / "README.md").read_text().startswith("mine") and len((tmp_path / "README.md").read_text()) < 120
    assert all(path.exists() and tmp_path in path.parents for path in written)


def test_a_second_rendering_changes_nothing(folder):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".png"}
    page.write(folder)
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.skipif(BROWSER is None, reason="no chromium here (apt install chromium)")
@pytest.mark.parametrize("page", ["made", "committed"])
def test_a_browser_lays_the_page_out_for_a_phone(folder, tmp_path, page):
    """Nothing but the tables' own boxes is wider than the screen, and every table has a size."""
    shown = folder / "report.html" if page == "made" else ROOT / "results" / "report.html"
    probe = (
        "<script>const d = document.documentElement, t = [...document.querySelectorAll('table')];"
        "const laid = t.every(x => x.offsetHeight > 20);"
        "document.title = [d.scrollWidth, d.clientWidth, t.length, laid].join(' ')</script>"
    )
    copy = tmp_path / "probe.html"
    copy.write_text(shown.read_text().replace("</body>", probe + "</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--window-size=500,900", "--dump-dom", copy.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    width, screen, count, laid_out = re.search(r"<title>(\d+) (\d+) (\d+) (\w+)</title>", done.stdout).groups()
    assert int(width) <= int(screen) and int(count) >= 3 and laid_out == "true"


def test_what_is_generated_is_not_stale():
    """After a change of a record, of notes or of a renderer: python -m r2.report"""
    results = ROOT / "results"
    records = read_all(results)
    for data in {r["axes"]["data"] for r in records}:
        of_data = [r for r in records if r["axes"]["data"] == data]
        for suffix, render in tables.WRITTEN.items():
            assert (results / data / f"tables.{suffix}").read_text() == render(of_data), (data, suffix)
        assert figures.stale(of_data, results / data / "weights", results / data / "figures") == []
    assert (results / "claims.md").read_text() == claims.markdown(records)
    assert (results / "report.html").read_text() == page.page(records, results)
    readme = (ROOT / "README.md").read_text()
    assert readme == page.with_block(readme, records)
    measured = (ROOT / "docs" / "results.md").read_text()
    assert measured == gpu.with_block(measured, results / "gpu")
