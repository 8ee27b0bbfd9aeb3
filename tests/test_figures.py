import copy
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from r2 import store
from r2.config import UserError
from r2.report import accuracy, figures, folding
from r2.report import weights as distributions
from r2.report.trained import Trained, read

REGS = {
    "l2": {"factor": 1.0},
    "l2_10x": {"factor": 10.0},
    "linf": {"weight": 0.01, "dim": 1},
    "margin": {"weight": 0.01, "dim": 1, "lr_mult": 1.0},
}


def pretraining(folder, reg, seed=0, epochs=2, finished=True, spread=1.0, **changed):
    """What r2.pretrain leaves of a network of a 3x3, a 1x1 and a linear layer; returns the sha256 it states."""
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "choices": {"data": "fashion_mnist", "model": "mbv1", "reg": reg},
        "data": {"image_size": 32},
        "model": {"width_mult": 0.25},
        "reg": {**REGS[reg], **changed},
        "recipe": {"epochs": epochs},
    }
    generator = torch.Generator().manual_seed(seed)
    state = {
        "stem.weight": torch.randn(40, 1, 3, 3, generator=generator),
        "point.weight": torch.randn(4, 4, 1, 1, generator=generator),
        "a.bias": torch.zeros(4),
        "classifier.weight": torch.randn(10, 4, generator=generator),
    }
    state["stem.weight"][0] *= spread
    rows = [f"{e},{name},{2 + e},1,0.5,{k}" for e in range(epochs + 1) for name, k in (("stem", 3.0), ("point", "nan"))]
    store.write_json(folder / "config.json", config)
    (folder / "curve-weights.csv").write_text("\n".join(["epoch,layer,range,max_abs,std,kurtosis", *rows]) + "\n")
    if finished:
        info = {"sha256": store.digest(state)}
        store.save(folder / "model.pt", {"format": "r2", "key": "", "model": state, "info": info})
    return store.digest(state)


