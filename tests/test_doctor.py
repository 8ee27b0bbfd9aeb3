"""check=true: what is said, what is a problem, and that nothing is written."""

import shutil

import pytest
import torch
from conftest import SMALL
from filelock import FileLock

from r2 import store
from r2.config import UserError
from r2.plan import check as checking
from r2.plan import step
from r2.plan.cells import cells_of


def cell(out, *words):
    return cells_of([*SMALL, f"out={out}", "stage=ewgs", *words])[0]


def problems(capsys, config):
    with pytest.raises(UserError, match="would not start"):
        checking.check(config)
    return told(capsys.readouterr().err)


def told(error):
    """The lines of stderr, but for what the plan is waiting for."""
    return [line for line in error.splitlines() if "measuring a training step" not in line]


def test_a_run_that_would_start_says_what_it_will_do(tmp_path, capsys):
    of_run = cell(tmp_path / "out")
    checking.check(of_run.config)
    said = capsys.readouterr()
    for part in ("1 x CPU", "256 training and 100 validation images", "the first batch, 64 for each",
                 "memory: training the float network at recipe.precision=fp32 takes about 0.02 GiB of each",
                 "for 64 examples at once",
                 "GiB free", "kernels are", f"missing   {of_run.name}", "1 run, 0 finished",
                 "1 missing, which needs 1 pretraining\n", "(recipe.accumulate=2 halves this)",
                 "would start"):  # fmt: skip
        assert part in said.out, part
    assert not told(said.err) and not (tmp_path / "out").exists()
    assert cell(tmp_path / "out", "check=true").name == of_run.name


@pytest.mark.parametrize("model, precision", [("rn18", "fp32"), ("mbv1", "fp32"), ("mbv2", "bf16")])
def test_memory_is_what_a_real_step_keeps(model, precision):
    (of_run,) = cells_of([*SMALL, f"model={model}", f"recipe.precision={precision}"])
    network, images, labels = step.example(of_run.config, 8, "cpu")
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.loss_of(of_run.config, network, images, labels)
    real = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)
    counted, rest = (2**30 * size for size in step.memory(of_run.config, 8))
    assert counted == pytest.approx(real, rel=0.01)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9)
    loss.backward()
    optimizer.step()
    held = [t for p in network.parameters() for t in (p, p.grad, optimizer.state[p]["momentum_buffer"])]
    assert rest == sum(t.numel() * t.element_size() for t in held)
    once, twice = (step.memory(of_run.config, n)[0] for n in (64, 128))
    assert twice / once == pytest.approx(2, rel=0.05)


def test_memory_is_of_the_precision_in_use():
    of = {p: step.memory(cells_of(["data=imagenet", "model=mbv1", f"recipe.precision={p}"])[0].config, 64)
          for p in ("fp32", "bf16", "fp16")}  # fmt: skip
    assert of["bf16"] == of["fp16"] and of["bf16"][1] == of["fp32"][1]  # weights and moments stay float32
    assert of["bf16"][0] / of["fp32"][0] == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_plan_of_another_machine_asks_nothing_of_this_one(precision, tmp_path, capsys):
    """Neither its devices nor a data folder."""
    words = ["data=imagenet", f"data.root={tmp_path}/none", "model=mbv1", "stage=dfq", f"recipe.precision={precision}"]
    words += [f"out={tmp_path / 'out'}", "check=true", "devices=4096", "recipe.batch_size=8192"]
    with pytest.raises(UserError, match="would not start: 2 problems"):
        checking.check(cells_of(words)[0].config)
    refused = capsys.readouterr().err
    assert "devices=4096: this machine has" in refused and "add images_per_second=N" in refused
    (planned,) = cells_of([*words, "images_per_second=2500"])
    checking.check(planned.config)
    said = capsys.readouterr()
    for part in ("4096 GPUs of another machine", f"recipe.precision={precision} takes", "2 examples at once",
                 "2500 images/s of one GPU as given for mbv1-1.0", "GPU-hours", "where its data and"):  # fmt: skip
        assert part in said.out, part
    assert not said.err and not (tmp_path / "out").exists()
    assert planned.name == cells_of(words)[0].name
    with pytest.raises(UserError, match="recipe: batch_size=8192 does not|would not start: 1 problem"):
        checking.check({**planned.config, "devices": 4095})


