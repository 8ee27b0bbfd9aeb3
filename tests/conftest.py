import os
import subprocess
import sys

import pytest

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
