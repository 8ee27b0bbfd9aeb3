"""Every stage through the real command line on made-up data: records, files, sizes."""

import functools
import itertools
import json
import os
import re
import signal

import pytest
import torch
from conftest import SMALL

from r2 import console, pack, pretrain
from r2 import record as recording
from r2.config import UserError, build
from r2.data.batches import IGNORED, Data
from r2.data.memory import Memory
from r2.dist import World
from r2.plan import check as checking
from r2.plan.cells import cells_of
from r2.recipe import Recipe
from r2.run import experiment
from r2.stages.stage import calibration_batch
from r2.store import Run
from r2.training.loop import evaluate, train

STAGES = {"fp32": 32, "ewgs": 2, "lsq": 2, "pact": 2, "dkm": 2, "none": 4, "dfq": 4, "adaround": 4}


def records(out):
    return {r["axes"]["stage"]: (p.parent, r) for p in out.glob("*/record.json") for r in [json.loads(p.read_text())]}


def check(folder, record, layers):
    """The file is there, as large as counted, and holds the model whose accuracy the record states."""
    stage, bits = record["axes"]["stage"], STAGES[record["axes"]["stage"]]
    file = folder / "model.safetensors"
    size = record["size"]
    assert size["bits_per_weight_all"] == pytest.approx(bits, rel=0.03)
    assert size["mib"] <= size["file_mib"] < size["mib"] + 0.03
    assert file.stat().st_size / 2**20 == pytest.approx(size["file_mib"], abs=1e-4)
    if stage != "fp32":
        assert len(record["sqnr_db"]) == layers and record["initial"]["images"] == record["metrics"]["images"]
    with torch.no_grad():
        assert torch.isfinite(pack.load(file)(torch.randn(2, 3, 32, 32))).all()


def test_qat_and_dkm_leave_a_record_and_a_file(r2):
    done = r2("-m", *SMALL, "model=mbv1", "stage=fp32,ewgs,lsq,pact,dkm", "reg=margin")
    assert done.returncode == 0, done.stderr
    found = records(r2.out)
    assert set(found) == {"fp32", "ewgs", "lsq", "pact", "dkm"}
    for folder, record in found.values():
        check(folder, record, 28)
    assert found["pact"][1]["fp32"] is None and found["pact"][1]["epochs"]["pretrain"] == 0  # from scratch
    assert "set recipe.epochs to" in done.stdout  # so few steps leave a 2-bit network with depthwise layers at chance
    clips = found["pact"][1]["details"]["quantizers"]
    moved = [clips["end"][name]["alpha"] != clip["alpha"] for name, clip in clips["start"].items()]
    assert len(moved) == 28 and all(moved)  # every clip has a gradient from the first step on
    for when in ("initial_soft_share", "soft_share"):
        soft = found["dkm"][1]["details"][when].values()
        assert len(soft) == 28 and 0.03 < sum(soft) / 28 < 0.5
    assert len(list(r2.out.glob("pretrained/*/model.pt"))) == 1


@pytest.mark.slow
def test_every_stage_from_three_pretrainings(r2):
    done = r2("-m", *SMALL, "model=rn18,mbv1,mbv2", f"stage={','.join(STAGES)}", timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(r2.out.glob("*/record.json"))) == 3 * len(STAGES)
    assert len(list(r2.out.glob("pretrained/*/model.pt"))) == 3
    layers = {"resnet18": 21, "mbv1-0.25": 28, "mbv2-0.25": 53, "rn18-0.25": 21}
    for path in r2.out.glob("*/record.json"):
        record = json.loads(path.read_text())
        check(path.parent, record, layers[record["axes"]["model"]])


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["stage=lsq", "stage.bits=1"], "1 bit signed is not defined"),
        (["stage=lsq", "stage.input_bits=1"], "stage.input_bits=1: the image has negative values"),
        (["stage=adaround", "stage.batches=1000"], "stage.batches=1000: there are "),
        (["~recipe.lr"], "r2.recipe.Recipe: missing a required argument: 'lr'; the config must have this key"),
        (["stage=dkm", "stage.bits=9"], "at most 8 bits"),
        (["stage=ewgs", "stage.layer_bits={fc: 8}"], "no layer fits 'fc'"),
        (["stage=ewgs", "stage.layer_bits={classifier: 80}"], "less than or equal to 32"),
    ],
)
def test_what_a_method_cannot_do_is_said_before_training(tmp_path, arguments, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        experiment(cells_of([*SMALL, "model=mbv1", f"out={tmp_path}", *arguments])[0].config, World())
    assert not list(tmp_path.glob("pretrained/*"))


def test_left_out_layers_and_bits_by_pattern(r2):
    done = r2(*SMALL, "model=mbv1", "stage=lsq", "stage.skip_first_last=true", "stage.layer_bits={features.1.*: 8}")
    assert done.returncode == 0, done.stderr
    ((folder, record),) = records(r2.out).values()
    assert record["axes"]["quantized_layers"] == "excl_first_last"
    layers = pack.compressed(pack.load(folder / "model.safetensors"))
    assert len(layers) == 26 and layers["features.1.0"].quantizer.weight_bits == 8
    assert {layer.quantizer.weight_bits for layer in layers.values()} == {2, 8}


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["recipe.batch_size=32", "recipe.accumulate=32"], "recipe: batch_size=32 leaves one image"),
        (["stage=lsq", "stage.batch_size=1"], "stage: batch_size=1 leaves one image"),
        (["stage=lsq", "data.calibration_images=1"], "data.calibration_images=1: "),
        (["recipe.batch_size=1"], "recipe: batch_size=1 leaves one image"),
        (["stage=ewgs", "stage.delta=hessian", "stage.hessian_batch_size=1"], "stage.hessian_batch_size=1: "),
    ],
)
@pytest.mark.parametrize("check", [pytest.param(True, marks=pytest.mark.slow), False])
def test_batchnorm_over_one_image_is_refused_before_training(tmp_path, capsys, arguments, expected, check):
    config = cells_of([*SMALL, "model=rn18", f"out={tmp_path}", *arguments])[0].config
    with pytest.raises(UserError) as error:
        checking.check(config) if check else experiment(config, World())
    assert expected in (capsys.readouterr().err if check else str(error.value))
    assert not list(tmp_path.glob("pretrained/*/*.pt"))


