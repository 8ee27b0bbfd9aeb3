"""Bring records of an earlier r2 up to this one: overrides as a list, and the name that a run has today.

python scripts/convert_records.py results outputs    # folders of records, or of runs

Until schema 2 a record kept its overrides only in its command, and its name hashed where classes live. A run's folder
is renamed with its record; its pretraining is not, so a run with another stage pretrains again.
"""

import json
import shlex
import sys
from pathlib import Path

from r2 import record, store
from r2.identity import of_run


def convert(path: Path) -> Path:
    """Rewrite one record and return where it lies now; one of today's stays as it is."""
    found = json.loads(path.read_text())
    if found["schema"] != 1:
        return path
    if found.get("digest", record.digest(found)) != record.digest(found):
        raise SystemExit(f"{path}: altered after it was written (sha256); not converted")
    found["overrides"] = [word for word in shlex.split(found["command"]) if "=" in word]
    identity = of_run({**found["config"], "choices": found["choices"]}, found["axes"])
    found |= {"schema": record.SCHEMA, "name": identity.name}
    found["digest"] = record.digest(found)
    store.write_json(path, found)
    if path.name == "record.json":
        return path.parent.rename(path.parent.with_name(identity.name)) / path.name
    return path.rename(path.with_name(f"{identity.name}.json"))


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        for path in sorted({*folder.glob("*/record.json"), *folder.glob("records/*.json")}):
            print(path, "->", convert(path))


if __name__ == "__main__":
    main()
