"""The paper's recipe at full scale, and in small: data of ImageNet's format through every stage into the tables."""

import re
from pathlib import Path

import pytest
import yaml

from r2 import cli, estimate
from r2.plan import cells_of
from r2.tables import FP32, paper

# Fingerprints that runs of the paper's recipe had before it stood in one file per model, of fp32 and of EWGS.
KNOWN = {
    ("imagenet", "rn18"): ("5478651b", "be6da31b"),
    ("imagenet", "mbv1"): ("2143953f", "518429cc"),
    ("imagenet", "mbv2"): ("d05c1c51", "5f60db79"),
    ("imagenet_shards", "rn18"): ("5ec60a38", "323ca322"),
    ("imagenet_dali", "mbv2"): ("e2527f48", "3f1dcb8f"),
}


def recipe(model):
    return Path(cli.CONFIGS, "recipe", "imagenet", f"{model}.yaml").read_text()


@pytest.mark.parametrize("data, model", KNOWN)
def test_the_papers_recipe_is_that_of_its_models_file(data, model):
    (cell,) = cells_of([f"data={data}", f"model={model}", "reg=margin", "stage=ewgs"])
    assert (cell.pretraining, cell.name.rsplit("-", 1)[1]) == KNOWN[data, model]
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
    kept, weights = estimate.memory(cell.config, 2048 // 8)
    assert f"about {kept + weights:.1f} GiB of each of 8 GPUs as check=true counts it, {kept:.1f} of them" in text
    speed, hours, on_eight = re.search(r"At ([\d,]+) images/s.*: (\d+) GPU-hours, ([\d.]+) h on 8\.", text).groups()
    seconds = 300 * estimate.TRAIN_IMAGES["imagenet"] / float(speed.replace(",", ""))
    assert (hours, on_eight) == (f"{seconds / 3600:.0f}", f"{seconds / 3600 / 8:.1f}")
