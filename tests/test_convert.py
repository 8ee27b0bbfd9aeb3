"""scripts/convert_records.py: what an earlier r2 recorded is found again, under the name that the run has today."""

import importlib.util
import json
from pathlib import Path

import pytest

from r2.config import UserError
from r2.identity import of_run
from r2.record import digest, read

ROOT = Path(__file__).parents[1]


@pytest.fixture
def convert():
    spec = importlib.util.spec_from_file_location("convert_records", ROOT / "scripts" / "convert_records.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.convert


def earlier(path, sealed):
    """A committed record as schema 1 had it."""
    found = json.loads(path.read_text())
    found = {k: v for k, v in found.items() if k not in ("overrides", "digest")} | {"schema": 1, "name": "old-00000000"}
    return found | ({"digest": digest(found)} if sealed else {})


@pytest.mark.parametrize("sealed", [True, False])
def test_an_earlier_record_gets_its_overrides_its_name_and_its_digest(tmp_path, convert, sealed):
    source = sorted((ROOT / "results" / "records").glob("*.json"))[0]
    for place in (tmp_path / "records" / "old-00000000.json", tmp_path / "old-00000000" / "record.json"):
        place.parent.mkdir()
        place.write_text(json.dumps(earlier(source, sealed)))
        with pytest.raises(UserError, match="convert_records.py"):
            read(place)
        path = convert(place)
        assert read(path, source.stem) == read(source) and source.stem in (path.stem, path.parent.name)
        assert convert(path) == path and not place.exists()


def test_an_altered_one_is_not_converted(tmp_path, convert):
    found = earlier(sorted((ROOT / "results" / "records").glob("*.json"))[0], sealed=True)
    found["metrics"]["top1"] = 99.0
    (tmp_path / "record.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="altered"):
        convert(tmp_path / "record.json")


def test_a_committed_record_has_the_name_that_its_config_gives():
    for path in sorted((ROOT / "results" / "records").glob("*.json")):
        found = read(path, path.stem)
        assert of_run({**found["config"], "choices": found["choices"]}, found["axes"]).name == path.stem