def test_every_problem_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WORLD_SIZE", "5")
    words = ["data=imagenet", f"data.root={tmp_path}", "recipe=smoke"]
    lines = problems(capsys, cell(tmp_path / "file" / "out", *words).config)
    assert len(lines) == 3 and all(line.startswith("r2: ") for line in lines)
    assert "batch_size=64 does not divide by 5 devices" in lines[0]
    assert "there is no folder" in lines[1] and "cannot write to" in lines[2]


def test_a_full_disk_is_a_problem(tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    (line,) = problems(capsys, cell(tmp_path / "out").config)
    assert "0.00 GiB are free" in line and "choose another with out=DIR" in line


def test_too_little_memory_is_a_problem_here_and_not_elsewhere(tmp_path, capsys, monkeypatch):
    of_run = cell(tmp_path / "out")
    room = sum(step.memory(of_run.config, 32))
    monkeypatch.setattr(checking, "_memory_of_each", lambda world: room)
    (line,) = problems(capsys, of_run.config)
    assert "of each device, which has" in line and "set recipe.accumulate=2 or a smaller recipe.batch_size" in line
    checking.check(cell(tmp_path / "out", "recipe.accumulate=2").config)
    assert "(recipe.accumulate=4 halves this)" in capsys.readouterr().out
    checking.check(cell(tmp_path / "out", "check=true", "images_per_second=2500").config)
    of_run.pretraining.directory.mkdir(parents=True)
    (of_run.pretraining.directory / "model.pt").touch()
    monkeypatch.setattr(checking, "_progress", lambda cell: ())
    checking.check(of_run.config)  # nothing is pretrained


def test_another_runs_damaged_record_is_no_problem(tmp_path, capsys):
    of_run = cell(tmp_path / "out")
    damaged = tmp_path / "out" / "fake_x" / "record.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text('{"schema": 1, ')
    checking.check(of_run.config)
    assert not told(capsys.readouterr().err)


def test_what_exists_is_locked_or_half_done_is_reported(tmp_path, capsys):
    of_run = cell(tmp_path)
    pretraining = of_run.pretraining.directory
    for directory, owner in ((of_run.directory, of_run.run.key), (pretraining, of_run.pretraining.key)):
        directory.mkdir(parents=True)
        state = {"format": "r2", "key": owner, "position": {"epoch": 2, "step": 7}, "w": torch.zeros(100)}
        store.save(directory / "phase.ckpt", state)
    with FileLock(pretraining / ".lock"):
        (pretraining / ".owner").write_text("process 7 on here\n")
        checking.check(of_run.config)
    said = capsys.readouterr().out
    assert said.count("phase.ckpt resumes at epoch 3, step 7") == 2
    assert "process 7 on here is working on" in said and said.count("working on") == 1
    checkpoint = of_run.directory / "phase.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-40])
    (line,) = problems(capsys, of_run.config)
    assert str(checkpoint) in line and "delete it to start again" in line
    shutil.copy(pretraining / "phase.ckpt", checkpoint)
    (line,) = problems(capsys, of_run.config)
    assert "belongs to another config" in line


def test_a_finished_run_is_reported(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    of_run = cell(tmp_path / "out")
    of_run.directory.mkdir()
    (of_run.directory / "record.json").write_text('{"schema": 0}')
    (line,) = problems(capsys, of_run.config)  # and it is not a record
    assert "not a record" in line


def test_the_command_line_ends_with_2(r2, tmp_path):
    done = r2("data=imagenet", f"data.root={tmp_path}/none", "recipe=smoke", "check=true")
    assert done.returncode == 2 and "Traceback" not in done.stderr and not r2.out.exists()
    *measuring, first, last = done.stderr.splitlines()
    assert [line.split(" of ")[0] for line in measuring] == ["r2: measuring a training step"]
    assert "there is no folder" in first and last == "r2: the run would not start: 1 problem, see above"


@pytest.mark.parametrize("elsewhere", [[], ["images_per_second=100"]])
def test_a_network_that_does_not_take_the_images_is_one_problem(tmp_path, capsys, elsewhere):
    words = ["data=fake", "recipe=smoke", "model=torchvision", "model.name=alexnet", "stage=ewgs", "check=true"]
    (config,) = (one.config for one in cells_of([*words, f"out={tmp_path / 'out'}", *elsewhere]))
    with pytest.raises(UserError, match="1 problem|would not start"):
        checking.check(config)
    (line,) = told(capsys.readouterr().err)
    assert "model.name=alexnet" in line
