"""The command line: one clear line per mistake, before torch is imported; then the flow on made-up data."""

import json
import os
import pty
import re
import subprocess
import sys

import forked
import pytest
import torch
from conftest import ENV, SMALL

from r2 import compose
from r2.store import digest

# As typed after `stage=ewgs`; every one is refused before torch is imported.
MISTAKES = {
    "reg=margn": "did you mean 'margin'? choose from kure, l2, l2_10x, linf, margin, smm",
    "model.weights=no.pth": "model.weights=no.pth: cannot be read (No such file or directory); it is a file",
    "model=mbv1 model.weights=torchvision": "it has none of mobilenet_v1, only of resnet18 and mobilenet_v2",
    "model.weights=hf_hub:owner": "is hf_hub:OWNER/NAME/FILE",
    "model.reset_head=true": "model.reset_head=true: has no effect without model.weights; add model.weights=FILE",
    "model.finetune=3": "model.finetune=3: Input should be a valid boolean",
    "model.weight=a.pth": "did you mean 'model.weights'",
    "modl=mbv1": "did you mean 'model'",
    "stage.bitz=2": "unknown key 'stage.bitz': did you mean 'stage.bits'",
    "model.width_mult=0": "model.width_mult=0",
    "model.width_mult=-1": "greater than 0",
    "stage.bits=0": "stage.bits=0",
    "stage.bits=33": "less than or equal to 32",
    "stage.bits=2.5": "stage.bits=2.5: Input should be a valid integer",
    "stage.delta=-1": "greater than or equal to 0, or: Input should be 'hessian'",
    "reg=linf reg.weight=nan": "reg.weight=nan: Input should be a finite number",
    "reg=linf reg.weight=-0.1": "reg.weight=-0.1: Input should be greater than or equal to 0",
    "reg=linf reg.wieght=1": "did you mean 'reg.weight'",
    "reg=linf reg.dim=0": "reg.dim=0",
    "recipe.epochs=abc": "valid integer",
    "recipe.epochs=3.0": "valid integer",
    "recipe.lr=nan": "recipe.lr",
    "recipe.precision=fp8": "'fp32', 'bf16' or 'fp16'",
    "seed=-1": "seed=-1",
    "seed=true": "seed=True: Input should be a valid integer",
    "seed=18446744073709551616": "less than 9223372036854775808",
    "images_per_second=2500": "images_per_second=2500: only a plan uses it; add check=true",
    "check=true images_per_second=0": "images_per_second=0: Input should be greater than 0",
    "devices=0": "devices=0: Input should be 'auto', or: Input should be greater than or equal to 1",
    "out=": "out=''",
    "data=null": "must be a string",
    "+reg.strength=3": "known are",
    "+model._target_=os.system": "model._target_",
    "++model._target_=os.system": "must name something in r2",
    "+hydra.callbacks.x._target_=shutil.rmtree": "hydra's own _target_",
    "reg=../../etc/passwd": "unknown reg '../../etc/passwd': choose from",
    "data=imagenet ++data.root=${oc.env:SECRET}": "only R2_DATA is read from the environment",
    "stage=[ewgs,lsq]": "stage",
    "model.width_mult=${nope}": "'nope' not found",
    "recipe.lr={": "no viable alternative",
    "out=runs/lr=0.1": "is quoted: \"out='runs/lr=0.1'\"",
    "out=a;b": "is quoted",
    "out=a\nb": "out=a\\nb: Hydra does not read this; a text with special characters is quoted: $'out=\\'a\\012b\\''",
    "out=caf\udce9": "out=caf\\udce9: Hydra does not read this; a text with special characters is quoted: $'out=",
    "reg=l2,margin": "r2: reg=l2,margin: several values make a sweep: add -m\n",
    "recipe.lr=choice(0.1,0.2)": "recipe.lr=choice(0.1,0.2): several values make a sweep: add -m",
    "out=runs/a,b": "add -m; a text with special characters is quoted: \"out='runs/a,b'\"",
    "--stage ewgs": "r2: --stage ewgs: write stage=ewgs\n",
    "--stage=ewgs": "r2: --stage=ewgs: write stage=ewgs\n",
    "--check reg=l2": "r2: --check: write check=true\n",
    "-seed 1": "r2: -seed 1: write seed=1\n",
    "--bits 2": "r2: --bits 2: write bits=2\n",
    "reg margin": "r2: reg: write reg=margin\n",
    "stage.bits": "r2: stage.bits: write stage.bits=VALUE\n",
    "margin": "r2: margin: expected key=value, such as reg=margin\n",
    "reg=margin,": "r2: reg=margin,: ends in a comma\n",
    "--config-dir nowhere": "--config-dir nowhere: there is no such folder",
    "--config-name mine": "--config-name: r2 has its own config; put options in DIR/<group>/<name>.yaml",
    "--config-path=conf": "--config-path: r2 has its own config; put options in DIR/<group>/<name>.yaml",
}
TRY = """
import json, os, sys
import r2.run
from r2 import cli

class NoTorch:
    def find_spec(self, name, *rest):
        assert name != "torch", "torch is imported"

sys.meta_path.insert(0, NoTorch())
for number, words in enumerate(json.loads(sys.argv[1])):
    if os.fork() == 0:
        os.dup2(os.open(f"{number}.told", os.O_CREAT | os.O_WRONLY), 2)
        sys.argv[1:] = ["out=out", "stage=ewgs", *words]
        cli.main(r2.run.start, r2.run.ready, r2.run.compare)
    with open(f"{number}.code", "w") as file:
        print(os.waitstatus_to_exitcode(os.wait()[1]), file=file)
"""


