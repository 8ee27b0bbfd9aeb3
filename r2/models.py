"""ResNet-18, MobileNet-V1 and MobileNet-V2 (paper section 4), each with `width_mult`.

ResNet-18 and MobileNet-V2 are torchvision's, with its parameter names. Additions, pooling and every use of ReLU are
separate modules here, so that a quantizer finds each activation. Strides are ImageNet's at every image size, so a small
study trains the same network; `small_input` omits the last stride. Widths 0.25, 0.5 and 1.0 give the parameter counts
of the paper's Table 3.
"""

from collections.abc import Callable
from functools import wraps

from torch import Tensor, nn
from torchvision.models import MobileNetV2, ResNet
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock

from r2.config import Count, Fraction, Width

Inputs = Tensor | dict[str, Tensor]  # what a network takes: images (n, 3, h, w), or tokens by name, each (n, length)


class Add(nn.Module):
    """Two tensors' sum."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Multiply(nn.Module):
    """Two tensors' product, broadcast."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b


def _described(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Let a model remember how it was built, so that a packed file can build it again."""

    @wraps(build)
    def built(num_classes: int, width_mult: float = 1.0, **options: float) -> nn.Module:
        model = build(num_classes, width_mult, **options)
        small = {"small_input": True} if options.get("small_input") else {}
        model.architecture = {"name": build.__name__, "num_classes": num_classes, "width_mult": width_mult, **small}  # type: ignore[assignment]
        return model

    return built


def _strided_once_less(network: nn.Module) -> nn.Module:
    """The network with stride 1 in the block that strides last: 32x32 images then end in 2x2 maps instead of 1x1.

    Of a 3x3 kernel on a 1x1 map only the middle ever sees data; the other weights would keep their initial values, yet
    count in every range, step and centroid. Parameters and their names stay.
    """
    last = [name for name, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)][-1]
    block = network.get_submodule(".".join(last.split(".")[:2]))
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
    return network


class _Block(BasicBlock):
    """torchvision's block; its ReLU is used once, the second use and the sum are modules."""

    def __init__(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*args, **kwargs)
        self.add, self.relu2 = Add(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu2(self.add(y, x if self.downsample is None else self.downsample(x)))


@_described
def resnet18(num_classes: Count, width_mult: Width = 1.0, small_input: bool = False) -> nn.Module:
    """torchvision's ResNet-18; images (n, 3, h, w) to logits (n, num_classes)."""
    network = _resnet18(num_classes, width_mult)
    return _strided_once_less(network) if small_input else network


def _resnet18(num_classes: int, width_mult: float) -> nn.Module:
    if width_mult == 1.0:
        return ResNet(_Block, [2, 2, 2, 2], num_classes=num_classes)
    # torchvision fixes ResNet-18's widths, so the four stages are built again with its own block builder.
    model = ResNet(_Block, [0, 0, 0, 0], num_classes=num_classes)
    widths = [max(1, int(width * width_mult)) for width in (64, 128, 256, 512)]
    model.inplanes = widths[0]
    model.conv1 = nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False)
    model.bn1 = nn.BatchNorm2d(widths[0])
    for i, width in enumerate(widths):
        setattr(model, f"layer{i + 1}", model._make_layer(_Block, width, 2, stride=1 if i == 0 else 2))
    model.fc = nn.Linear(widths[3], num_classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


class _Residual(InvertedResidual):
    """torchvision's block; its sum is a module."""

    def __init__(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*args, **kwargs)
        if self.use_res_connect:
            self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.conv(x)) if self.use_res_connect else self.conv(x)


class _MobileNetV2(MobileNetV2):
    """torchvision's network; its pooling is a module."""

    def __init__(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*args, block=_Residual, **kwargs)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


@_described
def mobilenet_v2(
    num_classes: Count, width_mult: Width = 1.0, dropout: Fraction = 0.2, small_input: bool = False
) -> nn.Module:
    """torchvision's MobileNet-V2; images (n, 3, h, w) to logits (n, num_classes)."""
    network = _MobileNetV2(num_classes=num_classes, width_mult=width_mult, dropout=dropout)
    return _strided_once_less(network) if small_input else network


class MobileNetV1(nn.Module):
    """MobileNet-V1 (Howard et al. 2017): 13 depthwise separable blocks; images (n, 3, h, w) to logits.

    One module per use of ReLU, so that a quantizer finds each activation.
    """

    blocks = [
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        *[(512, 1)] * 5,
        (1024, 2),
        (1024, 1),
    ]

    def __init__(self, num_classes: int, width_mult: float = 1.0):
        super().__init__()
        channels = max(1, int(32 * width_mult))
        layers = [_conv_bn(3, channels, 3, stride=2)]
        for width, stride in self.blocks:
            out = max(1, int(width * width_mult))
            layers.append(_conv_bn(channels, channels, 3, stride=stride, groups=channels))
            layers.append(_conv_bn(channels, out, 1))
            channels = out
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(images)).flatten(1))


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


@_described
def mobilenet_v1(num_classes: Count, width_mult: Width = 1.0, small_input: bool = False) -> nn.Module:
    """MobileNet-V1; images (n, 3, h, w) to logits (n, num_classes)."""
    network = MobileNetV1(num_classes, width_mult)
    return _strided_once_less(network) if small_input else network
