import pytest
import torch
from torch import nn

from federated import models
from federated.datasets import REGISTRY as DATASETS
from federated.flat import Flat


def test_cnn_has_the_published_number_of_parameters():
    model = models.build("cnn", DATASETS["mnist"], 0.5, 0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_663_370


def test_resnet18_has_the_cifar_stem():
    model = models.build("resnet18", DATASETS["cifar10"], 0.5, 0)
    assert model.conv1.kernel_size == (3, 3) and model.conv1.stride == (1, 1)
    assert isinstance(model.maxpool, nn.Identity)
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962  # He et al.'s 11.2 million


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("name", models.REGISTRY)
def test_every_model_takes_every_data_set(name, dataset):
    spec = DATASETS[dataset]
    logits = models.build(name, spec, 0.5, 0)(torch.rand(3, *spec.shape))
    assert logits.shape == (3, spec.num_classes)


@pytest.mark.parametrize("name", models.REGISTRY)
def test_dropout_acts_in_training_and_not_in_evaluation(name):
    spec = DATASETS["digits"]
    images = torch.rand(4, *spec.shape)
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
    spec = DATASETS["digits"]
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
