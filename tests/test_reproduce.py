import itertools
import json
import re
import statistics

import forked
import pytest
import torch
from conftest import SMALL
from hydra import initialize_config_dir

from r2 import compose, reproduce
from r2.config import UserError
from r2.paths import RESULTS
from r2.plan import cells as planned
from r2.plan import cost, step
from r2.plan.speeds import Given, Speeds, post_training
from r2.report import tables
from r2.report.tables import FP32, Column, paper

TINY = [*SMALL, "model=mbv1", "data.train_images=64", "data.val_images=50", "recipe.batch_size=32"]


def program(tmp_path, *arguments, timeout=300):
    return forked.call(["r2.reproduce", f"out={tmp_path / 'out'}", *arguments], tmp_path, timeout)


def test_a_planned_run_and_its_command_are_the_same_run():
    cells = planned.cells(["table6"], ["data=fake", "model=mbv1", "reg=l2", "model.width_mult=0.25", "seed=0,1"])
    assert [(c.axes["weight_bits"], c.axes["dim"], c.axes["seed"]) for c in cells] == [
        (2, 2, 0), (2, 2, 1), (4, 4, 0), (4, 4, 1),
    ]  # fmt: skip
    assert len({c.name for c in cells}) == 4 and len({c.pretraining for c in cells}) == 2  # one per seed
    for cell in cells:
        (again,) = planned.cells_of(cell.config["overrides"])
        assert again.name == cell.name and "experiment" not in " ".join(cell.config["overrides"])


@pytest.mark.parametrize("number", [*(pytest.param(n, marks=pytest.mark.slow) for n in "12357"), "4", "6"])
def test_every_table_of_the_paper_is_planned_whole(number):
    cells = planned.cells([f"table{number}"], ["data=imagenet"])
    places = {((c.axes["model"], c.axes["reg"]), Column(*[c.axes.get(f) for f in Column._fields])) for c in cells}
    assert places == {key for key in paper(number) if key[1] != FP32} and len(places) == len(cells)


def test_resnet18_without_a_regularizer_is_torchvisions_on_imagenet_as_in_the_paper():
    """Its row belongs to the paper's protocol, costs no pretraining, and its command alone is the same run."""
    words = ["model=rn18", "reg=l2,linf", "stage.bits=2"]
    of_imagenet = planned.cells(["table4", "table5", "table6"], ["data=imagenet", *words])
    for cell in of_imagenet:
        (again,) = planned.cells_of(cell.config["overrides"])
        assert again == cell
        given = cell.config["weights"]
        assert (given and given["source"]) == ("torchvision" if cell.axes["reg"] == "l2" else None)
        found = {**cell.config, "config": cell.config, "axes": cell.axes, "train_images": 1_281_167}
        assert tables.protocol({**found, "metrics": {"images": 50_000}}).full
    plan = "\n".join(cost.describe(of_imagenet, None, Speeds([], "cpu")))
    assert "no pretraining imagenet resnet18 l2 seed 0: from torchvision as it is" in plan
    assert (
        f"{len(of_imagenet)} runs" in plan and "which need 2 pretrainings" in plan
    )  # l-inf's, over weights and vectors
    for other in (["data=imagenet", "model.width_mult=0.25"], ["data=fake"], ["data=imagenet", "model.weights=null"]):
        (cell,) = planned.cells(["table5"], [*words, *other, "reg=l2"])
        assert cell.config["weights"] is None and "weights" not in " ".join(cell.config["overrides"])
    found = {**cell.config, "config": cell.config, "axes": cell.axes, "train_images": 1_281_167}
    assert tables.protocol({**found, "metrics": {"images": 50_000}}).changed == ("model.weights=null",)


def test_the_committed_records_are_still_the_runs_of_their_commands():
    """Those of the study as configs/ has it now; one of each regularizer and stage."""
    known = cost.known_records([RESULTS / "records"])
    study = [record for record in known if tables.protocol(record) == tables.main_study(known)]
    found = {(record["axes"]["reg"], record["axes"]["stage"]): record for record in study}
    for record in found.values():
        (cell,) = planned.cells_of(record["overrides"])
        assert cell.name == record["name"]


