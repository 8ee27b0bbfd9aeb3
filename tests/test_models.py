import pytest
import torch

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
