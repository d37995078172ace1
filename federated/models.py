"""The models, each a function of a data set's Spec and the dropout rate. torch is imported by the one that is asked for,
so that naming the models costs nothing."""

import argparse
import dataclasses
import itertools
import math
import typing
from collections.abc import Callable

from federated.extension import Registry, explain, own_frames
from federated.options import UsageError, shown

if typing.TYPE_CHECKING:
    from torch import nn

    from federated.data.datasets import Spec


Build = typing.TypeVar("Build", bound=Callable)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, and the least height and width of the images that it takes; None: it takes samples of any shape."""

    build: Callable
    least_size: int | None = None


REGISTRY: Registry[Model] = Registry("model")


def register(name: str, least_size: int | None = None) -> Callable[[Build], Build]:
    """A decorator that lets options name a model: a function of a data set's Spec and the dropout rate that returns a torch
    module, which maps inputs [samples, *spec.shape] to logits [samples, spec.num_classes]. See Model for `least_size`. Raises
    UsageError if the name exists."""

    def decorate(build: Build) -> Build:
        REGISTRY.require(callable(build), name, "a function of a Spec and the dropout rate")
        REGISTRY.add(name, Model(build, least_size))
        return build

    return decorate


@register("mlp")
def mlp(spec: "Spec", dropout_rate: float) -> "nn.Module":
    """Two hidden layers of 128 units, dropout after each."""
    return _perceptron(spec, dropout_rate, 128)


@register("2nn")
def two_layers_of_200(spec: "Spec", dropout_rate: float) -> "nn.Module":
    """The 2NN of McMahan et al. (AISTATS 2017, section 3): 199,210 parameters on 28x28x1 and ten classes. They have no
    dropout; here it comes after each hidden layer."""
    return _perceptron(spec, dropout_rate, 200)


@register("logistic")
def logistic(spec: "Spec", dropout_rate: float) -> "nn.Module":
    """Multinomial logistic regression. It has no dropout."""
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(spec.shape), spec.num_classes))


def _perceptron(spec: "Spec", dropout_rate: float, units: int):
    from torch import nn

    sizes = (math.prod(spec.shape), units, units)
    hidden = [
        layer
        for inputs, outputs in itertools.pairwise(sizes)
        for layer in (nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout_rate))
    ]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], spec.num_classes))


@register("cnn", least_size=4)
def cnn(spec: "Spec", dropout_rate: float) -> "nn.Module":
    """The CNN of McMahan et al. (AISTATS 2017, section 3): 1,663,370 parameters on 28x28x1 and ten classes. Dropout before the
    last layer."""
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


@register("cnn_reddi", least_size=6)
def cnn_reddi(spec: "Spec", dropout_rate: float) -> "nn.Module":
    """The CNN of Reddi et al. (ICLR 2021, table 4): 1,206,590 parameters on 28x28x1 and 62 classes. Their dropout of 0.25 after
    the convolutions and 0.5 before the last layer is a rate of 0.5 here. pfl-research (Granqvist et al., NeurIPS 2024) compares
    frameworks by it, on images of CIFAR-10."""
    from torch import nn

    channels, height, width = spec.shape
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(dropout_rate / 2),
        nn.Flatten(),
        nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128),
        nn.ReLU(),
        nn.Dropout(dropout_rate),
        nn.Linear(128, spec.num_classes),
    )


@register("lenet", least_size=16)
def lenet(spec: "Spec", dropout_rate: float) -> "nn.Module":
    """The CNN of NIID-Bench (Li et al., ICDE 2022, section 5): 62,006 parameters on 32x32x3 and ten classes. They have no
    dropout; here it comes after each hidden fully connected layer."""
    from torch import nn

    channels, height, width = spec.shape
    height, width = (((size - 4) // 2 - 4) // 2 for size in (height, width))
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * height * width, 120),
        nn.ReLU(),
        nn.Dropout(dropout_rate),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Dropout(dropout_rate),
        nn.Linear(84, spec.num_classes),
    )


@register("resnet18", least_size=1)
def resnet18(spec: "Spec", dropout_rate: float) -> "nn.Module":
    """ResNet-18 (He et al., CVPR 2016) as is usual on 32x32 images: a 3x3 first convolution and no first max-pool. Dropout
    before the last layer."""
    from torch import nn

    return _resnet18(spec, dropout_rate, nn.BatchNorm2d)


@register("resnet18_gn", least_size=1)
def resnet18_gn(spec: "Spec", dropout_rate: float) -> "nn.Module":
    """`resnet18` with GroupNorm of two groups in place of BatchNorm, as in Reddi et al. (ICLR 2021, section 5), which follow
    Hsieh et al. (ICML 2020): on skewed data the clients' BatchNorm statistics do not fit together."""
    from torch import nn

    return _resnet18(spec, dropout_rate, lambda channels: nn.GroupNorm(2, channels))