def test_table_7_keeps_its_data_among_the_others():
    cells = planned.cells(["table1", "table7"], ["data=imagenet", "recipe.epochs=3", "reg=linf"])
    assert {c.axes["data"]: c.config["recipe"]["epochs"] for c in cells} == {"imagenet": 3, "qnli": 10}


@pytest.mark.parametrize(
    "words, told",
    [
        (["plan=true"], "nothing asked for"),
        (["table=9"], "table9"),
        (["table=2", "plan=maybe"], "plan=maybe"),
        (["table=2", "jobs=0"], "jobs=0"),
        (["table=2", "images_per_second=2500"], "add plan=true"),
        (["table=2", "images_per_second=fast", "plan=true"], "images_per_second=fast"),
        (["table=2", "images_per_second=5,6", "plan=true"], "images_per_second=5,6: must be a number above 0, or"),
        (["table=2", "images_per_second=mbv3:5", "plan=true"], "mbv3:5: the plan's networks are mbv1-0.25, mbv1-1.0, "),
        (["table=2", "images_per_second=mbv1-1.0:5", "plan=true"], "says nothing of mbv2-1.0; add"),
        (["table=6,7", "images_per_second=5", "plan=true"], "says nothing of mobilebert; add ,mobilebert:N"),
        (["table=2", "devices=4096", "plan=true"], "add images_per_second=N"),
        (["table=2", "reg=l3"], "l3"),
        (["table=2", "recipe.epoch=3"], "recipe.epochs"),
        (["tabel=2"], "unknown key 'tabel': did you mean 'table'? known are"),
        (["table=2", "record=kept"], "did you mean 'records'?"),
        (["table=3", "bits=3"], "did you mean 'stage.bits'?"),
        (["table=2", "seeds=a"], "seed=a"),
        (["table=2", f"seeds={2**63}"], "below 2^63"),
        (["nonsense"], "key=value"),
    ],
)
def test_a_mistake_is_one_line(words, told, capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and told in error and error.count("\n") == 1


def test_brackets_keep_their_commas():
    with initialize_config_dir(str(compose.CONFIGS), version_base="1.3"):
        words = compose.grid(["a=a,{b:1,c:2},[3,4]", "b=range(3)", "c='x,y'", "reg=glob(l2*)", "c='z'"])
    assert words == {
        "a": ["a=a", "a={b:1,c:2}", "a=[3,4]"],
        "b": ["b=0", "b=1", "b=2"],
        "c": ["c='z'"],
        "reg": ["reg=l2", "reg=l2_10x"],
    }
    assert cost.duration(59) == "59 s" and cost.duration(7200) == "2.0 h" and cost.duration(600) == "10 min"


def test_a_plan_counts_what_is_missing_and_writes_nothing(tmp_path, capsys):
    words = ["table=3", *TINY, "reg=l2,margin", "seeds=0,1", f"out={tmp_path / 'out'}", "plan=true"]
    with pytest.raises(SystemExit) as stop:
        reproduce.main(words)
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "4 runs, 0 finished, 4 missing, which need 4 pretrainings" in said
    assert re.search(r"estimated \S+ (s|min) on this machine's CPU", said) and not (tmp_path / "out").exists()
    assert "for GPU-hours, add images_per_second=N" in said or torch.cuda.is_available()


@pytest.mark.parametrize("devices", [1, 8])
def test_a_plan_of_gpus_from_a_measured_speed(devices, capsys):
    words = ["table=6", "data=imagenet", "model=rn18", "reg=l2", "model.weights=null", "plan=true",
             "images_per_second=2500"]  # fmt: skip
    with pytest.raises(SystemExit):
        reproduce.main([*words, f"devices={devices}"])
    hours = (300 + 2 * 100) * 1_281_167 / 2500 / 3600  # one pretraining, and DKM twice
    said = capsys.readouterr().out
    assert f"on {devices} GPU" in said and f"({hours:.1f} GPU-hours)" in said
    assert "2500 images/s of one GPU as given for resnet18" in said and "at least: as fast as pretraining" in said


@pytest.mark.parametrize("step_seconds, batch", [(0.01, 64), (0.1, 64), (0.5, 4)])
def test_speed_is_measured_with_a_batch_that_keeps_the_processor_busy(monkeypatch, step_seconds, batch):
    # A plan said 6 days for 4 hours: it had timed four images of 32x32, where calls cost more than arithmetic.
    (cell,) = planned.cells_of(["data=fake", "model=mbv1", "model.width_mult=0.25", "recipe.batch_size=64"])
    clock = itertools.count(0, step_seconds)
    monkeypatch.setattr(step.time, "perf_counter", lambda: next(clock))
    assert step.measure(cell.config, "cpu") == pytest.approx(batch / step_seconds)


def test_speeds_come_from_records_of_the_same_kind_of_device():
    (cell,) = planned.cells_of(["data=fake", "model=mbv1", "stage=ewgs", "recipe.epochs=10", "stage.epochs=5"])
    found = {
        "axes": cell.axes,
        "config": cell.config,
        "device": {"type": "cpu"},
        "processes": 2,
        "seconds": {"pretrain": 3.0, "ewgs": 4.0},
        "images_per_second": {"pretrain": 100.0, "stage": 50.0},
    }
    speeds = Speeds([found], "cpu", processes=4)
    assert speeds.pretraining(cell) == (10 * 256 / 200, "records") and speeds.stage(cell) == (5 * 256 / 100, "records")


def test_every_run_of_a_table_is_checked_for_another_machine(tmp_path, capsys):
    words = ["table=6", "data=imagenet", "model=mbv1", "reg=l2", "model.width_mult=0.25,1.0", "check=true"]
    with pytest.raises(SystemExit) as stop:
        reproduce.main([*words, f"out={tmp_path / 'out'}", "devices=64", "images_per_second=2500"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and said.count("would start where its data and devices are") == 4
    assert said.count("devices: 64 GPUs of another machine") == 1  # what all runs have in common is told once
    assert said.count("python -m r2.run") == 4
    assert said.count("2500 images/s of one GPU as given for mbv1-1.0") == 2
    assert said.count("for mbv1-0.25, by what it keeps in memory against mbv1-1.0") == 2
    with pytest.raises(SystemExit) as stop:
        reproduce.main([*words, f"out={tmp_path / 'out'}", "devices=63", "images_per_second=2500"])
    refused = capsys.readouterr().err
    assert stop.value.code == 1 and refused.count("does not divide by 63 devices") == 1
    assert "4 of 4 runs would not start" in refused


def test_devices_are_checked_before_runs_are_composed(monkeypatch, capsys):
    monkeypatch.setattr(planned, "composed", lambda words: pytest.fail("composed"))
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["table=1", "plan=true", "devices=4096"])
    assert stop.value.code == 2 and "devices=4096: this machine has" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["data=digits"]])
