"""Every benchmark runs to its last line, at its smallest size: what it prints there is no measurement."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from r2.paths import REPOSITORY

BENCH = REPOSITORY / "scripts" / "bench"
SMALLEST = {
    "data": "--rounds 1 --images 64 --batch 32 --workers 1",
    "dkm": "--rounds 1 --channels 16 --batch 4 --size 64 --width 0.125",
    "gpu": "--smallest --out .",
    "export": "data=fake recipe=smoke model=mbv1 model.width_mult=0.25 --stages lsq --rounds 1 --batch 2",
    "ptq": "--model mobilenet_v1 --width 0.25 --images 8 --iterations 1 2",
    "threads": "--threads 1 --seconds 0.1 --width 0.25",
    "step": "--rounds 1 --batch 2 --size 32 --model mobilenet_v1 --width 0.25",
}
if importlib.util.find_spec("coremltools") is None:  # of the extra `bench`; the training step does without
    SMALLEST["dkm"] += " --skip-layer"


def test_every_benchmark_has_a_smallest_size():
    assert set(SMALLEST) == {path.stem for path in BENCH.glob("*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_ends_and_prints_finite_numbers(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(BENCH / f"{name}.py"), *SMALLEST[name].split()],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) >= 9
    assert not re.search(r"(?<![A-Za-z])(nan|inf)x?(?![A-Za-z])", done.stdout)
    if name == "gpu":
        sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
        assert len(sections) == 8 and all("result" in found and "error" not in found for found in sections.values())


@pytest.mark.slow
def test_operations_are_counted(tmp_path):
    done = subprocess.run(
        [sys.executable, str(BENCH / "step.py"), *SMALLEST["step"].split(), "--count"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    counts = {line.split()[0]: int(line.split()[-2].replace(",", "")) for line in done.stdout.splitlines()}
    assert counts.keys() == {"fp32", "PyTorch's", "LInf", "Margin", "Kurtosis", "SoftMinMax", "EWGS", "LSQ", "PACT"}
    assert 0 < counts["fp32"] < counts["LSQ"] < counts["EWGS"]