def test_the_hessian_passes_over_a_last_batch_of_one(r2):
    words = ["stage=ewgs", "stage.delta=hessian", "stage.hessian_probes=2", "stage.hessian_batch_size=16"]
    done = r2(*SMALL, "model=rn18", *words, "stage.epochs=2", "data.calibration_images=33")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "stage", ["fp32", "ewgs", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("lsq", "pact", "dkm"))]
)
def test_a_record_s_accuracy_is_its_file_s_in_any_precision(r2, stage):
    """Autocast moves values off their grids: measured in it, LSQ W3A3 recorded 1.65 points more than its file gives."""
    done = r2(*SMALL, "model=mbv1", f"stage={stage}", "recipe.precision=bf16", "reg=l2")
    assert done.returncode == 0, done.stderr
    ((folder, record),) = records(r2.out).values()
    data = build(record["config"]["data"]).to(World())
    recipe = build(record["config"]["recipe"])
    found = evaluate(pack.load(folder / "model.safetensors"), data, World(), recipe)
    assert found == record["metrics"]


def test_a_sweep_ends_with_a_table_and_every_run_with_a_picture(r2):
    done = r2("-m", *SMALL, "model=mbv1", "reg=margin,l2", "stage=fp32,dkm", env={"COLUMNS": "160"})
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("the sweep") :]
    title, header, rows = table.splitlines()[0], " ".join(table.splitlines()[2:4]), table.splitlines()[5:9]
    assert title.split(": ")[1].strip() == "data fake, model mbv1-0.25, seed 0"  # what all runs have
    for column in ("regularizer", "full", "precision", "largest", "weight", "kurtosis", "dkm", "W2d1"):
        assert column in header
    assert [row.split()[1] for row in rows[::2]] == ["margin", "l2"] and all("MiB" in row for row in rows[1::2])
    assert [line for line in done.stdout.splitlines() if line.endswith("of 4")] == [
        f"r2: {n} of 4" for n in (1, 2, 3, 4)
    ]
    pictures = [*r2.out.glob("*/weights.png"), *r2.out.glob("weights-*.png")]
    assert len(pictures) == 5 and all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_a_sweep_with_a_failed_job_compares_the_others_and_a_run_from_scratch_has_a_picture(r2):
    done = r2("-m", *SMALL, "model=mbv1", "stage=pact", "reg=l2,margin", "recipe.epochs=1", "recipe.lr=0.05,1e30")
    assert done.returncode == 2 and done.stderr.count("not finite") >= 2, done.stderr
    table = done.stdout[done.stdout.index("the sweep") :]
    assert "margin" in table and "l2" in table and len(list(r2.out.glob("*/record.json"))) == 2
    assert len(list(r2.out.glob("*/weights.png"))) == 2 and len(list(r2.out.glob("weights-*.png"))) == 1


@pytest.mark.parametrize("width", [80, 160])
def test_a_sweeps_table_shows_every_run_whatever_was_swept(capsys, monkeypatch, width):
    monkeypatch.setattr(console.console, "width", width)

    def record(*overrides, top1):
        axes = {"data": "digits", "model": "mbv2-1.0", "reg": "linf", "stage": "ewgs", "seed": 0, "weight_bits": 2,
                "act_bits": 2, "dim": None}  # fmt: skip
        words = ["reg=linf", "stage=ewgs", "threads=1", *overrides]
        weights = {"max_abs": 1.0, "kurtosis": 3.0}
        return {"axes": axes, "size": {"file_mib": None}, "metrics": {"top1": top1}, "fp32": None, "overrides": words,
                "weights_summary": weights}  # fmt: skip

    console.comparison([record("reg.weight=0.01", "stage.delta=0", top1=81.11), record("reg.weight=0.1", top1=82.22),
                        record("reg.weight=0.1", "stage.delta=0.001", top1=83.33)])  # fmt: skip
    said = capsys.readouterr().out
    for part in ("81.11 %", "82.22 %", "83.33 %", "reg.weight=0.01", "reg.weight=0.1", "delta=0.001", "delta=0"):
        assert part in said or (width == 80 and "delta" in part), said  # a heading may be folded
    assert "threads=1" not in said and "…" not in said  # all have it; nothing is cut