def test_a_plan_without_data_says_on_which(words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["table=6", "model=mbv1", "reg=l2", "model.width_mult=0.25", "stage.bits=2", "plan=true",
                        f"out={tmp_path}", *words])  # fmt: skip
    first = capsys.readouterr().out.splitlines()[0]
    assert (first == "on digits; the paper's are data=imagenet") == (not words)


# Images/s of MobileNet-V2 in training, by width, as timm has measured an RTX 3090:
# results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv. Its multiplications would say 11,700 at width 0.35.
PUBLISHED = {0.35: 4789, 0.5: 4051, 0.75: 2610, 1.4: 1638}


def test_the_other_widths_of_a_measured_network_are_as_fast_as_published():
    widths = ",".join(map(str, [1.0, *PUBLISHED]))
    words = ["data=imagenet", "model=mbv2", "stage=ewgs", "reg=l2", f"model.width_mult={widths}"]
    networks = {c.config["model"]["width_mult"]: c for c in planned.cells(["table3"], words)}
    given = Given(networks.values(), {"mbv2-1.0": 2313})
    assert given.speed(networks[1.0]) == (2313, "2313 images/s of one GPU as given for mbv2-1.0")
    for width, published in PUBLISHED.items():
        speed, source = given.speed(networks[width])
        assert speed == pytest.approx(published, rel=0.13), width
        assert f"about {speed:.0f} for mbv2-{width}" in source and "against mbv2-1.0" in source
    widest = Given(networks.values(), {"": 1638})
    assert widest.speed(networks[1.4])[0] == 1638 and widest.speed(networks[1.0])[0] > 1638
    two = Given(networks.values(), {"mbv2-1.0": 2313, "mbv2-0.5": 4051})
    assert "against mbv2-0.5" in two.speed(networks[0.35])[1] and "against mbv2-1.0" in two.speed(networks[1.4])[1]


