"""A checkpoint of one's own instead of pretraining: what is read, what is refused, what is trained and recorded."""

import argparse
import json
import pickle
import shutil

import pytest
import torch
import torchvision
from conftest import ENV, SMALL
from safetensors.torch import save_file
from test_security import bombs, composed, refuse

from r2 import hub, models, store
from r2.config import UserError
from r2.dist import World
from r2.plan import check as checking
from r2.plan import cost
from r2.plan.cells import cells_of
from r2.plan.speeds import Speeds
from r2.run import experiment
from r2.zoo import weights

TINY = ["data=fake", "data.train_images=64", "data.val_images=20", "recipe=smoke", "model.width_mult=0.25"]
NETWORKS = {
    "rn18": lambda classes=10: models.resnet18(classes, 0.25),
    "mbv1": lambda classes=10: models.mobilenet_v1(classes, 0.25),
    "mbv2": lambda classes=10: torchvision.models.mobilenet_v2(num_classes=classes, width_mult=0.25),
}


def state_of(model="mbv2", classes=10):
    torch.manual_seed(3)
    return NETWORKS[model](classes).state_dict()


def saved(path, content):
    torch.save(content, path)
    return path


def fitting(path, model="mbv2", *words):
    """What the network is to load from a file, as a run would ask."""
    config = composed(*TINY, f"model={model}", f"model.weights={path}", *words)
    with torch.device("meta"):
        network = NETWORKS[model]()
    return weights.fitting(network, config)


def run(out, *words):
    return experiment(composed(f"out={out}", *TINY, "threads=1", *words), World())


# What is read


@pytest.mark.parametrize("model", NETWORKS)
def test_a_state_dict_is_read_whatever_was_put_around_it(tmp_path, model):
    own = state_of(model)
    save_file(own, tmp_path / "a.safetensors")
    files = [tmp_path / "a.safetensors"]
    around = {
        "plain": own,
        "lightning": {"state_dict": {f"model.{k}": t for k, t in own.items()}, "epoch": 3},
        "timm": {"arch": "x", "state_dict": {f"module.{k}": t for k, t in own.items()},
                 "args": argparse.Namespace(lr=0.1)},
        "torchvision": {"model": own, "optimizer": {"state": {}}, "args": argparse.Namespace(data="x")},
        "ema": {"model_ema": {"n_averaged": torch.tensor(4), **{f"module.{k}": t for k, t in own.items()}}},
        "compiled": {"model_state_dict": {f"_orig_mod.module.{k}": t for k, t in own.items()}},
        "counters": {k: t for k, t in own.items() if "num_batches" not in k},
    }  # fmt: skip
    files += [saved(tmp_path / f"{name}.pth", content) for name, content in around.items()]
    torch.save(own, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for path in [*files, tmp_path / "old.pt"]:
        read = fitting(path, model)
        assert read.keys() == (own.keys() if path.stem != "counters" else around["counters"].keys()), path
        assert all(torch.equal(tensor, own[key]) for key, tensor in read.items()), path


@pytest.mark.parametrize("model, theirs", [("rn18", "resnet18"), ("mbv2", "mobilenet_v2")])
def test_torchvisions_files_are_of_these_networks(model, theirs, tmp_path):
    """At full width, and the images are the same functions of them: names and meaning are torchvision's."""
    torch.manual_seed(1)
    network = getattr(torchvision.models, theirs)(num_classes=10).eval()
    config = composed("data=fake", f"model={model}", f"model.weights={saved(tmp_path / 'a.pth', network.state_dict())}")
    ours = weights.load(getattr(models, theirs)(num_classes=10), config).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), network(images))


def test_the_names_of_torchvisions_files_are_those_it_has_now():
    for network, name in hub.TORCHVISION.items():
        known = torchvision.models.get_model_weights(network)
        assert known.IMAGENET1K_V1.url == f"https://download.pytorch.org/models/{name}"


# What is refused