def test_a_micro_batch_without_an_image_adds_nothing(tmp_path):
    torch.manual_seed(0)
    model, images = torch.nn.Linear(4, 3), torch.randn(6, 4)
    labels = torch.tensor([0, 1, 2, IGNORED, IGNORED, IGNORED])
    recipe = Recipe(epochs=1, batch_size=6, lr=0.1, weight_decay=0.0, accumulate=2)

    class Halves(Data):
        num_classes, train_images, val_images = 3, 6, 3

        def train(self, batch_size, seed, epoch, start=0):
            return iter([(images, labels)])

        def val(self, batch_size):
            return iter([(images[:3], labels[:3])])

        def _contents(self):
            return iter([images.numpy()])

    expected = torch.nn.functional.cross_entropy(model(images[:3]), labels[:3]) / 2  # each half counts as much
    gradient = torch.autograd.grad(expected, model.weight)[0]
    weight = model.weight.detach().clone()
    run = Run(tmp_path, "0", World(), 0, 0.0, lambda row: None)
    train(model, Halves().to(World()), recipe, run, "phase", [torch.optim.SGD(model.parameters(), 0.1)])
    torch.testing.assert_close(weight - model.weight, 0.1 * gradient)


def test_calibration_takes_no_more_than_a_device_holds_and_no_image_that_cannot_be_decoded():
    data = build({"_target_": "r2.data.memory.fake", "train_images": 600, "calibration_images": 600}).to(World())
    assert len(calibration_batch(data, 4096, 0)) == 256 and len(calibration_batch(data, 32, 0)) == 32
    whole = next(data.calibration(32, 0))
    data._train[1][:300] = IGNORED
    kept = next(data.calibration(32, 0))[1] != IGNORED
    assert 0 < kept.sum() < 32 and torch.equal(calibration_batch(data, 32, 0), whole[0][kept])


def test_a_repeated_run_has_a_picture_of_its_own(r2):
    words = [*SMALL, "model=mbv1", "stage=pact", "reg=l2", "recipe.epochs=1"]
    assert r2(*words).returncode == 0
    (picture,) = r2.out.glob("*/weights.png")
    picture.write_bytes(b"of the run before")
    assert r2(*words).returncode == 0 and picture.read_bytes() == b"of the run before"
    assert r2(*words, "force=true").returncode == 0 and picture.read_bytes().startswith(b"\x89PNG")


def test_the_recorded_commit_is_that_of_the_beginning(tmp_path, monkeypatch):
    """What is committed while a run trains is not what made it."""
    heads = iter(["before", "after"])
    monkeypatch.setattr(recording, "commit", functools.cache(lambda: next(heads)))
    seen = []
    monkeypatch.setattr(pretrain, "pretrain", lambda *_: seen.append(recording.commit.cache_info().currsize) or 1 / 0)
    words = [*SMALL, "model=mbv1", "stage=fp32", "reg=l2", f"out={tmp_path}"]
    with pytest.raises(ZeroDivisionError):
        experiment(cells_of(words)[0].config, World())
    assert seen == [1]


@pytest.mark.parametrize("stage", ["ewgs", "dkm"])
def test_a_run_cut_in_any_phase_resumes_to_the_same_weights(stage, tmp_path, monkeypatch):
    """MobileNet-V2 has dropout, signed inputs and shortcuts, EWGS an optimizer of its own for its bounds."""
    words = [*SMALL, "model=mbv2", f"stage={stage}", "reg=margin", "data.train_images=48", "data.val_images=8"]
    words += ["recipe.epochs=2", "recipe.batch_size=16", "recipe.finetune.epochs=2", "recipe.finetune.batch_size=16"]

    def finish(folder, stop_at=None):
        steps, train = itertools.count(1), Memory.train

        def batches(self, *arguments):
            for batch in train(self, *arguments):
                if next(steps) == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        with monkeypatch.context() as patch:
            patch.setattr(Memory, "train", batches)
            record = experiment(cells_of([*words, f"out={folder}"])[0].config, World())
        return record["sha256"], record["metrics"], record["fp32"]

    expected = finish(tmp_path / "whole")
    for stop_at in (5, 4):  # in the second epoch of pretraining, then of the stage
        with pytest.raises(SystemExit):
            finish(tmp_path / "cut", stop_at)
    assert list((tmp_path / "cut").glob("*/*.ckpt")) and finish(tmp_path / "cut") == expected
