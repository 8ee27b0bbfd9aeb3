"""What a record and a plan print runs again: odd values, a home directory, options of one's own."""

import itertools
import json
import os
import shlex
import subprocess
import sys

import forked
import hydra
import pytest
from conftest import ENV
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from r2 import compose, pack, record, reproduce
from r2.config import UserError
from r2.plan.cells import cells, cells_of

AWKWARD = st.text("aZ09 .,;:=~/\\'\"()[]{}<>|&!?#*+-_$%^@`\té\n\r\x7f\u2028\u0301日🙂\udce9\udcff", min_size=1)


def once_more(config):
    """The config of what a run's command says, as bash reads it."""
    assert record.command(config).isprintable()  # on one line, in UTF-8
    read = subprocess.check_output(["bash", "-c", f"printf '%s\\0' {record.command(config)}"])
    words = os.fsdecode(read).split("\0")[:-1]
    assert words[:3] == ["python", "-m", "r2.run"]
    return cells_of(words[3:])[0].config


@settings(max_examples=40, deadline=None)
@given(AWKWARD)
@example("/data/Image (2012)")
@example("a=b,c")
@example("true")
@example("1e-3")
@example("null")
@example("a\\")
@example('it\'s "so"')
@example("${seed}")
@example("\\${seed}\\")
@example("\u2028")
@example(os.fsdecode(b"it's caf\xe9, ${x}\n"))
def test_a_printed_command_is_the_same_run(text):
    with hydra.initialize_config_dir(str(compose.CONFIGS), version_base="1.3"):
        config = compose.composed(["data=cifar10", f"data.root={compose._word(text)}"])
    assert config["data"]["root"] == text
    assert once_more(config)["data"]["root"] == text


@pytest.mark.parametrize("bits", ["{features.1?.*: 4}", "{'a b': 8, c\\:d: 4}", "{a\\ \\(b\\): 8, c\\:d\\=\\,: 4}"])
def test_keys_in_braces_come_back(bits):
    try:
        (cell,) = cells_of(["stage=ewgs", f"stage.layer_bits={bits}"])
    except compose.COMPOSE_ERRORS:
        assert "'" in bits  # Hydra takes no quotes there
        return
    assert once_more(cell.config)["stage"]["layer_bits"] == cell.config["stage"]["layer_bits"]


def test_a_home_directory_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/a (b)")
    assert compose.words_of(["out=~/runs", "-m", "a=b~"]) == ["-m", "out='/home/a (b)/runs'", "a=b~"]


def test_folders_of_any_name_and_the_record_s_command_finds_its_run(r2, tmp_path):
    name = os.fsdecode(b'a, "b" it\'s=$HOME ${seed} {x}\n \xc3\xa9 caf\xe9 [z] #%d ~\\ ')
    data, out = tmp_path / f"data{name}", tmp_path / f"out{name}"
    for split, label in itertools.product(("train", "val"), range(10)):
        (data / split / str(label)).mkdir(parents=True)
        for image in range(2):
            Image.new("RGB", (40, 40), (25 * label, 0, 0)).save(data / split / str(label) / f"{image}.png")
    of_out = f"out={compose._word(str(out))}"
    words = ["data=imagenette", f"data.root={compose._word(str(data))}", "data.image_size=32", "data.workers=1"]
    done = r2(*words, of_out, "recipe=smoke", "recipe.batch_size=10", "model.width_mult=0.25", "threads=1")
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*/record.json")
    found = json.loads(path.read_text())
    assert found["config"]["data"]["root"] == str(data) and not r2.out.exists()
    assert len(pack.compressed(pack.load(path.with_name("model.safetensors")))) == 0
    python = found["command"].replace("python", shlex.quote(sys.executable), 1)
    again = ["bash", "-c", f"{python} {record.shell_word(of_out)}"]
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=ENV)
    assert done.returncode == 0 and "finished before, not repeated" in done.stdout, done.stderr
    assert [path] == list(out.glob("*/record.json"))


def test_options_of_ones_own_are_in_the_command_and_in_a_plan(tmp_path, r2):
    mine = tmp_path / "my (own)" / "recipe" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    text = (compose.CONFIGS / "recipe" / "smoke.yaml").read_text()
    mine.write_text(text.replace("lr: 0.05", "lr: 0.02"))
    words = ["--config-dir", str(mine.parents[1]), "data=fake", "recipe=mine", "model.width_mult=0.25", "reg=l2"]
    (cell,) = cells_of(compose.words_of(words))
    assert cell.config["recipe"]["lr"] == 0.02 and once_more(cell.config)["recipe"]["lr"] == 0.02
    (planned,) = cells(["table3"], reproduce.read(["table=3", "model=mbv1", *words]).overrides)
    assert planned.pretraining == cell.pretraining
    done = r2(*words, "stage=fp32", "threads=1")
    assert done.returncode == 0, done.stderr
    (path,) = r2.out.glob("*/record.json")
    assert json.loads(path.read_text())["overrides"][0].startswith("hydra.searchpath=")
    with pytest.raises(UserError, match="--config-dir nowhere: there is no such folder"):
        compose.words_of(["--config-dir=nowhere"])


def test_flags_and_an_experiment_of_ones_own_beside_a_folder_of_options(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "one.yaml").write_text("# @package _global_\nseed: 3\n")
    (tmp_path / "experiment" / "two.yaml").write_text(
        "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '3,4'}}}\n"
    )
    words = [compose.words_of(["--config-dir", str(tmp_path), f"experiment={name}"]) for name in ("one", "two")]
    assert [compose.sweeps(each) for each in words] == [False, True]
    assert [config["seed"] for config in compose.check_sweep(words[1])] == [3, 4]
    for flags in (["--cfg", "job"], ["--cfg=job"], ["-c", "job", "--resolve"]):
        done = forked.call(["r2.run", "--config-dir", str(tmp_path), *flags, "experiment=one", "model=mbv2"], tmp_path)
        assert done.returncode == 0 and "seed: 3" in done.stdout and "mobilenet_v2" in done.stdout, done.stderr
