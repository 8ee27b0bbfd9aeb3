"""Every benchmark at its smallest size, so that the commands of the README run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BENCH = Path(__file__).parents[1] / "scripts" / "bench"
SMALL = {
    "step.py": "--batch 4 --size 32 --rounds 1 --model mobilenet_v2",
    "ptq.py": "--width 0.25 --images 16 --iterations 1 2",
    "data.py": "--rounds 1 --images 32 --batch 16",
    "dkm.py": "--rounds 1 --skip-layer",
}


@pytest.mark.parametrize("name", sorted(path.name for path in BENCH.glob("*.py")))
def test_a_benchmark_runs(name, tmp_path):
    command = [sys.executable, str(BENCH / name), *SMALL[name].split()]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stderr
    assert "CUDA" not in done.stderr and any(character.isdigit() for character in done.stdout)
