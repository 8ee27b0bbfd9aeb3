"""Networks of timm and torchvision by name: through every stage, into a packed file and ONNX, or refused beforehand."""

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ENV
from safetensors.torch import save_file
from test_security import composed
from torch import nn

from r2 import pack, zoo
from r2.config import UserError, build
from r2.dist import World
from r2.quantizers.layers import compressed, quantizable
from r2.run import experiment
from r2.stages.graph import places
from r2.zoo.modular import modular

pytest.importorskip("timm", reason="pip install 'r2[timm]'")
TINY = ["data=fake", "data.train_images=16", "data.val_images=8", "data.calibration_images=8", "recipe=smoke",
        "recipe.batch_size=8", "threads=1"]  # fmt: skip
STAGES = ("ewgs", "lsq", "pact", "dkm", "none", "dfq", "adaround")
PAGE = Path(__file__).parents[1] / "docs" / "models.md"


def table():
    """The rows of the page: library, network, and what it says of stages that train, of others, and of ONNX."""
    rows = re.findall(r"^\| `model=(\w+) model.name=(\w+)` \| (.+) \| (.+) \| (.+) \|$", PAGE.read_text(), re.M)
    return [pytest.param(*row, id=row[1]) for row in rows]


def network(library, name, size=32):
    torch.manual_seed(0)
    return getattr(zoo, library)(10, name, size).eval()


def run(out, *words):
    config = composed(f"out={out}", *TINY, *words)
    experiment(config, World())
    return next(path for path in out.glob("fake_*"))


def test_one_network_through_training_and_into_a_packed_file(tmp_path):
    words = ["model=timm", "model.name=mobilenetv3_small_050"]
    trained = run(tmp_path / "a", *words, "reg=margin", "stage=lsq", "stage.bits=4", "stage.batch_size=8")
    assert trained.name.startswith("fake_timm-mobilenetv3_small_050_margin_lsq_w4a4_s0-")
    model = pack.load(trained / "model.safetensors")
    assert model.architecture["network"] == "mobilenetv3_small_050"
    assert compressed(model).keys() == quantizable(network("timm", "mobilenetv3_small_050")).keys()
    record = json.loads((trained / "record.json").read_text())
    assert record["axes"]["model"] == "timm-mobilenetv3_small_050"
    assert torch.isfinite(model(torch.randn(2, 3, 32, 32))).all()


# With BatchNorm and activation in one module, one ReLU for two places, squeeze-and-excitation, and a rectangle.
@pytest.mark.parametrize(
    "library, name, size",
    [("timm", "mobilenetv3_small_050", 32), ("timm", "regnety_002", [32, 48]), ("torchvision", "resnet18", 32),
     ("torchvision", "mobilenet_v3_small", 32)],
)  # fmt: skip
def test_the_rewritten_network_computes_the_same_and_packs(library, name, size, tmp_path):
    model, images = network(library, name, size), torch.randn(2, 3, 32, 48 if isinstance(size, list) else 32)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    rewritten = modular(model)
    torch.testing.assert_close(rewritten(images), model(images))
    assert rewritten.state_dict().keys() == model.state_dict().keys()
    assert list(places(rewritten).weights) and places(rewritten).weights == set(quantizable(model))
    for saved in (model, rewritten, modular(rewritten)):
        pack.save(saved, tmp_path / "model.safetensors")
        loaded = pack.load(tmp_path / "model.safetensors")
        assert loaded.architecture == saved.architecture and torch.equal(loaded(images), saved(images))


def test_a_vision_transformer_is_built_for_the_size_of_the_images(tmp_path):
    model = network("timm", "vit_tiny_patch16_224", [32, 48])
    images = torch.randn(2, 3, 32, 48)
    pack.save(model, tmp_path / "model.safetensors")
    assert torch.equal(pack.load(tmp_path / "model.safetensors")(images), model(images))
    assert "blocks.0.attn.qkv" in quantizable(model)


