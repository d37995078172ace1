import dataclasses
import subprocess
import sys

import pytest
import torch
from helpers import PROJECT
from torch import nn

from federated import models
from federated.data.datasets import REGISTRY as DATASETS
from federated.learning.flat import Flat
from federated.options import UsageError


@pytest.mark.parametrize(
    ("name", "dataset", "parameters"),
    [
        ("cnn", "mnist", 1_663_370),  # McMahan et al. (2017)
        ("cnn_femnist", "femnist", 1_206_590),  # Reddi et al. (2021)
        ("lstm", "shakespeare", 819_920),  # LEAF's 817,872, and a second bias of each of 2,048 gates
        ("2nn", "mnist", 199_210),  # McMahan et al. (2017)
        ("lenet", "cifar10", 62_006),  # LeNet-5 with three channels and 6, 16, 120, 84 units
        ("lenet", "mnist", 44_426),
        ("logistic", "mnist", 7_850),
        ("logistic", "heart_disease", 28),
        ("resnet18", "cifar10", 11_173_962),  # He et al.'s 11.2 million
        ("resnet18_gn", "cifar10", 11_173_962),
        ("mobilenet_v2", "cifar10", 2_236_682),
    ],
)
def test_parameters(name, dataset, parameters):
    model = models.build(name, DATASETS[dataset], 0.5, 0)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_resnet18_has_the_cifar_stem():
    model = models.build("resnet18", DATASETS["cifar10"], 0.5, 0)
    assert model.conv1.kernel_size == (3, 3) and model.conv1.stride == (1, 1)
    assert isinstance(model.maxpool, nn.Identity)


def test_resnet18_gn_has_two_groups_and_no_batchnorm():
    norms = [
        module
        for module in models.build("resnet18_gn", DATASETS["cifar10"], 0.5, 0).modules()
        if "Norm" in type(module).__name__
    ]
    assert len(norms) == 20 and all(isinstance(norm, nn.GroupNorm) and norm.num_groups == 2 for norm in norms)


MISFITS = {(name, "heart_disease") for name in ("cnn", "lenet", "cnn_femnist", "resnet18", "resnet18_gn")} | {
    ("lenet", "digits")
}
MISFITS |= {("lstm", dataset) for dataset in DATASETS if dataset != "shakespeare"}
MISFITS |= {(name, "shakespeare") for name in models.REGISTRY if name != "lstm"}


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("name", models.REGISTRY)
def test_every_model_takes_every_data_set_or_says_why_not(name, dataset):
    spec = DATASETS[dataset]
    if (name, dataset) in MISFITS:
        with pytest.raises(
            UsageError, match=f"--model_arch {name} does not fit {spec}: it takes (images|no sequences|sequences)"
        ):
            models.build(name, spec, 0.5, 0)
    else:
        inputs = torch.randint(spec.num_tokens, (3, *spec.shape)) if spec.is_sequence else torch.rand(3, *spec.shape)
        logits = models.build(name, spec, 0.5, 0)(inputs)
        assert logits.shape == (3, spec.num_classes)


@pytest.mark.parametrize("least", [name for name, model in models.REGISTRY.items() if model.least_size])
def test_the_least_size_is_the_least(least):
    size = models.REGISTRY[least].least_size
    spec = dataclasses.replace(DATASETS["cifar10"], shape=(3, size, size))
    assert models.build(least, spec, 0.5, 0)(torch.rand(3, *spec.shape)).shape == (3, 10)


def test_any_model_of_torchvision_is_built_as_it_is_there():
    from torchvision.models import mobilenet_v2

    spec = DATASETS["cifar10"]
    model = models.build("mobilenet_v2", spec, 0.3, 3)
    torch.manual_seed(3)
    theirs = mobilenet_v2(num_classes=10)
    assert model.state_dict().keys() == theirs.state_dict().keys()
    for ours, expected in zip(model.state_dict().values(), theirs.state_dict().values()):
        assert torch.equal(ours, expected)  # the images that it was tried on left no trace
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.3]


@pytest.mark.parametrize(
    ("name", "dataset", "reason"),
    [
        ("resnet50", "mnist", "expected input.* 3 channels"),
        ("alexnet", "cifar10", "Output size is too small"),
        ("vit_b_16", "cifar10", "Wrong image height! Expected 224 but got 32!"),
        ("googlenet", "cifar10", "in training it gives more than logits"),
        ("resnet50", "heart_disease", "it takes images only"),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_a_model_of_torchvision_that_does_not_fit_says_why(name, dataset, reason):
    with pytest.raises(UsageError, match=f"--model_arch {name} does not fit {DATASETS[dataset]}: .*{reason}"):
        models.check(name, DATASETS[dataset])


@pytest.mark.process
def test_naming_a_model_of_the_registry_does_not_import_torch():
    code = """
import sys
from federated import models
from federated.data import datasets
models.check(models.known_name("cnn"), datasets.REGISTRY["digits"])
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)


IMAGES = dataclasses.replace(DATASETS["digits"], shape=(1, 16, 16))


def fitting(name):
    """The Spec of a data set that a model takes, and four samples of it."""
    if models.REGISTRY[name].of_sequences:
        return DATASETS["shakespeare"], torch.randint(80, (4, 80))
    return IMAGES, torch.rand(4, *IMAGES.shape)


WITH_DROPOUT = [name for name in models.REGISTRY if name != "logistic"]


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_acts_in_training_and_not_in_evaluation(name):
    spec, images = fitting(name)
    model = models.build(name, spec, 0.5, 0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))
    without = models.build(name, spec, 0.0, 0).train()
    assert torch.equal(without(images), without(images))


@pytest.mark.parametrize("name", models.REGISTRY)
def test_the_seed_makes_the_model_and_leaves_the_global_generator(name):
    spec, _ = fitting(name)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, again, other = (Flat(models.build(name, spec, 0.5, seed)).weights for seed in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_flat_model_is_the_same_model():
    spec = DATASETS["cifar10"]
    images, labels = torch.rand(4, *spec.shape), torch.tensor([1, 2, 3, 4])
    plain, model = (models.build("resnet18", spec, 0.0, 0) for _ in range(2))
    flat = Flat(model)
    for network in (plain, model):
        nn.functional.cross_entropy(network(images), labels).backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in plain.parameters()])
    assert torch.equal(flat.gradient, gradients)
    floats = [*plain.parameters(), *(b for b in plain.buffers() if b.is_floating_point())]
    assert torch.equal(flat.weights, torch.cat([tensor.detach().flatten() for tensor in floats]))
    flat.weights.zero_()
    assert not any(parameter.any() for parameter in model.parameters())
    assert not model.bn1.running_var.any()
    assert model.bn1.num_batches_tracked == 1  # a counter is no weight
