"""Every option of every group: it composes, binds to its signature, and its cost is told without any data."""

import pytest
import torch
from hydra import initialize_config_dir

from r2 import compose
from r2.config import GROUPS, build
from r2.data.facts import FACTS, Facts, facts
from r2.dist import World
from r2.plan import cost, step
from r2.plan.cells import cells_of
from r2.plan.speeds import Given, Speeds


def options(group):
    return sorted(path.stem for path in (compose.CONFIGS / group).glob("*.yaml"))


@pytest.mark.parametrize("group, option", [(group, option) for group in GROUPS for option in options(group)])
def test_every_option_is_checked_and_its_cost_estimated(group, option, tmp_path):
    words = ["data=qnli", "model=mobilebert"] if option in ("qnli", "mobilebert") else []
    if words:
        pytest.importorskip("transformers")
    (cell,) = cells_of([*words, f"{group}={option}", f"out={tmp_path}"])
    assert build(cell.config["recipe"]).batch_size and build(cell.config["stage"]).axes()
    known, own = (
        facts(cell.config),
        (group, option) == ("data", "folder"),
    )  # of images of one's own nothing is known before they are read
    assert own or (known.train_images and known.val_images and known.num_classes)
    assert sum(step.memory(cell.config, 2)) > 0
    lines = list(cost.describe([cell], None, Speeds([], "cpu", given=Given([cell], {"": 100.0}))))
    assert "1 run, 0 finished, 1 missing" in " ".join(lines) and any(
        ("not counted" if own else "estimated") in line for line in lines
    )


@pytest.mark.parametrize(
    "words, classes", [(["data=cifar10"], 10), (["data=imagenette"], 10), (["data=imagenet"], 1000)]
)
def test_the_network_that_is_measured_has_the_datas_classes_and_size(words, classes):
    (cell,) = cells_of([*words, "model=mbv1", "model.width_mult=0.25"])
    model, images, _ = step.example(cell.config, 1, "meta")
    assert model.classifier.out_features == classes and images.shape[-1] == facts(cell.config).image_size


def test_facts_of_what_is_here_are_true():
    with initialize_config_dir(str(compose.CONFIGS), version_base="1.3"):
        configs = [compose.composed([f"data={name}"]) for name in ("digits", "fake")]
    for config in configs:
        data = build(config["data"]).to(World(device=torch.device("cpu")))
        assert facts(config) == Facts(data.train_images, data.val_images, data.num_classes, data.image_size)


def test_every_data_set_of_the_configs_has_its_facts_and_keys_change_them():
    assert set(FACTS) == set(options("data"))
    with initialize_config_dir(str(compose.CONFIGS), version_base="1.3"):
        config = compose.composed(["data=fake", "data.train_images=7", "data.num_classes=3"])
    assert facts(config) == Facts(7, 100, 3, 32)
