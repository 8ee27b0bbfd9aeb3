"""Facts of every data set that need no data: counts, classes, image size. Plans and tables use them."""

from dataclasses import dataclass, fields, replace

from r2.config import ImageSize
from r2.hub import MEAN_AND_STD


@dataclass(frozen=True)
class Facts:
    """Facts of a data set from its option in configs/data; None if only the data have it, or if there are no images.

    The names of the first four are those of the keys that change them, and of `r2.data.batches.Data`.
    """

    train_images: int | None = None
    val_images: int | None = None
    num_classes: int | None = None
    image_size: ImageSize | None = None
    mean_and_std: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # of pixels in [0, 1]


_IMAGENET = Facts(1_281_167, 50_000, 1000, 224, MEAN_AND_STD)
FACTS = {
    "digits": Facts(1433, 364, 10, 32),
    "fashion_mnist": Facts(60_000, 10_000, 10, 32),
    "cifar10": Facts(50_000, 10_000, 10, 32),
    "imagenette": Facts(9_469, 3_925, 10, 128, MEAN_AND_STD),
    "imagenet": _IMAGENET,
    "imagenet_shards": _IMAGENET,
    "imagenet_dali": _IMAGENET,
    "qnli": Facts(104_743, 5_463, 2),
    "folder": Facts(image_size=224, mean_and_std=MEAN_AND_STD),
    "fake": Facts(256, 100, 10, 32),
}


def facts(config: dict) -> Facts:
    """Of the data of a checked config; of an option that r2 does not know, what its keys say."""
    said = {field.name: config["data"][field.name] for field in fields(Facts) if field.name in config["data"]}
    return replace(FACTS.get(config["choices"]["data"], Facts()), **said)