def seconds_of(stage, *words, devices=1):
    (cell,) = planned.cells_of(["data=fake", "model=mbv1", f"stage={stage}", *words])
    return Speeds([], "cuda", devices, Given([cell], {"": 1000.0})).stage(cell)


def test_post_training_stages_are_counted_by_what_they_do():
    none, source = seconds_of("none")
    assert (
        none > 2 * 100 / 3 / 1000
        and source.startswith("1000 images/s")
        and "post-training estimated from training speed" in source
    )
    assert seconds_of("none", "data.calibration_images=640")[0] > none
    assert seconds_of("dfq")[0] > none == seconds_of("dfq", "stage.bias_correction=none")[0]
    short, long = (seconds_of("adaround", f"stage.iterations={n}")[0] for n in (100, 1100))
    assert long - short == pytest.approx(1000 * (32 / 1000 + 28 * 1.3e-3)) and short > none
    alone, shared = (seconds_of("adaround", "stage.iterations=100", devices=n)[0] for n in (1, 8))
    assert alone - shared == pytest.approx(2 * 100 / 3 / 1000 * 7 / 8)  # only the evaluations are shared out


def test_post_training_is_counted_about_as_the_published_records_took_it():
    # The first seeds' runs, one at a time: the study's ran beside other work, which stretches AdaRound's short steps.
    found = [r for r in cost.known_records([RESULTS / "records"]) if r["axes"]["seed"] < 10]
    for model, stage in itertools.product(("mbv1-0.25", "mbv2-0.25"), ("none", "dfq", "adaround")):
        of_stage = [r for r in found if (r["axes"]["model"], r["axes"]["stage"]) == (model, stage)]
        took, counted = [], []
        for one in of_stage:
            took.append(sum(v for phase, v in one["seconds"].items() if phase not in ("pretrain", "load_aimet")))
            worth, seconds = post_training({**one["config"], "choices": one["choices"]})
            counted.append(worth / one["images_per_second"]["pretrain"] + seconds)
        assert statistics.median(counted) == pytest.approx(statistics.median(took), rel=0.35), (model, stage)


def test_a_records_seconds_are_of_as_many_iterations():
    (cell,) = planned.cells_of(["data=fake", "model=mbv1", "stage=adaround", "stage.iterations=100"])
    found = {
        "axes": cell.axes,
        "config": cell.config,
        "device": {"type": "cpu"},
        "processes": 1,
        "seconds": {"pretrain": 3.0, "adaround": 4.0},
        "images_per_second": {"pretrain": 100.0, "stage": None},
    }
    speeds = Speeds([found], "cpu")
    assert speeds.stage(cell) == (4 + 2 * 100 / 3 / 100, "records")
    (more,) = planned.cells_of(["data=fake", "model=mbv1", "stage=adaround", "stage.iterations=9000"])
    assert speeds.stage(more)[0] > 9000 * 32 / 100


