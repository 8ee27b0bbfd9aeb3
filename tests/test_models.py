import pytest
import torch
from torch import nn

from r2 import pack
from r2.models import mobilenet_v1, mobilenet_v2, resnet18


@pytest.mark.parametrize(
    "build, width, count",
    [
        (mobilenet_v1, 0.25, 470_072), (mobilenet_v1, 0.5, 1_331_592), (mobilenet_v1, 1.0, 4_231_976),
        (mobilenet_v2, 0.25, 1_519_112), (mobilenet_v2, 0.5, 1_968_680), (mobilenet_v2, 1.0, 3_504_872),
        (resnet18, 1.0, 11_689_512),
    ],
)  # fmt: skip
def test_parameter_counts_of_table_3(build, width, count):
    assert sum(p.numel() for p in build(1000, width).parameters()) == count


@pytest.mark.parametrize("build", [mobilenet_v1, mobilenet_v2, resnet18])
@pytest.mark.parametrize("width", [0.25, 1.0])
@pytest.mark.parametrize("size", [32, 64])
def test_logits(build, width, size):
    assert build(7, width).eval()(torch.zeros(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize("build", [mobilenet_v1, mobilenet_v2, resnet18])
@pytest.mark.parametrize("width", [0.25, 1.0])
def test_every_tap_sees_data_where_the_input_is_small(build, width):
    """With small_input all weights of the convolutions get a gradient from 32x32 images; without it some get none."""
    models = [build(7, width, small_input=small) for small in (False, True)]
    shapes = [{name: p.shape for name, p in model.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1]
    images, untrained = torch.randn(4, 3, 32, 32), []
    for model in models:
        maps = []
        model.get_submodule("avgpool" if build is resnet18 else "pool").register_forward_pre_hook(
            lambda _, inputs, maps=maps: maps.append(inputs[0].shape[2:])
        )
        model(images).square().sum().backward()
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        untrained.append(sum(int((m.weight.grad.abs().sum((0, 1)) == 0).sum()) for m in convolutions))
        assert maps == [(2, 2) if model is models[1] else (1, 1)]
    assert untrained[0] > 0 and untrained[1] == 0


@pytest.mark.parametrize("build", [mobilenet_v1, mobilenet_v2, resnet18])
def test_a_packed_file_keeps_the_last_stride(build, tmp_path):
    images = torch.randn(2, 3, 32, 32)
    for small in (False, True):
        model = build(7, 0.25, small_input=small).eval()
        pack.save(model, tmp_path / "model.safetensors")
        loaded = pack.load(tmp_path / "model.safetensors")
        assert ("small_input" in loaded.architecture) == small  # files of before stay readable
        with torch.no_grad():
            assert torch.equal(loaded(images), model(images))
