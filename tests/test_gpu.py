"""The paths that need CUDA: autocast, compiled models and NCCL, through the command line. pytest -m gpu"""

import json

import pytest
import torch
from conftest import SMALL

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("extra", [["recipe.precision=bf16"], ["recipe.precision=fp16"], ["recipe.compile=true"]])
@pytest.mark.parametrize("stage", ["ewgs", "lsq", "pact", "dkm"])
def test_stages_on_one_gpu(r2, stage, extra):
    done = r2(*SMALL, "devices=1", "reg=margin", f"stage={stage}", *extra, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = r2.out.glob("*/record.json")
    assert json.loads(path.read_text())["device"]["type"] == "cuda"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_over_nccl(r2):
    done = r2(*SMALL, "devices=2", "recipe.sync_bn=true", "reg=smm", "stage=ewgs", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = r2.out.glob("*/record.json")
    assert json.loads(path.read_text())["processes"] == 2
