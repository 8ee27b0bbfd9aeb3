import json

import pytest
import yaml

from r2 import record
from r2.config import UserError
from r2.export import card
from r2.paths import REPOSITORY

CHECKED = {
    "images": 10000,
    "torch_top1": 73.4,
    "onnx_top1": 73.39,
    "equal_predictions": 99.98,
    "largest_difference": 0.1,
}
EWGS = REPOSITORY / "results" / "records" / "fashion_mnist_mbv1-0.25_kure_ewgs_w2a2_s10-71e61dfe.json"


def exported(folder, target="onnx", suffix=".onnx", checked=CHECKED, preprocessing=None):
    path = folder / f"model{suffix}"
    path.write_bytes(bytes(1234))
    runtime = {"onnx": "onnxruntime", "coreml": "Core ML"}[target]
    command = f"python -m r2.export RUN --to {target}"
    return card.write(path, target, runtime, record.read(EWGS), checked, command, preprocessing)


def test_how_images_are_normalised_is_said_and_stays(tmp_path):
    known = {"image_size": [32, 48], "mean": [0.5, 0.25, 0.125], "std": [0.2, 0.3, 0.4]}
    assert exported(tmp_path, preprocessing=known)
    assert exported(tmp_path, "coreml", ".mlpackage", None, {"image_size": [32, 48]})
    text = (tmp_path / "README.md").read_text()
    assert "of 32x48 (height, width)" in text and "(0.5, 0.25, 0.125)" in text and "(0.2, 0.3, 0.4)" in text
    assert json.loads((tmp_path / "model_card.json").read_text())["preprocessing"] == known


@pytest.mark.parametrize("trained, from_scratch", [(False, False), (True, False), (False, True)])
def test_weights_of_the_user_s_are_reported(trained, from_scratch, tmp_path):
    found = record.read(EWGS)
    found["config"] |= {"weights": {"source": "a.pth", "sha256": "0123456789ab", "trained": trained}}
    found["config"]["stage"]["from_scratch"] = from_scratch
    (tmp_path / "model.onnx").touch()
    assert card.write(tmp_path / "model.onnx", "onnx", "onnxruntime", found, CHECKED, "")
    text = (tmp_path / "README.md").read_text()
    assert "the weights of a.pth (sha256 01234567)" in text
    assert ("with the regularizer kure" in text) == (trained or from_scratch)
    assert ("unchanged by a regularizer" in text) != (trained or from_scratch)


def test_the_hub_reads_what_was_measured_on_the_file(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    assert exported(tmp_path)
    text = (tmp_path / "README.md").read_text()
    read = hub.ModelCard(text)
    assert read.data.library_name == "r2" and read.data.license == "unknown"
    assert read.data.pipeline_tag == "image-classification" and {"ewgs", "onnx"} < set(read.data.tags)
    (result,) = read.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.7339)
    assert (result.dataset_type, result.dataset_split) == ("fashion_mnist", "validation")
    assert read.data.to_dict() == yaml.safe_load(text.split("---")[1])  # nothing that the hub would drop or change
    assert (
        "1,234" in text
        and "73.39 %" in text
        and "stage=ewgs" in text
        and "weights in 2 bits, activations in 2 bits" in text
    )


def test_a_card_gathers_the_files_of_one_run(tmp_path):
    assert exported(tmp_path)
    path = tmp_path / "model_card.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "license": "mit"}))
    assert exported(tmp_path, "coreml", ".mlpackage", None)
    kept, text = json.loads(path.read_text()), (tmp_path / "README.md").read_text()
    assert list(kept["files"]) == ["model.onnx", "model.mlpackage"] and kept["license"] == "mit"
    assert kept["files"]["model.mlpackage"]["top1"] is None
    assert "license: mit" in text and "73.39 %" in text and "not measured" in text
    path.write_text(json.dumps({**kept, "run": "another"}))
    assert exported(tmp_path)
    assert list(json.loads(path.read_text())["files"]) == ["model.onnx"]


@pytest.mark.parametrize("when", ["before the first export", "after it"])
def test_somebody_s_own_readme_is_left_alone(when, tmp_path):
    readme = tmp_path / "README.md"
    if when == "after it":
        assert exported(tmp_path)
    own = (readme.read_bytes() if readme.exists() else b"") + b"mine\n"
    readme.write_bytes(own)
    for _ in range(2):
        assert not exported(tmp_path)
        assert readme.read_bytes() == own
    assert json.loads((tmp_path / "model_card.json").read_text())["files"]["model.onnx"]["top1"] == 73.39


def test_another_s_json_is_refused(tmp_path):
    (tmp_path / "model_card.json").write_text('{"model_details": {}}')
    with pytest.raises(UserError, match="model_card.json: is no model card of r2; move it away"):
        exported(tmp_path)
    assert not (tmp_path / "README.md").exists()
