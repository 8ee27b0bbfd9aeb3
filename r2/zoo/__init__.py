"""Networks and weights from elsewhere: timm's and torchvision's, transformers' MobileBERT, a user's checkpoint."""

from r2.zoo.libraries import timm as timm
from r2.zoo.libraries import torchvision as torchvision
