"""The models, each a function of a data set's Spec and the dropout rate. torch is imported by the one that is asked for,
so that naming the models costs nothing."""

import itertools
import math


def logistic(spec, dropout_rate):
    """Multinomial logistic regression. It has no dropout."""
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(spec.shape), spec.num_classes))


def mlp(spec, dropout_rate):
    """Two hidden layers of 128 units."""
    from torch import nn

    sizes = (math.prod(spec.shape), 128, 128)
    hidden = [
        layer
        for inputs, outputs in itertools.pairwise(sizes)
        for layer in (nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout_rate))
    ]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], spec.num_classes))


def cnn(spec, dropout_rate):
    """The CNN of McMahan et al. (AISTATS 2017, section 3): 1,663,370 parameters on 28x28x1 and ten classes."""
    from torch import nn

    channels, height, width = spec.shape
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 512),
        nn.ReLU(),
        nn.Dropout(dropout_rate),
        nn.Linear(512, spec.num_classes),
    )


def resnet18(spec, dropout_rate):
    """ResNet-18 (He et al., CVPR 2016) as is usual on 32x32 images: a 3x3 first convolution and no first max-pool."""
    from torch import nn
    from torchvision.models.resnet import BasicBlock, ResNet

    model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=spec.num_classes)
    model.conv1 = nn.Conv2d(spec.shape[0], 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    model.fc = nn.Sequential(nn.Dropout(dropout_rate), model.fc)
    return model


REGISTRY = {"mlp": mlp, "logistic": logistic, "cnn": cnn, "resnet18": resnet18}

# What building a model imports besides torch, for a process that imports ahead
IMPORTS = {"resnet18": ["torchvision.models.resnet"]}


def build(name: str, spec, dropout_rate: float, seed: int):
    """The model `name` with initial weights drawn from `seed`; torch's global generator is left as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return REGISTRY[name](spec, dropout_rate)
