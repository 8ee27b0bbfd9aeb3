"""What a process does with the memory that a training step frees."""

import os
import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_a_step_reuses_the_memory_of_the_last(tmp_path):
    """In a process of its own: what glibc is told holds until it ends."""
    program = """
import resource, torch
from r2 import models
from r2.dist import keep_freed_memory
model, images = models.mobilenet_v2(10, 0.5), torch.randn(32, 3, 32, 32)
def new_pages(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        model(images).sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / steps
new_pages(3), print(new_pages(5)), keep_freed_memory(), new_pages(5), print(new_pages(5))
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    by_default, kept = map(float, done.stdout.split())
    assert kept < by_default / 4
