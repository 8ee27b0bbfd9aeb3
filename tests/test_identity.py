"""A key changes if and only if the result can: for every key of every option of every group."""

import pytest
from hydra import initialize_config_dir

from r2 import compose
from r2.config import SETTLED, UserError, build
from r2.identity import axes, of_pretraining, of_run
from r2.plan.cells import cells_of

GROUPS = ("data", "model", "reg", "recipe", "stage", "tracker")
# What a result cannot depend on, and what only the stage reads, however it is set.
NEVER = {"data.root", "data.workers", "out", "devices", "threads", "force", "check", "checkpoint_seconds",
         "dist_timeout_seconds"}  # fmt: skip
OF_THE_STAGE = {"data.calibration_images", "data.calibration_examples", "recipe.finetune"}
OTHER = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v / 2 + 1e-3, str: lambda v: v + "x"}


def options(group):
    return sorted(path.stem for path in (compose.CONFIGS / group).glob("*.yaml"))


def config_of(*words):
    with initialize_config_dir(str(compose.CONFIGS), version_base="1.3"):
        return compose.composed(words)


def perturbed(config, group, key):
    """The config with another value at one key; no matter here whether its callable takes that value."""
    node = dict(config[group] if group else config)
    node[key] = OTHER[type(node[key])](node[key]) if type(node[key]) in OTHER else {"other": 1}
    return {**config, group: node} if group else node


def keys(config, stage):
    return of_pretraining(config).key, of_run(config, axes(config, stage)).key


@pytest.mark.parametrize("group, option", [(group, option) for group in GROUPS for option in options(group)])
def test_a_key_changes_if_and_only_if_the_result_can(group, option):
    needed = {"qnli": ["model=mobilebert"], "mobilebert": ["data=qnli"]}.get(option, [])
    config = config_of(f"{group}={option}", *needed)
    stage = build(config["stage"])
    before = keys(config, stage)
    for key in config[group]:
        pretraining, run = (
            new != old for new, old in zip(keys(perturbed(config, group, key), stage), before, strict=True)
        )
        name = f"{group}.{key}"
        moved = key == "_target_" or group == "tracker" or name in NEVER
        assert pretraining == (not moved and group != "stage" and name not in OF_THE_STAGE), name
        assert run == (not moved and name != "recipe.finetune"), name  # the stage's keys hold what it gives them


def test_of_the_keys_outside_the_groups_only_the_seed_counts():
    config = config_of()
    stage = build(config["stage"])
    before = keys(config, stage)
    for key in config.keys() - {*GROUPS, *SETTLED}:
        changed = [new != old for new, old in zip(keys(perturbed(config, None, key), stage), before, strict=True)]
        assert changed == [key == "seed"] * 2, key


def test_a_recipes_name_says_nothing_its_values_do():
    words = ["recipe=fake", "recipe.epochs=1", "recipe.batch_size=64", "recipe.finetune.batch_size=64"]
    (ours,) = cells_of(["data=fake", "stage=ewgs", "recipe=smoke"])
    (theirs,) = cells_of(["data=fake", "stage=ewgs", *words])
    assert ours.run == theirs.run and ours.pretraining == theirs.pretraining


def test_a_finished_pretraining_is_found_with_other_calibration():
    (few,), (many,) = (cells_of(["data=fake", "stage=none", f"data.calibration_images={n}"]) for n in (32, 64))
    assert few.pretraining == many.pretraining and few.run != many.run


@pytest.mark.parametrize("word", ["++model._target_=r2.models.resnet18", "++reg._target_=r2.regularizers.LInf",
                                  "++tracker._target_=r2.trackers.wandb"])  # fmt: skip
def test_another_target_than_the_options_own_is_refused(word):
    with pytest.raises(UserError, match=r"_target_=r2\.[^\n]+ an option of its own\Z"):
        config_of(word)


def test_a_key_that_was_made_before_batchnorm_was_synchronised_by_itself_stays():
    configs = [config_of("data=imagenet", *words) for words in ([], ["recipe.sync_bn=false"], ["recipe.sync_bn=true"])]
    auto, never, always = (keys(config, build(config["stage"])) for config in configs)
    assert auto == never != always


def test_a_folder_with_a_text_model_is_known_by_its_content(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "vocab.txt").write_text("a b")

    def key(path):
        config = config_of("data=qnli", "model=mobilebert", "stage=dkm", f"model.source={path}")
        return keys(config, build(config["stage"]))

    first = key(folder)
    folder.rename(tmp_path / "b")
    assert key(tmp_path / "b") == first
    (tmp_path / "b" / "vocab.txt").write_text("a b c")
    assert key(tmp_path / "b") != first