@pytest.mark.parametrize(
    "library, name, said",
    [
        ("timm", "resnet43", "timm has no such network; similar names are resnet10t"),
        ("timm", "mobilenetv2_10", "similar names are mobilenetv2_100, "),
        ("timm", "mobilnetv2_100", "did you mean 'mobilenetv2_100'"),
        ("timm", "resnet50.a1_in1k", "take model.name=resnet50 and model.weights=hf_hub:timm/resnet50.a1_in1k/"),
        ("torchvision", "mobilenetv3_small", "did you mean 'mobilenet_v3_small'"),
    ],
)
def test_an_unknown_name_is_one_line_with_near_ones(library, name, said):
    with pytest.raises(UserError, match=f"model.name={re.escape(name)}: .*{said}") as refused:
        composed(f"model={library}", f"model.name={name}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "library, name, stage, said",
    [
        ("timm", "convnext_atto", "none", "'permute' .*cannot be quantized after training; stage=ewgs"),
        (
            "timm",
            "tf_mobilenetv3_small_minimal_100",
            "lsq",
            "conv_stem: cannot be compressed, Conv2dSame has a forward",
        ),
        ("torchvision", "inception_v3", "lsq", "model.name=inception_v3: does not take 10 classes and images of 32x32"),
        ("timm", "vit_tiny_patch16_224", "none", "'transpose' .*cannot be quantized"),
    ],
)
def test_what_cannot_be_taken_is_refused_before_training(library, name, stage, said, tmp_path):
    config = composed(f"out={tmp_path}", *TINY, f"model={library}", f"model.name={name}", f"stage={stage}")
    with pytest.raises(UserError, match=said) as refused:
        experiment(config, World())
    assert "\n" not in str(refused.value) and not (tmp_path / "pretrained").exists()


def test_a_network_without_a_pair_to_equalize_is_refused_by_dfq():
    """In a network of SiLU no scale can be moved from one layer to the next."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(10))
    model(torch.zeros(1, 3, 8, 8))
    for stage, refused in (("dfq", True), ("none", False)):
        check = build(composed("data=fake", f"stage={stage}")["stage"]).check
        with pytest.raises(UserError, match="no pair of layers") if refused else contextlib.nullcontext():
            check(model, 8)
    check = build(composed("data=fake", "stage=dfq")["stage"]).check
    check(network("timm", "mobilenetv3_small_050"), 8)


@pytest.mark.slow
def test_timms_weights_come_from_the_hub_or_its_cache(tmp_path, r2):
    """Their place in the cache is known by the network's name; a network that expects other images trains on."""
    repository = tmp_path / "hub" / "models--timm--mobilenetv3_small_050.lamb_in1k"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    state = zoo.timm(1000, "mobilenetv3_small_050", 32).state_dict()
    save_file(state, repository / "snapshots" / commit / "model.safetensors")
    offline = {**ENV, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    words = [*TINY, "check=true", "model=timm", "model.weights=timm"]
    there = r2(*words, "model.name=mobilenetv3_small_050", "model.reset_head=true", env=offline)
    assert there.returncode == 0 and "under a new last layer, trained on" in there.stdout, there.stderr
    head = r2(*words, "model.name=mobilenetv3_small_050", env=offline)
    assert "model.reset_head=true trains a new last layer" in head.stderr
    other = r2(*words, "model.name=mobilenetv1_100", env=offline)
    assert other.returncode == 2 and "normalised by mean 0.5 and deviation 0.5, not by ImageNet's" in other.stderr


def test_the_page_has_a_row_for_every_network_it_promises():
    assert len(table()) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("library, name, trained, afterwards, onnx", table())
def test_the_page_is_true(library, name, trained, afterwards, onnx, tmp_path):
    """Every stage of every network on it, randomly initialised: a packed file comes out, or nothing is trained."""
    images, files = torch.randn(2, 3, 32, 32), []
    for stage in STAGES:
        words = [f"model={library}", f"model.name={name}", f"stage={stage}"]
        words += ["stage.iterations=2"] if stage == "adaround" else []
        words += ["stage.bits=4", "stage.batch_size=8"] if stage in STAGES[:4] else []
        said, out = trained if stage in STAGES[:4] else afterwards, tmp_path / stage
        if said == "works":
            files.append(run(out, *words) / "model.safetensors")
            assert torch.isfinite(pack.load(files[-1])(images)).all()
        else:
            operation = re.fullmatch(r"refused: (.+)", said)[1]
            with pytest.raises(UserError, match=re.escape(operation)):
                run(out, *words)
            assert not (out / "pretrained").exists()
    assert onnx == "works"
    for file in (file for file in files if "_lsq_" in str(file) or "_none_" in str(file)):
        same_in_onnxruntime(file, images)


def same_in_onnxruntime(file, images):
    ort = pytest.importorskip("onnxruntime")
    from r2 import export

    model = pack.load(file)
    export.to_onnx(model, file.with_suffix(".onnx"), images)
    session = ort.InferenceSession(str(file.with_suffix(".onnx")), providers=["CPUExecutionProvider"])
    theirs = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    with torch.no_grad():
        ours = model(images)
    # A value at the border of two levels may fall to either side.
    assert (ours - theirs).abs().mean() < 0.05 * ours.abs().mean().clamp(min=1e-3)


class Scaled(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(torch.add(x, x, alpha=2), output_size=1)


def test_a_function_with_an_argument_of_its_own_is_not_taken_for_another():
    """torch.add's alpha would be lost; a function that stays a function is refused by name where modules are needed."""
    net = Scaled()
    net.architecture = {"network": "scaled"}
    rewritten = modular(net)
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(rewritten(x), net(x))
