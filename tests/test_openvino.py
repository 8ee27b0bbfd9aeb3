"""The ONNX files run in OpenVINO, which fuses what it can to integers."""

import pytest
import torch
from conftest import SMALL
from test_export import DATA, quantized, small, trained

from r2 import export, pack
from r2.data.memory import digits
from r2.dist import World

ov = pytest.importorskip("openvino")
pytest.importorskip("onnxscript")


def compiled(path):
    # without the hint it computes in bfloat16 where the processor has it, and one in fifty predictions is another
    return ov.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})


def equal(model, program, batches):
    """Share of equal predictions."""
    same = []
    with torch.no_grad():
        for images, _ in batches:
            images = images.contiguous()
            theirs = torch.from_numpy(program(images.numpy())[0])
            same.append(model(images).argmax(1) == theirs.argmax(1))
    return torch.cat(same).float().mean()


def precisions(program, kind):
    infos = [op.get_rt_info() for op in program.get_runtime_model().get_ops()]
    return {info["runtimePrecision"].value for info in infos if info["layerType"].value == kind}


def test_integers_of_8_bits_are_computed_as_such(tmp_path):
    torch.manual_seed(0)
    model, path = quantized(trained(small()), "lsq", 8), tmp_path / "model.onnx"
    export.to_onnx(model, path, next(DATA.val(2))[0])
    program = compiled(path)
    assert equal(model, program, DATA.val(250)) >= 0.99
    for kind in ("Convolution", "FullyConnected"):
        found = precisions(program, kind)
        assert found and found <= {"u8", "i8"}, kind


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["none", "ewgs", "lsq", "pact", "dkm"])
def test_a_run_on_the_digits(stage, r2, tmp_path):
    run = r2(*SMALL, "data=digits", "model=mbv1", f"stage={stage}")
    assert run.returncode == 0, run.stderr
    model = pack.load(next(r2.out.glob("*/model.safetensors")))
    export.to_onnx(model, tmp_path / "model.onnx", torch.zeros(2, 3, 32, 32))
    assert equal(model, compiled(tmp_path / "model.onnx"), digits().to(World()).val(364)) >= 0.99
