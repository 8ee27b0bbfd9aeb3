"""The table of docs/results.md, of what scripts/bench/gpu.py leaves."""

import json

import pytest

from r2.report import gpu

FOUND = {
    "device": {"type": "cuda", "name": "A GPU", "gib": 79.2},
    "versions": {"torch": "2.14", "cuda": "13.0"},
    "commit": "0123456789abcdef",
    "smallest": False,
    "sections": {
        "agreement": {"result": {"fp32": {"logits": 1e-6, "gradient": 2e-6}, "none": {"logits": 0.0}}},
        "throughput": {"result": {"setting": "batch 256", "resnet18": {"r2": 3000.0, "timm": 2900.0}}},
        "input": {"result": {"setting": "16 workers", "cores": 16, "folder": 1000.0, "shards": 1500.0}},
        "dkm": {
            "result": {
                "weights_mib": 9.0,
                "1 bits, dim 1": {
                    "ours": {"ms": 1.0, "mib": 20.0, "weights_off": 1e-8, "gradient_off": 1e-6},
                    "coremltools": {"error": "RuntimeError: a | b"},
                },
            },
            "error": "not finished in | 60 s",
        },
        "steps": {"result": {"setting": "x", "fp32 step": {"ms": 9.0}, "LInf": {"ms": 1.0, "percent": 11.0}}},
        "resume": {
            "result": {
                "stopped": True, "two_whole_runs_are_equal": False, "resumed_equals_whole": False,
                "top1": {"first": 90.0, "second": 91.0, "resumed": 90.5},
            }
        },
        "tests": {"result": {"passed": 9, "failed": ["a"], "skipped": 1, "finished": False}, "error": "not finished"},
        "cell": {"result": {"command": "run", "wall_seconds": 60.0, "fp32": {"top1": 90.0}, "metrics": {"top1": 80}}},
    },
}  # fmt: skip


def test_the_table(tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps(FOUND))
    text = gpu.block(tmp_path)
    assert text.startswith("A GPU (79.2 GiB), torch 2.14, CUDA 13.0, commit 012345678:")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1  # what an error says makes no column
    assert "bound by decoding: shards 0.50 of the model's speed" in text
    assert "9 passed, 1 failed" in text and "incomplete: not finished" in text
    assert "| Cost of a step, LInf | adds 11.0 % of the fp32 step (1.00 ms) |" in text
    assert "ours 1.00 ms, 20 MiB, off by 1.0e-08, gradient 1.0e-06; coremltools does not run" in text
    sections = {name: found for name, found in FOUND["sections"].items() if name != "steps"}
    (tmp_path / "gpu.json").write_text(json.dumps({**FOUND, "sections": sections}))
    assert "| Cost of a step | incomplete: not measured |" in gpu.block(tmp_path)
    assert "nor do two whole runs give them" in text


@pytest.mark.parametrize("smallest", [True, None])
def test_what_measured_nothing_is_no_result(tmp_path, smallest):
    if smallest:
        (tmp_path / "gpu.json").write_text(json.dumps({**FOUND, "smallest": True}))
    page = f"before\n{gpu.MARKS[0]}\nold\n{gpu.MARKS[1]}\nafter\n"
    text = gpu.with_block(page, tmp_path)
    assert gpu.NOT_MEASURED in text and "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert gpu.with_block(text, tmp_path) == text