def mistakes(folder):
    own = state_of()
    first = next(iter(own))
    cut = saved(folder / "cut.pth", own).read_bytes()
    (folder / "cut.pth").write_bytes(cut[: len(cut) // 2])
    save_file(own, folder / "cut.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "cut.safetensors").read_bytes()[:-9])
    altered = bytearray(cut)
    altered[len(cut) // 2] ^= 1
    (folder / "altered.pth").write_bytes(altered)
    (folder / "text.pth").write_text("expected a file")
    (folder / "empty.pth").touch()
    torch.save(own, folder / "old.pth", _use_new_zipfile_serialization=False)
    (folder / "old.pth").write_bytes((folder / "old.pth").read_bytes()[:-99])
    damaged = dict.fromkeys(
        ("cut.pth", "cut.safetensors", "altered.pth", "old.pth"), "is truncated or damaged; copy it again"
    )
    return {
        **damaged,
        "text.pth": "is not a checkpoint",
        "empty.pth": "is not a checkpoint",
        saved(folder / "net.pth", {"net": own}): "it must be bare, or under state_dict, model, model_state_dict or "
        "model_ema",
        saved(folder / "list.pth", [1, 2]): "holds no state_dict, names with their tensors, but a list",
        saved(folder / "numbers.pth", {"lr": 0.1}): "for lr is a float and no tensor",
        saved(folder / "module.pth", NETWORKS["mbv2"]()): "save its state_dict alone",
        saved(folder / "twice.pth", {**own, f"module.{first}": own[first]}): f"holds {first} twice",
        saved(folder / "nan.pth", {**own, first: own[first] / 0}): f"{first} holds values that are no finite",
        saved(folder / "int.pth", {**own, first: own[first].char()}): f"{first} holds values that are no finite",
        saved(folder / "other.pth", state_of("rn18")): "has no features.0.0.weight, which is (8, 3, 3, 3) in mbv2; it "
        "holds conv1.weight (16, 3, 7, 7)",
        saved(folder / "wide.pth", torchvision.models.mobilenet_v2(num_classes=10).state_dict()): "features.0.0.weight "
        "is (32, 3, 3, 3) in the file and (8, 3, 3, 3) in mbv2",
        saved(folder / "more.pth", {**own, "extra.weight": torch.zeros(2)}): "holds extra.weight (2,), which mbv2 does",
        saved(folder / "classes.pth", state_of(classes=7)): "classifier.1.weight is (7, 1280) in the file and "
        "(10, 1280) in mbv2; the data have 10 classes: model.reset_head=true",
    }  # fmt: skip


def test_a_file_that_does_not_fit_is_one_line_with_its_name_the_tensor_and_both_shapes(tmp_path):
    for path, expected in mistakes(tmp_path).items():
        with pytest.raises(UserError) as refused:
            fitting(tmp_path / path)
        line = str(refused.value)
        assert line.startswith(f"model.weights={tmp_path / path}: ") and expected in line and "\n" not in line, line


@pytest.mark.parametrize("model, library", [("rn18", "torchvision, "), ("mbv1", ""), ("mbv2", "torchvision, ")])
def test_only_what_the_network_takes_is_offered(model, library):
    wrong = ["no.pth", "timm"] + ["torchvision"] * (model == "mbv1")
    for source in wrong:
        with pytest.raises(UserError) as refused:
            composed(*TINY, f"model={model}", f"model.weights={source}")
        offered = f" a file, a folder of save_pretrained, {library}or hf_hub:OWNER/NAME/FILE"
        assert str(refused.value).endswith(offered)


def test_a_pickle_with_code_is_refused(tmp_path):
    for content in bombs(tmp_path / "mark"):
        (tmp_path / "a.pth").write_bytes(content)
        assert "model.weights=" in refuse(tmp_path / "mark", lambda: fitting(tmp_path / "a.pth"))
    (tmp_path / "args.pth").write_bytes(pickle.dumps(argparse.Namespace(a=print)))
    assert "model.weights=" in refuse(tmp_path / "mark", lambda: fitting(tmp_path / "args.pth"))


def test_a_file_that_changes_after_it_was_named_is_refused(tmp_path):
    config = composed(*TINY, "model=mbv2", f"model.weights={saved(tmp_path / 'a.pth', state_of())}")
    saved(tmp_path / "a.pth", {k: t + 1 for k, t in state_of().items()})
    with pytest.raises(UserError, match="a.pth has changed: its sha256 does not begin with"):
        weights.fitting(NETWORKS["mbv2"](), config)


def test_a_sweep_is_refused_once_before_its_first_run(tmp_path, r2):
    path = saved(tmp_path / "a.pth", state_of(classes=7))
    words = [*SMALL, "model=mbv2", f"model.weights={path}", "model.finetune=true"]
    done = r2("-m", *words, "stage=fp32,none", "reg=l2,linf")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "model.reset_head=true" in done.stderr and not list(r2.out.glob("*/*"))


def test_a_regularizer_that_would_not_act_is_refused(tmp_path):
    words = [*TINY, "model=mbv2", f"model.weights={saved(tmp_path / 'a.pth', state_of())}", "reg=margin"]
    with pytest.raises(UserError, match="reg=margin: is not applied .* model.finetune=true"):
        composed(*words, "stage=lsq")
    with pytest.raises(UserError, match="reg=l2_10x: is not applied"):
        composed(*words[:-1], "reg=l2_10x")
    composed(*words, "model.finetune=true")
    composed(*words, "stage=pact")  # trains by the whole recipe


def test_without_a_network_one_line_says_where_torchvisions_file_belongs(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    config = composed("data=imagenet", "model=rn18", "model.weights=torchvision")
    place = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    with torch.device("meta"):
        network = models.resnet18(1000)
    with pytest.raises(UserError, match=rf"cannot be downloaded .*; put https://\S+ at {place}\Z"):
        weights.fitting(network, config)
    saved(place, torchvision.models.resnet18().state_dict())
    with pytest.raises(UserError, match="has changed: its sha256 does not begin with f37072fd"):
        weights.fitting(network, config)


@pytest.mark.slow
def test_the_hubs_cache_is_enough(tmp_path, r2):
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--me--mine"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    save_file(state_of(), repository / "snapshots" / commit / "a.safetensors")
    offline = {**ENV, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    words = [*SMALL, "model=mbv2", "check=true"]
    there = r2(*words, "model.weights=hf_hub:me/mine/a.safetensors", env=offline)
    assert there.returncode == 0 and "evaluated as they are" in there.stdout, there.stderr
    for name, expected in {"me/mine/b.pth": "has no such file", "me/other/a.pth": "hf download me/other a.pth"}.items():
        missing = r2(*words, f"model.weights=hf_hub:{name}", env=offline)
        assert missing.returncode == 2 and expected in missing.stderr and len(missing.stderr.splitlines()) == 1


# What names a run


def test_content_names_a_run_and_its_pretraining_and_the_path_does_not(tmp_path):
    path = saved(tmp_path / "a.pth", state_of())
    shutil.copyfile(path, tmp_path / "b.pth")
    other = saved(tmp_path / "c.pth", state_of(classes=7))

    def names(*words):
        (cell,) = cells_of([*TINY, "model=mbv2", "stage=none", *words])
        return cell.name, cell.pretraining

    same = {names(f"model.weights={p}") for p in (path, tmp_path / "b.pth")}
    assert len(same) == 1
    different = [names(), *same, *(names(f"model.weights={path}", word) for word in
                 ("model.finetune=true", "model.reset_head=true")), names(f"model.weights={other}")]  # fmt: skip
    assert len({run for run, _ in different}) == len({pretraining for _, pretraining in different}) == 5
    assert names(f"model.weights={path}", "model.reset_head=true") == names(
        f"model.weights={path}", "model.reset_head=true", "model.finetune=true"
    )


def test_a_plan_and_a_check_know_that_nothing_is_pretrained(tmp_path, capsys):
    given = f"model.weights={saved(tmp_path / 'a.pth', state_of())}"
    for words, runs, said in (([], 0, "no pretraining fake"), (["model.finetune=true"], 1, "1 epoch: missing")):
        planned = cells_of([*TINY, f"out={tmp_path / 'out'}", "model=mbv2", "stage=none", given, *words])
        plan = "\n".join(cost.describe(planned, None, Speeds([], "cpu")))
        assert said in plan and ("needs 0 pretrainings", "needs 1 pretraining\n")[runs] in plan
        checking.check(planned[0].config)
        assert ("evaluated as they are" if not runs else "trained on with the recipe") in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# What is done


def test_weights_as_they_are_are_evaluated_and_recorded(tmp_path):
    path = saved(tmp_path / "a.pth", state_of())
    found = run(tmp_path / "out", "model=mbv2", f"model.weights={path}", "stage=fp32")
    assert found["epochs"] == {"pretrain": 0, "stage": 0} and found["seconds"]["pretrain"] == 0
    assert found["sha256"]["weights"] == store.sha256_of(path)
    assert found["sha256"]["pretrained"] == store.digest(state_of()) and found["fp32"] == found["metrics"]
    again = run(tmp_path / "more", "model=mbv2", f"model.weights={next(tmp_path.glob('out/pretrained/*/model.pt'))}",
                "stage=none")  # fmt: skip
    assert again["sha256"]["pretrained"] == found["sha256"]["pretrained"] and again["fp32"] == found["fp32"]
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        run(tmp_path / "out", "model=mbv2", f"model.weights={path}", "stage=fp32")


def test_a_new_head_is_trained_with_the_regularizer_and_the_rest_resumes_from_the_file(tmp_path):
    path = saved(tmp_path / "a.pth", state_of("mbv1", classes=7))
    words = [f"model.weights={path}", "model.reset_head=true", "recipe.lr=0.001", "recipe.epochs=1", "stage=fp32"]
    weak, strong = (run(tmp_path / "out", *words, "reg=linf", f"reg.weight={w}") for w in (0.0, 10.0))
    for found in (weak, strong):
        assert found["epochs"]["pretrain"] == 1 and found["weights"]["initial"] != found["weights"]["pretrained"]
    begun = {name: layer["max_abs"] for name, layer in weak["weights"]["initial"].items()}
    for name, tensor in state_of("mbv1", classes=7).items():
        if tensor.ndim == 4:
            assert begun[name] == pytest.approx(float(tensor.abs().max()))
    assert strong["weights_summary"]["max_abs"] < weak["weights_summary"]["max_abs"]  # R2 at work


def test_finetuning_resumes_from_the_file_and_comes_back_to_what_it_has_done(tmp_path):
    path = saved(tmp_path / "a.pth", state_of())
    words = ["model=mbv2", f"model.weights={path}", "model.finetune=true", "recipe.epochs=1"]
    first = run(tmp_path / "out", *words, "stage=fp32")
    (pretrained,) = tmp_path.glob("out/pretrained/*/model.pt")
    changed = pretrained.stat().st_mtime_ns
    second = run(tmp_path / "out", *words, "stage=none")
    assert pretrained.stat().st_mtime_ns == changed
    assert first["sha256"]["pretrained"] == second["sha256"]["pretrained"] != store.digest(state_of())


@pytest.mark.slow
def test_every_stage_starts_from_torchvisions_resnet18(tmp_path, r2):
    network = torchvision.models.resnet18(num_classes=10)
    path = saved(tmp_path / "rn18.pth", network.state_dict())
    words = ["data=fake", "data.train_images=64", "data.val_images=20", "recipe=smoke", "model=rn18"]
    stages = "none,dfq,adaround,ewgs,lsq,pact,dkm"
    done = r2("-m", *words, f"model.weights={path}", f"stage={stages}", "recipe.finetune.adaround_iterations=2",
              timeout=1800)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(p.read_text()) for p in r2.out.glob("*/record.json")]
    assert {record["axes"]["stage"] for record in found} == set(stages.split(","))
    digest = store.digest(network.state_dict())
    for record in found:
        assert record["epochs"]["pretrain"] == 0 and record["sha256"]["weights"] == store.sha256_of(path)
        assert record["sha256"]["pretrained"] == (None if record["axes"]["stage"] == "pact" else digest)
    assert len(list(r2.out.glob("pretrained/*/model.pt"))) == 1


def test_a_network_without_a_linear_layer_takes_weights_and_no_new_head(tmp_path):
    network = torchvision.models.squeezenet1_1(num_classes=10)
    path = saved(tmp_path / "squeezenet.pth", network.state_dict())
    words = [*TINY[:-1], "model=torchvision", "model.name=squeezenet1_1", f"model.weights={path}"]
    assert set(weights.fitting(network, composed(*words))) == set(network.state_dict())
    with pytest.raises(UserError, match="model.reset_head=true: squeezenet1_1 has no linear layer to replace"):
        weights.fitting(network, composed(*words, "model.reset_head=true"))


class Indexed(torch.nn.Linear):
    """With a persistent buffer of whole numbers, as Swin's relative positions."""

    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("index", torch.arange(4))


def test_buffers_of_whole_numbers_are_whole_numbers_in_the_file(tmp_path):
    def read(**other):
        file = saved(tmp_path / "w.pth", {**Indexed().state_dict(), **other})
        given = {"source": file, "file": file, "sha256": "", "new_head": False}
        return weights.fitting(Indexed(), {"weights": given, "model": {}, "choices": {"model": "indexed"}})

    assert torch.equal(read()["index"], torch.arange(4))
    with pytest.raises(UserError, match="index holds values that are no whole numbers"):
        read(index=torch.arange(4.0))
    with pytest.raises(UserError, match="bias holds values that are no finite floating-point numbers"):
        read(bias=torch.arange(2))