def _resnet18(spec: "Spec", dropout_rate: float, norm_layer: "Callable[[int], nn.Module]"):
    from torch import nn
    from torchvision.models.resnet import BasicBlock, ResNet

    model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=spec.num_classes, norm_layer=norm_layer)
    model.conv1 = nn.Conv2d(spec.shape[0], 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    model.fc = nn.Sequential(nn.Dropout(dropout_rate), model.fc)
    return model


def imports_of(name: str) -> list[str]:
    """The modules that building the model `name` imports besides torch, for a process that imports ahead."""
    if name not in REGISTRY:
        return ["torchvision.models"]
    return ["torchvision.models.resnet"] if name.startswith("resnet18") else []


def names() -> str:
    """All names, for a help text."""
    return f"{', '.join(REGISTRY)}, or a classification model of torchvision"


def known_name(text: str) -> str:
    """A parser of a model's name. torchvision, whose import takes seconds, is asked for those that are not in REGISTRY only."""
    if text in REGISTRY:
        return text
    theirs = _torchvision_names()
    if text not in theirs:
        others = ", ".join(other for other in theirs if other not in REGISTRY)
        raise argparse.ArgumentTypeError(f"{shown(text)} is not one of {', '.join(REGISTRY)}, or of torchvision's {others}")
    return text


def _torchvision_names():
    from torchvision import models

    return models.list_models(module=models)


def check(name: str, spec: "Spec") -> None:
    """Raises UsageError if the model `name` does not fit the data. torchvision's and one's own are tried, for which torch is
    imported; what one's own raises is raised."""
    if name not in REGISTRY:
        build(name, spec, 0.0, 0)
        return
    _check_size(name, spec)
    if name in REGISTRY.owners:
        check_logits(name, build(name, spec, 0.0, 0), spec)


def check_logits(name: str, model: typing.Any, spec: "Spec") -> None:
    """Raises UsageError if `model` is no torch module that makes logits of the data; what its own code raises is raised."""
    import torch
    from torch import nn

    if not isinstance(model, nn.Module):
        raise UsageError(f"--model_arch {name}: its function returns {shown(model)}, which is no torch module")
    if {parameter.dtype for parameter in model.parameters()} != {torch.float32}:
        raise UsageError(f"--model_arch {name}: its parameters have to be of type float32, and at least one")
    try:
        tried = _on_zeros(model, spec)
    except Exception as error:
        if own_frames(error):
            raise
        raise _misfit(name, spec, explain(error)) from error
    for when, logits in zip(("training", "evaluation"), tried):
        if not (isinstance(logits, torch.Tensor) and logits.shape == (2, spec.num_classes)):
            what = list(logits.shape) if isinstance(logits, torch.Tensor) else shown(logits)
            raise _misfit(name, spec, f"of two samples it gives {what} in {when}, not logits [2, {spec.num_classes}]")


def _on_zeros(model: "nn.Module", spec: "Spec") -> list:
    """What a model makes of two samples of zeros in training and in evaluation."""
    import torch

    with torch.no_grad():
        return [model.train(training)(torch.zeros(2, *spec.shape)) for training in (True, False)]


def _check_size(name: str, spec: "Spec") -> None:
    least = REGISTRY[name].least_size
    if least is not None and not spec.is_image:
        raise _misfit(name, spec, "it takes images only")
    if least is not None and min(spec.shape[1:]) < least:
        raise _misfit(name, spec, f"it takes images of at least {least}x{least}")


def check_batch_of_one(name: str, spec: "Spec") -> None:
    """Raises UsageError if the model `name` cannot train on a batch of one sample, as with BatchNorm. Imports torch."""
    import torch

    try:
        with torch.no_grad():
            build(name, spec, 0.0, 0).train()(torch.zeros(1, *spec.shape))
    except ValueError as error:
        raise UsageError(f"--model_arch {name} cannot train on a batch of one sample of {spec}: {error}") from error


def _misfit(name: str, spec: "Spec", reason: object):
    return UsageError(f"--model_arch {name} does not fit {spec}: {reason}")


def build(name: str, spec: "Spec", dropout_rate: float, seed: int) -> "nn.Module":
    """The model `name` with initial weights drawn from `seed`; torch's global generator stays unchanged.

    Raises UsageError if it does not fit the data.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's, where models are made; a GPU's is dropout's
        if name not in REGISTRY:
            return _from_torchvision(name, spec, dropout_rate)
        _check_size(name, spec)
        return REGISTRY[name].build(spec, dropout_rate)


def _from_torchvision(name: str, spec: "Spec", dropout_rate: float):
    """torchvision's model as it is, without pretrained weights. `dropout_rate` is that of the dropout layers it has by
    default. Whether it fits is found by two zero images, in training and in evaluation."""
    import torch
    from torch import nn
    from torchvision import models

    if not spec.is_image:
        raise _misfit(name, spec, "it takes images only")
    model = models.get_model(name, weights=None, num_classes=spec.num_classes)
    try:
        logits = _on_zeros(model, spec)
    except Exception as error:  # each model has its own way to fail
        raise _misfit(name, spec, " ".join(str(error).split()) or repr(error)) from error
    if not all(isinstance(each, torch.Tensor) and each.shape == (2, spec.num_classes) for each in logits):
        raise _misfit(name, spec, "in training it gives more than logits")
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.p = dropout_rate
    return model.train()
