import importlib.util
import os
import subprocess
import sys

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "WANDB_SILENT": "true"}
SMALL = ["data=fake", "recipe=smoke", "model.width_mult=0.25"]


@pytest.fixture
def r2(tmp_path):
    """Run `python -m r2.run` in an empty folder; returns the finished process.

    A process of its own is forked from one that has imported torch. With an `env`, which what it imports may read, it
    is started anew.
    """
    import forked

    def run(*arguments, timeout=300, env=None):
        words = ["r2.run", f"out={tmp_path / 'out'}", *arguments]
        if env is None:
            return forked.call(words, tmp_path, timeout)
        command = [sys.executable, "-m", *words]
        environment = {**ENV, **env}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout, env=environment)

    run.out = tmp_path / "out"
    return run


def pytest_configure(config):
    """Where the tests guard a change, a package of the extra `test` that is missing is an error, not a skip."""
    if os.environ.get("CI"):
        for package in ("coremltools", "onnxruntime", "onnxscript", "openvino", "pyarrow", "timm", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise pytest.UsageError(f"{package} is not installed; CI tests everything: pip install -e '.[test]'")
