"""ResNet-18, MobileNet-V1 and MobileNet-V2 (paper section 4), each with `width_mult`.

ResNet-18 and MobileNet-V2 are torchvision's. Strides are ImageNet's at every image size, so a small study trains
the same network. Widths 0.25, 0.5 and 1.0 give the parameter counts of the paper's Table 3.
"""

import torch
from torch import nn
from torchvision.models import MobileNetV2, ResNet
from torchvision.models.resnet import BasicBlock

from r2.config import Count, Fraction, Width


def resnet18(num_classes: Count, width_mult: Width = 1.0) -> nn.Module:
    """torchvision's ResNet-18; images (n, 3, h, w) to logits (n, num_classes)."""
    model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    if width_mult != 1.0:
        model = _narrow_resnet(num_classes, width_mult)
    return model


def _narrow_resnet(num_classes: int, width_mult: float) -> ResNet:
    # torchvision fixes ResNet-18's widths, so the four stages are built again with its own block builder.
    model = ResNet(BasicBlock, [0, 0, 0, 0], num_classes=num_classes)
    widths = [max(1, int(width * width_mult)) for width in (64, 128, 256, 512)]
    model.inplanes = widths[0]
    model.conv1 = nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False)
    model.bn1 = nn.BatchNorm2d(widths[0])
    for i, width in enumerate(widths):
        setattr(model, f"layer{i + 1}", model._make_layer(BasicBlock, width, 2, stride=1 if i == 0 else 2))
    model.fc = nn.Linear(widths[3], num_classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def mobilenet_v2(num_classes: Count, width_mult: Width = 1.0, dropout: Fraction = 0.2) -> nn.Module:
    """torchvision's MobileNet-V2; images (n, 3, h, w) to logits (n, num_classes)."""
    return MobileNetV2(num_classes=num_classes, width_mult=width_mult, dropout=dropout)


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

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.pool(self.features(images)).flatten(1))


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def mobilenet_v1(num_classes: Count, width_mult: Width = 1.0) -> nn.Module:
    """MobileNet-V1; images (n, 3, h, w) to logits (n, num_classes)."""
    return MobileNetV1(num_classes, width_mult)