CHECK = ["data=fake", "model=mbv1", "model.width_mult=0.25", "check=true"]


@pytest.mark.parametrize(
    "words",
    [["r2.run", "--help"], ["r2.run", "--cfg", "job"], ["r2.reproduce", "--help"], ["r2.run", *CHECK],
     ["r2.reproduce", "table=3", *CHECK], ["r2.run", *SMALL, "model=mbv1"],
     ["r2.run", "-m", *SMALL, "model=mbv1,mbv2"]],
    ids=" ".join,
)  # fmt: skip
def test_a_reader_that_goes_away_is_no_error(words, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, env=ENV)
    os.close(writer)
    assert done.returncode == 0 and not {"Error", "Traceback"} & set(done.stderr.split()), done.stderr


def test_on_a_terminal_every_epoch_leaves_its_line_and_nothing_warns(tmp_path):
    reader, terminal = pty.openpty()
    command = [sys.executable, "-m", "r2.run", *SMALL, "model=mbv1", "recipe.epochs=2"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=terminal, stderr=terminal, env={**ENV, "TERM": "xterm"})
    os.close(terminal)
    said = b""
    while True:
        try:
            said += os.read(reader, 4096)
        except OSError:  # the other end has gone
            break
    os.close(reader)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode()).splitlines()
    assert process.wait(60) == 0, said
    for epoch in ("epoch 1/2", "epoch 2/2"):
        assert any(line.startswith("pretrain: ") and epoch in line and "val top-1" in line for line in lines), lines
    assert not any("warn" in line.lower() for line in lines), lines


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Exit code and stderr of each mistake, and what lay in the working directory then: one interpreter forks for all,
    because most of the time would go into starting it.
    """
    folder = tmp_path_factory.mktemp("mistakes")
    command = [sys.executable, "-c", TRY, json.dumps([words.split(" ") for words in MISTAKES])]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**ENV, "SECRET": "s3cr3t"})
    assert done.returncode == 0, done.stderr
    assert {path.suffix for path in folder.iterdir()} == {".told", ".code"}  # nothing else was written
    read = [(int((folder / f"{i}.code").read_text()), (folder / f"{i}.told").read_text()) for i in range(len(MISTAKES))]
    return dict(zip(MISTAKES, read, strict=True))


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_without_torch_and_nothing_is_written(told, words):
    code, error = told[words]
    assert code == 2 and MISTAKES[words] in error and len(error.splitlines()) == 1, error
    assert error.startswith("r2: ") and "s3cr3t" not in error


def test_a_mistake_ends_the_program_with_2(r2):
    done = r2("reg=margn", env={})
    assert done.returncode == 2 and done.stderr.startswith("r2: unknown reg 'margn'") and not r2.out.exists()


def test_help_and_config_do_not_import_torch(tmp_path):
    code = (
        "import sys; sys.argv[1:] = ['--cfg', 'job']; from r2 import cli, run; "
        "cli.main(run.start, run.ready, run.compare); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=ENV)
    assert done.returncode == 0, done.stderr
    assert "width_mult" in done.stdout


def test_data_mistakes(r2, tmp_path):
    missing = r2("data=imagenet", f"data.root={tmp_path}/none", "recipe=smoke")
    assert missing.returncode == 2 and "there is no folder" in missing.stderr
    file = tmp_path / "file"
    file.write_text("")
    blocked = r2(f"out={file}/x", *SMALL)
    assert blocked.returncode == 2 and "cannot write" in blocked.stderr
    many = r2("devices=4096", *SMALL)
    assert many.returncode == 2 and "devices=4096" in many.stderr


def test_run_record_and_repeat(r2):
    narrow = {"WANDB_MODE": "offline", "COLUMNS": "40"}
    first = r2(*SMALL, "reg=margin", "stage=ewgs", "tracker=wandb", env=narrow)
    assert first.returncode == 0, first.stderr
    (path,) = r2.out.glob("*/record.json")
    assert {str(path), str(path.with_name("model.safetensors"))} <= set(first.stdout.splitlines())  # no path is broken
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


@pytest.mark.parametrize("keys", ["recipe", "stage"])
def test_not_finite_stops_with_the_layer_and_the_keys_of_its_phase(r2, keys):
    of_phase = {"recipe": ["recipe.epochs=2"], "stage": ["stage=dkm", "stage.epochs=2"]}[keys]
    done = r2(*SMALL, *of_phase, f"{keys}.lr=1e30")
    assert done.returncode == 2
    assert "not finite at step" in done.stderr and "largest gradient is in" in done.stderr
    assert f"Lower {keys}.lr, or set a smaller {keys}.clip_norm" in done.stderr


def test_a_fixed_key_of_a_swept_group_is_an_axis():
    words = ["stage=dfq,adaround", "stage.granularity=channel", "stage.bits=2,4", "reg=l2", "reg.factor=2", "seed=1"]
    assert compose.sweep_words(words) == ["stage=dfq,adaround", "stage.granularity=choice(channel)", *words[2:]]


@pytest.mark.parametrize(
    "words, expected",
    [
        (["reg=l2,linf", "seed=0,-1"], "seed=-1"),
        (["stage=ewgs,lsq", "stage.bits=2,1"], "lsq at 1 bit signed"),
        (["reg=l2,linf", "reg.weight=0.1"], "unknown key 'reg.weight'"),
        (["experiment=table3", "model.width_mult=0.25,0"], "model.width_mult=0"),
        (["reg=l2,linf", "recipe.lr=choice(0.1,x)"], "recipe.lr='x'"),
    ],
)
def test_every_job_of_a_sweep_is_checked_before_the_first(r2, words, expected):
    done = r2("-m", "data=fake", *words, timeout=60)
    assert done.returncode == 2 and not r2.out.exists()
    assert expected in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_swept_group_takes_a_key_that_the_default_lacks(r2):
    done = r2("-m", *SMALL, "stage=none,dfq", "stage.percentile=200")
    assert "stage.percentile=200" in done.stderr and "unknown" not in done.stderr


SWEEPS = pytest.mark.parametrize(
    "words",
    [
        ["r2.run", "-m", "experiment=table3"],
        ["r2.run", "experiment=table3"],
        ["r2.reproduce", "table=3", "seeds=0,1,2"],
    ],
)


@SWEEPS
def test_a_folder_that_cannot_be_written_and_a_missing_extra_are_met_once(words, tmp_path):
    dali = ["data=imagenet_dali", f"data.root={tmp_path}", "out=out"]
    for missing, said in ((["data=fake", "out=/dev/null/x"], "cannot write to /dev/null"), (dali, "is not installed")):
        done = forked.call([*words, *missing], tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
        assert not list(tmp_path.iterdir())


@SWEEPS
def test_missing_data_is_met_once_and_leaves_nothing(words, tmp_path):
    """Met run by run, it would be told 24 to 72 times, and leave as many folders."""
    done = forked.call([*words, "data=imagenet", f"data.root={tmp_path / 'none'}", "out=out"], tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "data.root=" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_pipe_of_the_run_s_own_that_breaks_is_a_failure(tmp_path):
    code = (
        "import sys, r2.run; from r2 import cli\n"
        "def start(config): raise BrokenPipeError('of a worker')\n"
        "sys.argv[1:] = ['data=fake']; cli.main(start, r2.run.ready, r2.run.compare)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=ENV)
    assert done.returncode == 1 and "of a worker" in done.stderr