def record(reg="l2", stage="ewgs", seed=0, bits=2, top1=50.0, recipe="study", dim=None, fp32=60.0, model="mbv1-0.25",
           weight=0.01):  # fmt: skip
    axes = {"data": "fashion_mnist", "model": model, "reg": reg, "stage": stage, "seed": seed}
    axes |= {"weight_bits": bits, "act_bits": bits, "dim": dim, "quantized_layers": "all"}
    return {
        "name": f"{model}_{reg}_{stage}_{bits}_{dim}_{weight}_s{seed}",
        "axes": axes,
        "details": {},
        "metrics": {"top1": top1, "images": 10},
        "fp32": fp32 and {"top1": fp32},
        "size": {"file_mib": bits / 20},
        "choices": {"data": "fashion_mnist", "recipe": recipe},
        "config": {"recipe": {"epochs": 2, "finetune": {"epochs": 1}}, "reg": {"weight": weight}},
        "sha256": {"pretrained": None},
        "overrides": [f"reg.weight={weight}"] if weight != 0.01 else [],
    }


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Records, collected weights and the figures of both."""
    root = tmp_path_factory.mktemp("figures")
    for reg, spread in (("l2", 9.0), ("margin", 1.0), ("linf", 1.0)):
        pretraining(root / "pretrained" / reg, reg, spread=spread)
    figures.collect(root / "pretrained", root / "weights")
    records = [record(reg, stage, seed) for reg in ("l2", "smm") for stage in ("none", "ewgs") for seed in (0, 1)]
    paths = figures.write(records, root / "weights", root / "out")
    return records, root / "weights", root / "out", paths


def test_collect_keeps_finished_defaults_of_the_lowest_seed(tmp_path):
    pretraining(tmp_path / "pretrained" / "a", "l2")
    pretraining(tmp_path / "pretrained" / "b", "l2_10x")
    pretraining(tmp_path / "pretrained" / "c", "linf", finished=False)
    pretraining(tmp_path / "pretrained" / "d", "margin", weight=0.1)
    pretraining(tmp_path / "pretrained" / "e", "margin", dim=2)
    pretraining(tmp_path / "pretrained" / "f", "l2", seed=1)
    figures.collect(tmp_path / "pretrained", tmp_path / "into")
    names = [f"mbv1-0.25_{reg}.{suffix}" for reg in ("l2", "l2_10x") for suffix in ("csv", "safetensors")]
    assert sorted(path.name for path in (tmp_path / "into").iterdir()) == names
    with safe_open(tmp_path / "into" / "mbv1-0.25_l2.safetensors", "pt") as file:
        described = json.loads(file.metadata()["r2"])
        assert file.get_tensor("stem.weight").shape == (40, 1, 3, 3)
    assert described["layers"] == ["stem.weight", "classifier.weight"]
    assert [described[k] for k in ("data", "reg", "seed", "epochs")] == ["fashion_mnist", "l2", 0, 2]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "into").iterdir()}
    figures.collect(tmp_path / "pretrained", tmp_path / "into")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "into").iterdir()}


def test_collect_takes_one_recipe_and_records_say_which(tmp_path):
    for reg in ("l2", "margin"):
        pretraining(tmp_path / "pretrained" / reg, reg, epochs=2)
    short = pretraining(tmp_path / "pretrained" / "short", "l2", epochs=1, spread=5.0)
    figures.collect(tmp_path / "pretrained", tmp_path / "most")
    assert {(t.reg, t.recipe["epochs"]) for t in read(tmp_path / "most")} == {("l2", 2), ("margin", 2)}
    asked = record() | {"sha256": {"pretrained": short}}
    figures.collect(tmp_path / "pretrained", tmp_path / "asked", [asked])
    assert {(t.reg, t.recipe["epochs"]) for t in read(tmp_path / "asked")} == {("l2", 1)}


def test_every_figure_with_data_is_drawn_as_vector_and_picture(drawn):
    _, _, out, paths = drawn
    names = ["figure1", "figure2_mbv1-0.25", "range_mbv1-0.25", "accuracy_bits", "accuracy_size"]
    assert [p.name for p in paths] == [f"{name}.{suffix}" for name in names for suffix in ("svg", "png")]
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert picture.text["Identifier"].startswith("sha256:") and picture.width > 600
                assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def test_vectors_fit_a_page_of_any_colour_and_are_readable(drawn):
    for path in drawn[2].glob("*.svg"):
        text = path.read_text()
        assert not re.search(r"(fill|stroke): *(#000000|#ffffff|black|white)", text), path
        texts = re.findall(r"<text style=\"([^\"]*)\"", text)
        assert texts and all("fill: #444444" in style for style in texts), path
        assert min(float(size) for size in re.findall(r"font-size: ([0-9.]+)px", text)) >= 8, path
        assert "dc:date" not in text and not re.search(r" $", text, re.M)


def test_the_same_data_give_the_same_bytes(drawn, tmp_path):
    records, weights, out, _ = drawn
    for path in figures.write(list(reversed(records)), weights, tmp_path):
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_stale_names_what_no_longer_shows_its_data(drawn, tmp_path):
    records, weights, out, _ = drawn
    assert figures.stale(records, weights, out) == []
    assert len(figures.stale(records, weights, tmp_path)) == 10  # none is there
    changed = copy.deepcopy(records)
    changed[0]["metrics"]["top1"] += 1
    accuracy = [f"accuracy_{of}.{suffix}" for of in ("bits", "size") for suffix in ("svg", "png")]
    assert figures.stale(changed, weights, out) == accuracy
    for reg in ("l2", "linf"):
        for suffix in ("safetensors", "csv"):
            name = f"mbv1-0.25_{reg}.{suffix}"
            (tmp_path / name).write_bytes((weights / name).read_bytes())
    assert "figure1.svg" in figures.stale(records, tmp_path, out)  # linf stands in for margin


def test_without_data_there_is_no_figure_and_damage_is_named(tmp_path):
    assert figures.write([], tmp_path / "nowhere", tmp_path / "out") == []
    assert figures.stale([record(stage="fp32") | {"size": {"file_mib": None}}], tmp_path, tmp_path) == []
    (tmp_path / "x.safetensors").write_bytes(b"no")
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(UserError, match="x.safetensors"):
        figures.stale([], tmp_path, tmp_path)


def test_protocols_are_never_mixed(tmp_path):
    mine = [record("l2"), record("margin")]
    other = [record("linf", recipe="fashion_mnist", top1=99.0)]
    weighted = [record("smm", top1=98.0, weight=w) for w in (0.1, 1.0, 10.0)]
    figures.write(mine, tmp_path, tmp_path)
    stale = figures.stale([*other, *mine, *weighted], tmp_path, tmp_path)
    assert stale == ["accuracy_weight.svg", "accuracy_weight.png"]  # the one figure that is about them
    assert figures.stale(other, tmp_path, tmp_path) != []


def test_weights_of_a_regularizer_stand_side_by_side(tmp_path):
    """Those tried with one weight are left out; full precision comes from the same runs."""
    tried = [record("linf", seed=s, weight=w, top1=50 + 10 * w, fp32=60 + w) for w in (0.01, 0.1) for s in (0, 1)]
    rows = accuracy.weight_rows([record("l2"), *tried, record("smm", "dkm", dim=1)])
    assert {(row[1][1], row[3], row[4]): row[-1] for row in rows} == {
        ("fp32", "0.01", "linf"): 60.01, ("fp32", "0.1", "linf"): 60.1,
        ("ewgs W2A2", "0.01", "linf"): 50.1, ("ewgs W2A2", "0.1", "linf"): 51.0,
    }  # fmt: skip
    assert len(rows) == 8
    assert (tmp_path / "accuracy_weight.svg") in figures.write([record("l2"), *tried], tmp_path, tmp_path)


def test_rows_put_full_precision_beside_its_own_runs():
    vector = [record("smm", "dkm", bits=2, dim=2, fp32=58.0), record("smm", "dkm", bits=1, dim=1)]
    rows = accuracy.bits_rows([*vector, record("smm", "pact", fp32=None)])
    full = {row[1][1]: row[-1] for row in rows if row[3] == "fp32"}
    assert full == {"vector DKM": 58.0, "DKM": 60.0, "PACT": 60.0}
    without_first = record()
    without_first["axes"]["quantized_layers"] = "excl_first_last"
    assert accuracy.bits_rows([without_first]) == []
    assert len(accuracy.size_rows([without_first])) == 1


def test_panels_of_one_regularizer_are_left_out_beside_those_that_compare():
    alone = record("l2", "lsq")
    assert {row[1][1] for row in accuracy.bits_rows([alone])} == {"LSQ"}
    compared = accuracy.bits_rows([alone, record("l2"), record("margin")])
    assert {(row[1][1], row[4]) for row in compared} == {("EWGS", "l2"), ("EWGS", "margin")}


def test_three_bins_and_the_layer_they_are_shown_for():
    even = np.linspace(-1, 1, 101)
    assert distributions.zero_bin(np.array([-4.0, -1.9, 0.0, 1.9, 2.1])) == pytest.approx(3 / 5)
    weights = {"even": even, "outlier": np.append(even, 9.0), "constant": np.ones(4)}
    ratio, layer = distributions.widest_layer(Trained("", "", "l2", {}, weights, {}, ""))
    assert layer == "outlier" and ratio > 8


def test_weights_beyond_the_scale_are_noted():
    layers = {str(i): np.linspace(-1, 1, 50) for i in range(30)}
    wide = {**layers, "29": np.append(layers["29"], -70.0)}
    models = [Trained("", "m", reg, {}, weights, {}, "") for reg, weights in (("l2", wide), ("kure", layers))]
    figure, _ = distributions.layers(models)
    low, high = figure.axes[0].get_ylim()
    assert -2 < low < -1 and 1 < high < 2
    assert "\N{MINUS SIGN}70.0" in [text.get_text() for text in figure.axes[0].texts] and not figure.axes[1].texts


def test_drawing_is_paid_for_only_where_something_is_drawn():
    code = "import sys, r2.run, r2.report.figures; assert not {'matplotlib', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_dead_channel_sets_the_folded_range():
    """gamma / sqrt(0 + eps) against gamma / sqrt(1 + eps): 316 times, whatever the weights."""
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5), torch.nn.Conv2d(5, 4, 1))
    with torch.no_grad():
        layers[0].weight.fill_(0.5)
        layers[1].running_var[2] = 0.0
        ((name, (trained, folded, variance)),) = folding.spreads(layers).items()
    assert name == "0" and trained == 1 and folded == pytest.approx((1 / 1e-5) ** 0.5, rel=1e-3) and variance == 0


def test_folding_is_collected_of_the_pretrainings_of_records(tmp_path):
    from r2.models import mobilenet_v1

    torch.manual_seed(0)
    state = mobilenet_v1(10, 0.25).state_dict()
    state["features.1.1.running_var"][3] = 0
    known = store.digest(state)
    for name in ("known", "other"):
        state["classifier.bias"] += name == "other"
        (tmp_path / "pretrained" / name).mkdir(parents=True)
        saved = {"format": "r2", "key": "", "model": state, "info": {"sha256": store.digest(state)}}
        store.save(tmp_path / "pretrained" / name / "model.pt", saved)
    rounded = record(stage="none", bits=4, top1=10.0)
    rounded["axes"]["act_bits"] = 8
    rounded |= {"sha256": {"pretrained": known}}
    rounded["config"]["model"] = {"_target_": "r2.models.mobilenet_v1", "width_mult": 0.25}
    for _ in range(2):  # what is there already stays
        folding.collect(tmp_path / "pretrained", tmp_path / "weights", [rounded])
    ((model, reg, spread, top1),) = folding.folding_rows([rounded], tmp_path / "weights")
    assert (model, reg, top1) == ("mbv1-0.25", "l2", 10.0) and spread > 100
    folded = rounded | {"details": {"constant_channels": []}}
    assert folding.folding_rows([rounded, folded], tmp_path / "weights") == [[model, reg, spread, top1]]
    assert (tmp_path / "weights" / "folding.csv").read_text().count("\n") == 2


def test_networks_without_folding_are_left_out(tmp_path):
    """BatchNorm before its convolution (DenseNet), and none at all."""
    before = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    assert folding.spreads(before) == {} and folding.spreads(nn.Sequential(nn.Linear(3, 2))) == {}
