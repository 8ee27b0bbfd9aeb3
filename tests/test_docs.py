"""What the pages under docs/ print works."""

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
