"""Federated averaging as a plain PyTorch loop in one process: ordinary modules and optimizers, no flat vector, no messages.

Tests compare weights with it, and benchmarks compare times with it.
"""

import torch
from torch import nn

from federated import models
from federated.data import partition
from federated.data.datasets import Dataset
from federated.learning.device_data import batch_sizes
from federated.seeds import stream_seed
from federated.settings import Settings


def fedavg(
    settings: Settings, hparams: dict, trial_seed: int, data: Dataset, evaluate=True, memory_format=torch.contiguous_format
):
    """Train at full participation. Returns the final model and each round's (test, validation) accuracy."""
    splits = partition.split(data, settings, trial_seed)

    def build(seed):
        return models.build(settings.model_arch, data.spec, hparams["dropout_rate"], seed)

    def normalised(images):
        mean, std = (torch.tensor(values).view(data.spec.channel_shape) for values in (data.spec.mean, data.spec.std))
        return ((torch.from_numpy(images) / data.spec.scale - mean) / std).to(memory_format=memory_format)

    model = build(stream_seed(trial_seed, "model"))
    clients = [build(0) for _ in splits]
    optimizers = [optimizer_of(settings, hparams, client) for client in clients]
    train = [(normalised(data.train_inputs[each.train]), torch.from_numpy(data.train_labels[each.train])) for each in splits]
    val = [(normalised(data.train_inputs[each.val]), torch.from_numpy(data.train_labels[each.val])) for each in splits]
    test = normalised(data.test_inputs), torch.from_numpy(data.test_labels)
    val = tuple(torch.cat(tensors) for tensors in zip(*val))
    samples = sum(len(labels) for _, labels in train)
    history = []
    for round in range(settings.rounds):
        if settings.optimizer_state == "reset":
            optimizers = [optimizer_of(settings, hparams, client) for client in clients]
        average = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
        for number, (client, optimizer, (images, labels)) in enumerate(zip(clients, optimizers, train)):
            client.load_state_dict(model.state_dict())
            client.train()
            order = torch.Generator().manual_seed(stream_seed(trial_seed, number, round, "order"))
            torch.manual_seed(stream_seed(trial_seed, number, round, "dropout"))
            for _ in range(settings.local_epochs):
                for batch in torch.randperm(len(labels), generator=order).split(batch_sizes(len(labels), hparams)):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(client(images[batch]), labels[batch]).backward()
                    optimizer.step()
            for name, tensor in client.state_dict().items():
                if tensor.is_floating_point():
                    average[name] += tensor * (len(labels) / samples)
        model.load_state_dict(average)
        if evaluate:
            history.append((accuracy(model, *test), accuracy(model, *val)))
    return model, history


def optimizer_of(settings, hparams, model):
    if settings.local_optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=hparams["learning_rate"], fused=True)
    return torch.optim.SGD(
        model.parameters(), lr=hparams["learning_rate"], momentum=hparams["momentum"], weight_decay=hparams["weight_decay"]
    )


@torch.inference_mode()
def accuracy(model, images, labels, batch_size=512):
    model.eval()
    batches = zip(images.split(batch_size), labels.split(batch_size))
    correct = sum((model(images).argmax(1) == labels).sum() for images, labels in batches)
    return correct.item() / len(labels)  # a GPU is waited for once
