"""The models and the photograph of `make demo` and of the README's figures.

torchvision's weights are not in its package, so the networks have random weights; their batch norms get random
statistics, because fresh ones (mean 0, variance 1) would leave a fold nothing to do.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from zoo import import_torchvision


def photograph(size: int = 224) -> torch.Tensor:
    """scikit-learn's photograph of a temple: float32[1, 3, size, size], normalised as ImageNet models expect."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    image = Image.fromarray(load_sample_image("china.jpg")).resize((size, size))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(size, size, 3)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((pixels / 255 - mean) / deviation).permute(2, 0, 1)[None].contiguous()


def randomize_norms(model: torch.nn.Module) -> torch.nn.Module:
    """Gives every batch norm statistics as if it had been trained."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            with torch.no_grad():
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.1)
    return model


def _torchvision(name: str, **options: object) -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    import_torchvision()
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None, **options).eval()
    return randomize_norms(model), (photograph(),)


def resnet50() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    """torchvision's ResNet-50 and the photograph."""
    return _torchvision("resnet50")


def googlenet() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    """torchvision's GoogLeNet (without its training-time classifiers) and the photograph."""
    return _torchvision("googlenet", init_weights=True, aux_logits=False)


MODELS = {"googlenet": googlenet, "resnet50": resnet50}
