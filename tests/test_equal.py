"""One accuracy, three readers: the record, the packed file and onnxruntime."""

import contextlib

import pytest
import torch
from test_security import composed

from r2 import export, pack
from r2.config import build
from r2.dist import World
from r2.plan.cells import cell_of
from r2.run import experiment
from r2.training.loop import evaluate

STAGES = ("fp32", "none", "dfq", "adaround", "ewgs", "lsq", "pact", "dkm")
QAT = ["stage.bits=4", "recipe.finetune.epochs=2"]  # enough to tell digits apart, which a model at chance would not
# With one 4-bit grid per weight a MobileNet of four epochs ends at chance on some machines.
FINE = ["stage.granularity=channel"]
EXTRA = {stage: QAT for stage in ("ewgs", "lsq", "pact")} | {stage: FINE for stage in ("none", "dfq", "adaround")}
EXTRA["pact"] = [*QAT, "recipe.epochs=12"]  # it trains from scratch
QUICK = [("none", "bf16")]
ALL = [(stage, precision) for stage in STAGES for precision in ("fp32", "bf16", "fp16")]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Shared, so that each precision is pretrained once."""
    threads = torch.get_num_threads()
    yield tmp_path_factory.mktemp("equal") / "out"
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "stage, precision",
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in ALL],
)
def test_a_record_s_accuracy_is_the_file_s_and_onnxruntime_s(out, stage, precision):
    small = ["data=digits", "recipe=smoke", "recipe.epochs=4", "model=mbv1", "model.width_mult=0.25"]
    words = [*small, f"stage={stage}", f"recipe.precision={precision}", f"out={out}"]
    config = composed(*words, *EXTRA.get(stage, []))
    record, world = experiment(config, World()), World()
    model = pack.load(cell_of(config).directory / "model.safetensors")
    with contextlib.closing(build(config["data"]).to(world)) as data:
        assert evaluate(model, data, world, build(config["recipe"])) == record["metrics"]
        assert record["metrics"]["top1"] > 15  # not at chance, where all would agree
        pytest.importorskip("onnxruntime")
        path = out / "model.onnx"
        images = next(data.val(2))[0]
        export.to_onnx(model, path, images)
        found = export.check(model, path, data, world)
    assert found["images"] == record["metrics"]["images"]
    assert found["torch_top1"] == record["metrics"]["top1"]
    one = 100 / found["images"]  # an activation on the edge between two levels may round otherwise on another processor
    assert abs(found["onnx_top1"] - record["metrics"]["top1"]) <= one + 1e-3
