"""The paper's recipe at full scale, and in small: data of ImageNet's format through every stage into the tables."""

import json
import re
import subprocess
import sys
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ENV
from test_shards import encoded, photographs, prepare

from r2 import compose, pack
from r2.data.facts import FACTS
from r2.dist import World
from r2.plan import step
from r2.plan.cells import cells_of
from r2.report import tables
from r2.report.tables import FP32, paper
from r2.run import experiment

# Keys of the paper's recipe, of its pretraining and of EWGS: a run is found again as long as they stay.
KNOWN = {
    ("imagenet", "rn18"): ("2ab881d4", "163b8493"),
    ("imagenet", "mbv1"): ("7674fde0", "5395ba27"),
    ("imagenet", "mbv2"): ("50ec94e9", "911b200a"),
    ("imagenet_shards", "rn18"): ("c8cfee23", "341214ae"),
    ("imagenet_dali", "mbv2"): ("510b0a2f", "0f2cbb73"),
}


def recipe(model):
    return Path(compose.CONFIGS, "recipe", "imagenet", f"{model}.yaml").read_text()


@pytest.mark.parametrize("data, model", KNOWN)
def test_the_papers_recipe_is_that_of_its_models_file(data, model):
    (cell,) = cells_of([f"data={data}", f"model={model}", "reg=margin", "stage=ewgs"])
    assert (cell.pretraining.key, cell.run.key) == KNOWN[data, model]
    stated = yaml.safe_load(recipe(model))
    assert {key: float(value) for key, value in stated.items()}.items() <= cell.config["recipe"].items()
    assert not [word for word in cell.config["overrides"] if word.startswith("recipe")]  # it is the data's own


@pytest.mark.parametrize(
    "model, number, row", [("rn18", "4", "resnet18"), ("mbv1", "2", "mbv1-1.0"), ("mbv2", "2", "mbv2-1.0")]
)
def test_what_its_header_expects_is_the_papers_and_what_is_counted(model, number, row):
    text = " ".join(recipe(model).replace("\n#", "").split())
    (cell,) = cells_of(["data=imagenet", f"model={model}"])
    accuracy = re.search(f"the paper's Table {number}: (.*?)\\. Time", text)[1]
    of_paper = {value for (key, column), value in paper(number).items() if key[0] == row and column == FP32}
    assert {float(value) for value in re.findall(r"\d+\.\d+", accuracy)} == of_paper
    kept, weights = step.memory(cell.config, 2048 // 8)
    assert f"about {kept + weights:.1f} GiB on each of 8 GPUs by check=true's estimate; {kept:.1f} of them" in text
    speed, hours, on_eight = re.search(r"At ([\d,]+) images/s.*: (\d+) GPU-hours, ([\d.]+) h on 8\.", text).groups()
    seconds = 300 * FACTS["imagenet"].train_images / float(speed.replace(",", ""))
    assert (hours, on_eight) == (f"{seconds / 3600:.0f}", f"{seconds / 3600 / 8:.1f}")


SIZES = ["data.image_size=32", "data.calibration_images=64", "model=mbv1", "model.width_mult=0.25"]
BRIEF = ["recipe.epochs=1", "recipe.warmup_epochs=0", "recipe.batch_size=500", "recipe.finetune.epochs=1",
         "recipe.finetune.adaround_iterations=5"]  # fmt: skip


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """ImageNet's folder in small: 1000 classes, two training images and one for validation each, some of them grey."""
    root = tmp_path_factory.mktemp("imagenet")
    pictures = [picture.convert("L") if i % 5 == 4 else picture for i, picture in enumerate(photographs(15))]
    files = cycle([encoded(picture, quality=90) for picture in pictures])
    for split, count in (("train", 2), ("val", 1)):
        for number in range(1000):
            folder = root / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            for i, content in enumerate(islice(files, count)):
                (folder / f"{number}_{i}.JPEG").write_bytes(content)
    return root


def dry_run(out, *words):
    command = [sys.executable, "-m", "r2.reproduce", f"out={out}", *words, *SIZES, *BRIEF]
    done = subprocess.run(command, cwd=out.parent, capture_output=True, text=True, timeout=1500, env=ENV)
    assert done.returncode == 0, done.stdout + done.stderr
    return check(out)


def check(out):
    """Every record with its packed file, and tables that do not pass for the paper's; returns the records."""
    records = [json.loads(path.read_text()) for path in out.glob("*/record.json")]
    for record in records:
        assert record["metrics"]["images"] == 1000 and record["skipped_images"] == 0
        model = pack.load(out / record["name"] / "model.safetensors")
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            assert torch.isfinite(model(torch.randn(1, 3, 32, 32))).all()
        whole = {**record, "overrides": ["data=imagenet", "model=mbv1"]}  # too few images are enough
        assert not tables.protocol(record).full and not tables.protocol(whole).full
    text = next(out.glob("*/tables.md")).read_text()
    title = text.partition("\n")[0]
    for part in ("(1 + 1 epochs)", "data.image_size=32", "recipe.batch_size=500", "1000 validation images"):
        assert part in title and part in (out / "report.html").read_text(), part
    assert "The paper's, on ImageNet:" in text and not re.search(r"\[\d", text)  # apart, not in the cells
    return records


@pytest.mark.slow
def test_a_dry_run_on_the_image_folder(root, tmp_path):
    """Pretraining, every stage and Tables 2, 4 and 5."""
    words = ["table=2,4,5", "data=imagenet", f"data.root={root}", "data.workers=0", "reg=linf"]
    records = dry_run(tmp_path / "out", *words)
    done = {(r["axes"]["stage"], r["axes"]["weight_bits"]) for r in records}
    assert done == {("none", 4), ("dfq", 4), ("adaround", 4), ("pact", 2), ("pact", 4), ("lsq", 2), ("lsq", 4),
                    ("ewgs", 2), ("ewgs", 4), ("dkm", 1), ("dkm", 2), ("dkm", 4)}  # fmt: skip
    assert len(records) == 12 and len(list(tmp_path.glob("out/pretrained/*/model.pt"))) == 1
    text = (tmp_path / "out" / "imagenet" / "tables.md").read_text()
    assert all(f"Table {number}: " in text for number in "245")


@pytest.mark.slow
def test_a_dry_run_on_shards(root, tmp_path, monkeypatch):
    """What scripts/prepare_imagenet.py makes of the folder, through pretraining and Table 3."""
    out = tmp_path / "shards"
    assert prepare(monkeypatch, "--source", root, "--out", out, "--size", 40, "--per-shard", 1000) == 0
    words = ["table=3", "data=imagenet_shards", f"data.root={out}", "data.stored_size=40", "data.workers=1", "reg=linf"]
    (record,) = dry_run(tmp_path / "out", *words)
    assert (record["axes"]["data"], record["axes"]["stage"]) == ("imagenet_shards", "ewgs")
    assert "Table 3: " in (tmp_path / "out" / "imagenet_shards" / "tables.md").read_text()


@pytest.mark.imagenet
def test_torchvisions_resnet18_has_its_published_accuracy(tmp_path):
    """69.758 % by torchvision's own evaluation; ours resizes and sums in another order."""
    words = ["data=imagenet", "model=rn18", "model.weights=torchvision", "stage=fp32", f"out={tmp_path}"]
    record = experiment(cells_of(words)[0].config, World())
    assert record["metrics"]["images"] == 50_000 and abs(record["metrics"]["top1"] - 69.758) < 0.15
