"""A run's packed model as a file for other programs, checked on the run's own data.

python -m r2.export outputs/<run>                    # ONNX, to <run>/model.onnx
python -m r2.export outputs/<run> --out FILE.onnx
"""

import argparse
import contextlib
from pathlib import Path

from torch import Tensor

from r2 import export, pack, record, store
from r2.cli import refusals
from r2.config import UserError, build
from r2.dist import World


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m r2.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder, with record.json and model.safetensors")
    parser.add_argument("--to", default="onnx", help=f"the kind of file: {', '.join(export.TARGETS)}")
    parser.add_argument("--out", type=Path, help="the file; <run>/model.onnx and so forth by default")
    parsed = parser.parse_args(arguments)
    with refusals():
        target = export.target(parsed.to)
        export_run(parsed.run, parsed.out or parsed.run / f"model{target.suffix}", target)


def export_run(run: Path, path: Path, target: export.Target) -> None:
    written = target.load()
    model = pack.load(run / "model.safetensors")
    found = record.read(run / "record.json")
    packed = found["sha256"].get("packed")  # the oldest records have none
    if packed not in (None, store.sha256_of(run / "model.safetensors")):
        raise UserError(f"{run / 'model.safetensors'}: is not the file that record.json tells of (sha256)")
    world = World()
    with contextlib.closing(build(found["config"]["data"]).to(world)) as data:
        images, _ = next(iter(data.val(2)))
        if not isinstance(images, Tensor):
            raise UserError(f"{run}: its model reads text, and only models of images are exported")
        written.write(model, path, images)
        checked = export.check(model, path, data, world)
    print(f"file                {path}, {path.stat().st_size / 2**20:.3f} MiB")
    if checked is None:
        return
    print(f"images              {checked['images']}")
    print(f"top-1               torch {checked['torch_top1']:.2f} %, {target.runtime} {checked['onnx_top1']:.2f} %")
    print(f"equal predictions   {checked['equal_predictions']:.2f} %")
    print(f"largest difference  {checked['largest_difference']:.2g} of a logit")


if __name__ == "__main__":
    main()
