"""The command line: one clear line per mistake, before torch is imported; then the flow on made-up data."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from conftest import ENV, SMALL
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import open_dict

from r2 import cli
from r2.store import digest


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("reg=margn", "choose from kure, l2, l2_10x, linf, margin, smm"),
        ("modl=mbv1", "did you mean 'model'"),
        ("stage.bitz=2", "stage.bitz"),
        ("model.width_mult=0", "model.width_mult=0"),
        ("model.width_mult=-1", "greater than 0"),
        ("stage.bits=0", "stage.bits=0"),
        ("stage.bits=33", "less than or equal to 32"),
        ("recipe.epochs=abc", "valid integer"),
        ("recipe.lr=nan", "recipe.lr"),
        ("recipe.precision=fp8", "'fp32', 'bf16' or 'fp16'"),
        ("seed=-1", "seed=-1"),
        ("devices=0", "devices"),
        ("+reg.strength=3", "known are"),
        ("++model._target_=os.system", "must name something in r2"),
        ("reg=../../etc/passwd", "reg"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(r2, argument, expected):
    done = r2("stage=ewgs", argument, timeout=20)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr and not r2.out.exists()


def test_help_and_config_do_not_import_torch(tmp_path):
    code = (
        "import sys; sys.argv[1:] = ['--cfg', 'job']; from r2 import cli; cli.main('r2.run'); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=ENV)
    assert done.returncode == 0, done.stderr
    assert "width_mult" in done.stdout


def test_data_mistakes(r2, tmp_path):
    missing = r2("data=imagenet", f"data.root={tmp_path}/none", "recipe=smoke")
    assert missing.returncode == 2 and "0 class folders, not 1000" in missing.stderr
    file = tmp_path / "file"
    file.write_text("")
    blocked = r2(f"out={file}/x", *SMALL)
    assert blocked.returncode == 2 and "cannot write" in blocked.stderr
    many = r2("devices=4096", *SMALL)
    assert many.returncode == 2 and "devices=4096" in many.stderr


def test_run_record_and_repeat(r2):
    first = r2(*SMALL, "reg=margin", "stage=ewgs", "tracker=wandb", env={"WANDB_MODE": "offline"})
    assert first.returncode == 0, first.stderr
    (path,) = r2.out.glob("*/record.json")
    record = json.loads(path.read_text())
    assert record["axes"]["reg"] == "margin" and record["axes"]["weight_bits"] == 2
    assert 0 <= record["metrics"]["top1"] <= 100 and record["metrics"]["images"] == 100
    model = torch.load(path.parent / "model.pt", weights_only=True)["model"]
    assert digest(model) == record["sha256"]["final"]
    assert len(record["weights"]["pretrained"]) == 28
    assert list(path.parent.glob("wandb/offline-run-*"))
    changed = path.stat().st_mtime_ns
    again = r2(*SMALL, "reg=margin", "stage=ewgs", "tracker=csv", "checkpoint_seconds=5")
    assert "not repeated" in again.stdout and path.stat().st_mtime_ns == changed
    fp32 = r2(*SMALL, "reg=margin", "stage=fp32")
    assert "finished, not repeated" in fp32.stdout
    assert len(list(r2.out.glob("pretrained/*/model.pt"))) == 1


def test_not_finite_stops_with_the_layer(r2):
    done = r2(*SMALL, "recipe.lr=1e30", "recipe.epochs=2")
    assert done.returncode == 2
    assert "not finite at step" in done.stderr and "largest gradient is in" in done.stderr


@pytest.mark.parametrize("table, jobs", [(1, 2), (2, 60), (3, 24), (4, 24), (5, 24), (6, 8), (7, 8)])
def test_a_table_is_one_experiment(table, jobs):
    """Its cells compose and pass the check."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(cli.CONFIGS, version_base="1.3"):
        hydra = compose("config", [f"experiment=table{table}"], return_hydra_config=True).hydra
        params = [[f"{k}={v}" for v in str(values).split(",")] for k, values in hydra.sweeper.params.items()]
        cells = list(itertools.product(*params))
        assert len(cells) == jobs and hydra.mode.name == "MULTIRUN"
        dims = set()
        for cell in cells[:: 1 if len(cells) < 10 else 7]:  # a share of the long ones
            cfg = compose("config", [f"experiment=table{table}", *cell], return_hydra_config=True)
            choices = dict(cfg.hydra.runtime.choices)
            with open_dict(cfg):
                del cfg["hydra"]
            config = cli.resolve(cfg, choices, list(cell))
            dims.add((config["choices"]["reg"], config["reg"].get("dim"), config["stage"].get("dim")))
        if table == 6:
            assert dims == {("l2", None, 2), ("l2", None, 4), ("smm", 2, 2), ("smm", 4, 4)}
