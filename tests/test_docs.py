"""What the pages under docs/ print works."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECTIONS = re.split(r"^## ", (ROOT / "docs" / "extending.md").read_text(), flags=re.MULTILINE)[1:]


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS, ids=[section.partition("\n")[0] for section in SECTIONS])
def test_every_file_of_the_page_on_extending_runs(section, tmp_path):
    """In a copy of the package, as a reader adds them; the packed file is read back too."""
    for folder in ("r2", "configs", "results/paper"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    files = re.findall(r"^`(\S+)`\n\n```\w+\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    (command,) = re.findall(r"^    (python .*)$", section, flags=re.MULTILINE)
    assert files
    for name, content in files:
        (tmp_path / name).write_text(content)
    program = [sys.executable, *shlex.split(command)[1:], "model.width_mult=0.25", "threads=1"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (packed,) = tmp_path.glob("outputs/*/model.safetensors")
    read = [sys.executable, "-c", f"from r2 import pack; pack.load({str(packed)!r})"]
    done = subprocess.run(read, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_page_on_configuration_is_not_stale():
    """python scripts/configuration.py"""
    spec = importlib.util.spec_from_file_location("configuration", ROOT / "scripts" / "configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page()
    assert {path.name for path in (ROOT / "configs").iterdir() if path.is_dir() and path.name != "hydra"} < set(
        module.GROUPS
    )


def test_links_between_the_pages_lead_somewhere():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), (page.name, target)


def test_every_script_and_file_that_the_pages_name_is_there():
    names = re.compile(r"(?<![\w/])(?:scripts|configs|results|tests|docs)/[\w/.-]+\.(?:sh|py|yaml|md|html|csv)")
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        here = set(re.findall(r"^`(\S+)`$", text, flags=re.MULTILINE))  # files that the page itself shows
        if page.name != "configuration.md":  # its comments cite files of other projects
            assert [name for name in set(names.findall(text)) - here if not (ROOT / name).exists()] == [], page.name
