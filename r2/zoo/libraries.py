"""Networks of timm and torchvision by name; images (n, 3, h, w) to logits (n, num_classes).

python -m r2.run model=timm model.name=mobilenetv2_100 reg=margin stage=ewgs
python -m r2.run model=torchvision model.name=mobilenet_v3_small stage=lsq
"""

from typing import Any

import torch
from torch import Tensor, nn

from r2.config import Count, ImageSize, UserError, first_line, height_and_width
from r2.hub import check_name


def timm(num_classes: Count, name: str, image_size: ImageSize) -> nn.Module:
    """timm's network; one with a fixed input size, such as a vision transformer, is built for `image_size`.

    Raises:
        UserError: there is no such network, or it does not take such images.
    """
    check_name("timm", name)
    from timm import create_model, get_pretrained_cfg
    from timm.layers.linear import Linear

    sized = (found := get_pretrained_cfg(name)) is not None and found.fixed_input_size
    options = {"img_size": height_and_width(image_size)} if sized else {}
    network = _built("timm", create_model, num_classes, name, image_size, options)
    for module in network.modules():
        if type(module) is Linear:  # differs from PyTorch's under torch.jit alone
            module.__class__ = nn.Linear  # type: ignore[assignment]
    return network


def torchvision(num_classes: Count, name: str, image_size: ImageSize) -> nn.Module:
    """torchvision's network.

    Raises:
        UserError: as `timm`.
    """
    check_name("torchvision", name)
    from torchvision.models import get_model

    sized = name.startswith("vit_")
    if sized and not isinstance(image_size, int):
        raise UserError(f"model.name={name}: takes square images only; data.image_size={image_size} is not square")
    return _built("torchvision", get_model, num_classes, name, image_size, {"image_size": image_size} if sized else {})


def _built(
    library: str, create: Any, num_classes: int, name: str, image_size: ImageSize, options: dict[str, Any]
) -> nn.Module:
    """The network, which remembers how it was built; on the meta device it is tried on images of that size."""
    size = height_and_width(image_size)
    where = f"{num_classes} classes and images of {size[0]}x{size[1]}"
    try:
        network = create(name, num_classes=num_classes, **options)
        trying = torch.get_default_device().type == "meta"
        logits = network(torch.empty(2, 3, *size)) if trying else None
    except Exception as error:  # of the library
        reason = first_line(error)
        raise UserError(f"model.name={name}: does not take {where} ({reason})") from None
    if trying and not (isinstance(logits, Tensor) and logits.shape == (2, num_classes)):
        returned = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(f"model.name={name}: for {where} it returns {returned}, not logits (n, {num_classes})")
    network.architecture = {
        "name": library, "network": name, "num_classes": num_classes, "image_size": image_size,
    }  # fmt: skip
    return network