@pytest.mark.slow
def test_plan_run_and_rerun(tmp_path):
    """Two of the four runs share a pretraining; a failing one does not stop the others; nothing is done twice."""
    words = ["table=3", *TINY, "reg=l2,margin", "seeds=0,1"]
    before = program(tmp_path, *words, "plan=true")
    assert before.returncode == 0, before.stderr
    assert "4 runs, 0 finished, 4 missing, which need 4 pretrainings" in before.stdout
    assert re.search(r"estimated \S+ (s|min)", before.stdout) and not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    broken = re.search(r"missing\s+(\S*margin_ewgs\S*_s1-\w+)", before.stdout)[1]
    (tmp_path / "out" / broken).write_text("a file where the run's folder should be")
    first = program(tmp_path, *words, f"records={tmp_path / 'kept' / 'records'}", "jobs=2")
    assert first.returncode == 1 and "failed: python -m r2.run" in first.stderr, first.stderr
    assert len(list((tmp_path / "kept" / "records").glob("*.json"))) == 3
    assert len(list((tmp_path / "out" / "pretrained").glob("*/model.pt"))) >= 3
    (tmp_path / "out" / broken).unlink()
    second = program(tmp_path, *words, f"records={tmp_path / 'kept' / 'records'}", "jobs=2")
    assert second.returncode == 0 and "4 runs, 3 finished before, 1 to do" in second.stdout, second.stderr
    records = [json.loads(p.read_text()) for p in (tmp_path / "kept" / "records").glob("*.json")]
    done = {(r["axes"]["reg"], r["axes"]["seed"]) for r in records}
    assert done == {(reg, seed) for reg in ("l2", "margin") for seed in (0, 1)}
    assert {r["device"]["threads"] for r in records} == {max(1, reproduce.os.cpu_count() // 2)}
    assert "± " in (tmp_path / "kept" / "fake" / "tables.md").read_text()
    assert "<html" in (tmp_path / "kept" / "report.html").read_text()
    after = program(tmp_path, *words, f"records={tmp_path / 'kept' / 'records'}", "plan=true")
    assert "4 runs, 4 finished, 0 missing" in after.stdout
    renamed = program(tmp_path, *words, f"records={tmp_path / 'mine'}")  # pages stay in the folder that was named
    assert renamed.returncode == 0 and (tmp_path / "mine" / "report.html").exists(), renamed.stderr
    assert not (tmp_path / "report.html").exists()


def test_jobs_share_gpus_and_each_takes_one():
    with pytest.raises(UserError, match="jobs=4: this machine has 2 GPUs"):
        reproduce.run_all([], 4, ["0", "1"])
    cells = planned.cells_of([*TINY, "devices=2"])
    with pytest.raises(UserError, match="devices=2: with jobs=2 a job has 1 of this machine's 2 GPUs"):
        reproduce.run_all(cells, 2, ["0", "1"])


def test_what_begins_on_the_gpus_of_a_pretraining(tmp_path):
    def begun(stages, gpus):
        cells = planned.cells(["table2"], [*TINY, f"stage={stages}", f"out={tmp_path}", "reg=l2"])
        tasks = reproduce._tasks(cells, gpus)
        return [([c.axes["stage"] for c in t.now], [c.axes["stage"] for c in t.later], t.gpus) for t in tasks], cells

    assert begun("none,lsq,dfq", 8)[0] == [(["lsq"], ["none", "dfq"], 8)]
    assert begun("none,lsq,dfq", 1)[0] == [(["none", "lsq", "dfq"], [], 1)]
    assert begun("none,pact", 0)[0] == [(["none", "pact"], [], 0)]  # CPUs
    tasks, cells = begun("none,dfq", 8)
    assert tasks == [(["none"], ["dfq"], 8)]  # the first one pretrains, on all of them
    cells[0].pretraining.directory.mkdir(parents=True)
    (cells[0].pretraining.directory / "model.pt").touch()
    assert begun("none,dfq", 8)[0] == [(["none"], [], 1), (["dfq"], [], 1)]
    assert {t.now[0].config["devices"] for t in reproduce._tasks(cells, 8)} == {1}


@pytest.mark.slow
def test_post_training_stages_of_a_pretraining_have_a_gpu_each(tmp_path, monkeypatch):
    """On CPUs, where the names of GPUs are not looked at: which cells run at once, and that each has its record."""
    begun = []

    class Job(reproduce._Job):
        def __init__(self, task, gpus):
            begun.append(([cell.axes["stage"] for cell in task.now], gpus))
            super().__init__(task, gpus)

    monkeypatch.setattr(reproduce, "_Job", Job)
    words = [*TINY, "stage=none,fp32,lsq", f"out={tmp_path}", "reg=l2", "seed=0,1"]
    cells = planned.cells(["table2"], words)
    assert reproduce.run_all(cells, 1, ["0", "1", "2"]) == {}
    assert all(cell.finished(None) for cell in cells)
    assert [(stages, len(gpus)) for stages, gpus in begun] == [(["lsq"], 3), (["none"], 1), (["fp32"], 1)] * 2
    assert begun[1][1] != begun[2][1]
    begun.clear()
    more = planned.cells(["table2"], [*words, "stage=none,fp32", "data.calibration_images=16"])
    assert reproduce.run_all([cell for cell in more if not cell.finished(None)], 1, ["0", "1"]) == {}
    assert all(len(gpus) == 1 for _, gpus in begun) and all(cell.finished(None) for cell in more)


def test_records_that_cannot_be_written_are_refused_before_the_first_run(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = [
        "table=3",
        *TINY,
        "reg=l2",
        "seeds=0",
        f"out={tmp_path / 'out'}",
        f"records={tmp_path / 'file' / 'records'}",
    ]
    with pytest.raises(SystemExit):
        reproduce.main(words)
    error = capsys.readouterr().err
    assert "r2: records: cannot write to" in error and "records=DIR" in error and not (tmp_path / "out").exists()


def test_a_run_that_diverged_tells_nothing_of_speed_and_hides_none():
    (cell,) = planned.cells_of(["data=fake", "model=mbv1", "stage=ewgs", "recipe.epochs=10", "stage.epochs=5"])
    good = {"axes": cell.axes, "config": cell.config, "device": {"type": "cpu"}, "processes": 1,
            "seconds": {"pretrain": 3.0, "ewgs": 4.0},
            "images_per_second": {"pretrain": 100.0, "stage": 50.0}}  # fmt: skip
    diverged = {**good, "seconds": {"pretrain": 3.0}, "images_per_second": {"pretrain": 100.0, "stage": None}}
    assert Speeds([good, diverged], "cpu").stage(cell) == (5 * 256 / 50, "records")
    seconds, source = Speeds([diverged], "cpu").stage(cell)
    assert seconds == 5 * 256 / 100 and "as fast as pretraining" in source


def test_a_workers_error_is_one_line(monkeypatch, capsys):
    def start(config):
        raise UserError("Caught UserError in a worker.\nTraceback ...\nr2.config.UserError: x.jpeg: bad")

    class Ends(list):
        send = list.append

    ends = Ends()
    monkeypatch.setattr("r2.run.start", start)
    monkeypatch.setattr("r2.dist.end_with_parent", lambda: None)
    reproduce._run([{}], [], ends)
    assert capsys.readouterr().err == "r2: x.jpeg: bad\n" and ends == ["x.jpeg: bad"]


def test_a_diverged_run_of_a_table_is_told_counts_at_chance_and_is_not_repeated(tmp_path):
    words = [
        "table=3",
        *TINY,
        "reg=l2",
        "seeds=0",
        "recipe.epochs=1",
        "recipe.lr=1e30",
        f"records={tmp_path / 'records'}",
    ]
    told = "r2: diverged, counted at chance: python -m r2.run data=fake"
    first = program(tmp_path, *words)
    assert first.returncode == 0 and told in first.stderr and "1 to do" in first.stdout, first.stderr
    (path,) = (tmp_path / "records").glob("*.json")
    assert json.loads(path.read_text())["metrics"]["top1"] == 10
    again = program(tmp_path, *words)
    assert again.returncode == 0 and told in again.stderr and "1 finished before, 0 to do" in again.stdout
