"""Each of these algorithms beside a second writing of its paper's equations: float64, lists of tensors, full batches, gradients
by autograd. Trials run with their real server and client, over six rounds, where two of three clients train, some of them less
if there are stragglers, or one if updates are lost."""

import types

import numpy as np
import pytest
import torch
from helpers import PROJECT
from in_process import SEED, pixels
from torch.nn import functional

from federated import models
from federated.data import datasets, partition
from federated.running import participants
from federated.seeds import stream_seed

ROUNDS, EPOCHS, RATE = 6, 3, 0.05
HPARAMS = {"batch_size": 2000, "dropout_rate": 0.0, "learning_rate": RATE}
SIZE = {
    "rounds": ROUNDS, "local_epochs": EPOCHS, "num_clients": 3, "participation": 0.67, "samples_per_client": None,
    "partition": "dirichlet", "partition_alpha": 0.3,
}  # fmt: skip


def forward(weights, inputs):
    """What goes into the last linear layer of an mlp, or of a logistic regression, and the logits."""
    features = inputs
    for weight, bias in zip(weights[:-2:2], weights[1:-2:2]):
        features = torch.relu(features @ weight.T + bias)
    return features, features @ weights[-2].T + weights[-1]


def cross_entropy(weights, client):
    return functional.cross_entropy(forward(weights, client.inputs)[1], client.labels)


def gradient(weights, client, loss=cross_entropy):
    weights = [each.clone().requires_grad_() for each in weights]
    return torch.autograd.grad(loss(weights, client), weights, allow_unused=True, materialize_grads=True)


def add(weights, direction, scale=1.0):
    return [weight + scale * each for weight, each in zip(weights, direction)]


def descend(weights, client, loss=cross_entropy, epochs=EPOCHS):
    for _ in range(epochs):
        weights = add(weights, gradient(weights, client, loss), -RATE)
    return weights


def mean(vectors, shares):
    return [sum(share * each for share, each in zip(shares, tensors)) for tensors in zip(*vectors)]


def flat(weights):
    return torch.cat([each.flatten() for each in weights])


@pytest.fixture
def compare(train):
    """compare(algorithm, hparams, reference, model_arch, **settings) runs a trial and `reference`, a function of what it
    returns: the Run, the initial weights, all clients, and for each round the clients that trained and their shares of the
    samples, and how many epochs each did."""

    def compare(algorithm, hparams, reference, model_arch="mlp", **settings):
        run = train(algorithm, HPARAMS | hparams, model_arch=model_arch, **SIZE, **settings)
        data = datasets.load("digits", PROJECT / "data")
        model = models.build(model_arch, data.spec, 0.0, stream_seed(SEED, "model"))
        clients = []
        for each in partition.split(data, run.settings, SEED):
            test = samples(data, each.test, is_test=True)
            clients.append(types.SimpleNamespace(size=len(each.train), test=test, **vars(samples(data, each.train))))
        problem = types.SimpleNamespace(
            run=run, start=[each.detach().double() for each in model.parameters()], clients=clients, rounds=[], epochs=[]
        )
        for round in range(ROUNDS):
            chosen = [clients[number] for number in np.flatnonzero(np.isfinite(run.rounds[-1]["train"][round, 0]))]
            problem.rounds.append((chosen, [each.size / sum(one.size for one in chosen) for each in chosen]))
            parts = participants.draw(run.settings, SEED, round).values()
            problem.epochs.append([min(EPOCHS, 1 + int(part * EPOCHS)) for part in parts])
        arrived = {1, 2} if run.settings.dropout_fraction else {2}
        assert {len(chosen) for chosen, _ in problem.rounds} == arrived and len({each.size for each in clients}) == 3
        expected, fedavg = flat(reference(problem)), flat(averaging(descend)(problem))
        close(run.broadcast[0], expected)
        assert algorithm == "Finetune" or (expected - fedavg).norm() > 1e-4 * fedavg.norm()  # the reference says something
        return problem

    return compare


def samples(data, indices, **which):
    inputs, labels = pixels(data, indices, **which)
    return types.SimpleNamespace(inputs=inputs.flatten(1).double(), labels=labels)


def close(found, expected):
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def averaging(train):
    """The reference of an algorithm that is FedAvg with `train`, a function of the weights and a client, in clients."""

    def reference(problem):
        weights = problem.start
        for chosen, shares in problem.rounds:
            weights = mean([train(weights, client) for client in chosen], shares)
        return weights

    return reference


def judged(problem, personal):
    """The loss of each client's own model, a function of the client, on the client's share of the test set, is that of the
    last evaluation."""
    with np.load(problem.run.trial.directory / "clients.npz") as arrays:
        found = arrays["local_loss"][:, -1]
    expected = [cross_entropy(personal(client), client.test).item() for client in problem.clients]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_finetune(compare):
    problem = compare("Finetune", {"finetune_epochs": 2}, averaging(descend))
    weights = averaging(descend)(problem)
    judged(problem, lambda client: descend(weights, client, epochs=2))


def test_fedexp(compare):
    def reference(problem):
        weights = problem.start
        for chosen, shares in problem.rounds:
            changes = [add(descend(weights, client), weights, -1) for client in chosen]
            change = mean(changes, shares)
            squares = [sum(each.square().sum() for each in vector) for vector in (change, *changes)]
            spread = sum(share * square for share, square in zip(shares, squares[1:]))
            rate = spread / (2 * (squares[0] + 0.01))
            rates.append(float(rate))
            weights = add(weights, change, max(1, rate))
        return weights

    rates = []
    compare("Fedexp", {"epsilon": 0.01}, reference, "logistic")
    assert min(rates) < 1 < max(rates), rates


def test_fedsam(compare):
    def train(weights, client):
        for _ in range(EPOCHS):
            slope = gradient(weights, client)
            length = flat(slope).norm()
            weights = add(weights, gradient(add(weights, slope, 0.1 / length), client), -RATE)
        return weights

    compare("Fedsam", {"rho": 0.1}, averaging(train))


def test_fedcm(compare):
    def reference(problem):
        weights, direction = problem.start, [0.0] * len(problem.start)
        for chosen, shares in problem.rounds:
            reached = []
            for client in chosen:
                local = weights
                for _ in range(EPOCHS):
                    mixture = [0.3 * one + 0.7 * other for one, other in zip(gradient(local, client), direction)]
                    local = add(local, mixture, -RATE)
                reached.append(local)
            before, weights = weights, mean(reached, shares)
            direction = [(old - new) / (RATE * EPOCHS) for old, new in zip(before, weights)]
        return weights

    compare("Fedcm", {"alpha": 0.3}, reference)


def test_fedntd(compare):
    def train(world, client):
        def loss(local, client):
            divergence = 0
            for known, own, label in zip(forward(world, client.inputs)[1], forward(local, client.inputs)[1], client.labels):
                others = [place for place in range(10) if place != label]
                p, q = (torch.softmax(logits[others] / 2, dim=0) for logits in (known, own))
                divergence += (p * (p / q).log()).sum()
            return cross_entropy(local, client) + 2 * divergence / client.size

        return descend(world, client, loss)

    compare("Fedntd", {"beta": 2.0, "tau": 2.0}, averaging(train))


def test_fedlc(compare):
    def loss(weights, client):
        margins = [0.5 / max(1e-8, (client.labels == label).sum().item()) ** 0.25 for label in range(10)]
        scores = (forward(weights, client.inputs)[1] - torch.tensor(margins)).exp()
        return -sum((row[label] / row.sum()).log() for row, label in zip(scores, client.labels)) / client.size

    problem = compare("Fedlc", {"tau": 0.5}, averaging(lambda weights, client: descend(weights, client, loss)))
    assert any(len(client.labels.unique()) < 10 for client in problem.clients)


def test_feddecorr(compare):
    def loss(weights, client):
        features, logits = forward(weights, client.inputs)
        covariance, size = torch.cov(features.T), features.shape[1]
        deviations = (covariance.diagonal() + 1e-8).sqrt()
        correlations = (covariance / torch.outer(deviations, deviations))[~torch.eye(size, dtype=torch.bool)]
        penalty = correlations.square().mean() * (client.size - 1) ** 2 / client.size
        return functional.cross_entropy(logits, client.labels) + 0.01 * penalty

    compare("Feddecorr", {"beta": 0.01}, averaging(lambda weights, client: descend(weights, client, loss)))


def test_fedbabu(compare):
    def train(weights, client):
        for _ in range(EPOCHS):
            slope = gradient(weights, client)
            weights = [*add(weights[:-2], slope[:-2], -RATE), *weights[-2:]]
        return weights

    problem = compare("Fedbabu", {"finetune_epochs": 2}, averaging(train))
    weights = averaging(train)(problem)
    judged(problem, lambda client: descend(weights, client, epochs=2))


def test_lgfedavg(compare):
    def reference(problem):
        shared = problem.start[2:]
        for client in problem.clients:
            client.own = problem.start[:2]
        for chosen, shares in problem.rounds:
            reached = [descend(client.own + shared, client) for client in chosen]
            shared = mean([weights[2:] for weights in reached], shares)
            for client, weights in zip(chosen, reached):
                client.own = weights[:2]
        for client in problem.clients:
            client.own = client.own + shared
        return problem.start[:2] + shared

    problem = compare("Lgfedavg", {"global_layers": 2}, reference)
    judged(problem, lambda client: client.own)


def test_perfedavg(compare):
    def train(weights, client):
        for _ in range((EPOCHS + 1) // 2):  # a step takes two batches
            adapted = add(weights, gradient(weights, client), -0.1)
            weights = add(weights, gradient(adapted, client), -RATE)
        return weights

    problem = compare("Perfedavg", {"alpha": 0.1}, averaging(train))
    weights = averaging(train)(problem)
    judged(problem, lambda client: add(weights, gradient(weights, client), -0.1))


def test_feddc(compare):
    """The clients' drifts h, local updates g and weights s are at hand, and averaged as such."""

    def train(world, common, client):
        def loss(weights, client):
            near = sum(((w + h - v) ** 2).sum() for w, h, v in zip(weights, client.h, world))
            along = sum((w * (c / client.s - g)).sum() for w, c, g in zip(weights, common, client.g))
            return cross_entropy(weights, client) + 0.1 / client.s / 2 * near + along

        reached = descend(world, client, loss)
        change = add(reached, world, -1)
        client.h = add(client.h, change)
        client.g = add(add(client.g, common, -1 / client.s), change, -1 / (EPOCHS * RATE))
        return reached

    def reference(problem):
        world, everyone = problem.start, problem.clients
        for client in everyone:
            client.h = client.g = [torch.zeros_like(each) for each in world]
            client.s = 3 * client.size / sum(each.size for each in everyone)
        for chosen, _ in problem.rounds:
            common = mean([client.g for client in everyone], [client.s / 3 for client in everyone])
            reached = mean([train(world, common, client) for client in chosen], [1 / 2] * 2)
            world = add(reached, mean([client.h for client in everyone], [1 / 3] * 3))
        return world

    compare("Feddc", {"alpha": 0.1}, reference)


def test_fedala(compare):
    def start(client, world):
        """What a client starts from, and the W that it has learned for that."""
        if client.theta is None:
            return world, [torch.ones_like(each) for each in world]
        mixing, body = client.mixing, len(world) - 2
        for _ in range(11 if client.rounds == 1 else 1):
            mixed = [own + (each - own) * w for own, each, w in zip(client.theta, world, mixing)]
            slopes = [slope * (each - own) for slope, own, each in zip(gradient(mixed, client), client.theta, world)]
            mixing = mixing[:body] + [(w - 20 * slope).clamp(0, 1) for w, slope in zip(mixing[body:], slopes[body:])]
        return [own + (each - own) * w for own, each, w in zip(client.theta, world, mixing)], mixing

    def reference(problem):
        world = problem.start
        for client in problem.clients:
            client.theta, client.rounds = None, 0
        for chosen, shares in problem.rounds:
            for client in chosen:
                initial, client.mixing = start(client, world)
                client.theta, client.rounds = descend(initial, client), client.rounds + 1
            world = mean([client.theta for client in chosen], shares)
        assert any((each < 1).any() and (each > 0).any() for client in problem.clients for each in client.mixing)
        problem.world = world
        return world

    problem = compare("Fedala", {"weight_learning_rate": 20.0}, reference)
    judged(problem, lambda client: start(client, problem.world)[0])


TROUBLE = {"straggler_fraction": 0.9, "dropout_fraction": 0.3}


def test_fednova_counts_the_steps_that_stragglers_did(compare):
    """With momentum, whose velocity has every gradient so far; the shares are of the updates that arrived."""

    def descend(weights, client, steps):
        velocity, counts = [0.0] * len(weights), [0.0] * steps
        for step in range(steps):
            velocity = [0.5 * old + slope for old, slope in zip(velocity, gradient(weights, client))]
            weights = add(weights, velocity, -RATE)
            for each in range(step + 1):
                counts[each] += 0.5 ** (step - each)
        return weights, sum(counts)

    def reference(problem):
        weights = problem.start
        for (chosen, shares), epochs in zip(problem.rounds, problem.epochs):
            reached, counts = zip(*(descend(weights, client, steps) for client, steps in zip(chosen, epochs)))
            slopes = [[each / count for each in add(local, weights, -1)] for local, count in zip(reached, counts)]
            weights = add(weights, mean(slopes, shares), sum(share * count for share, count in zip(shares, counts)))
        assert any(len(set(epochs)) == 2 for epochs in problem.epochs), "two that did unlike steps"
        return weights

    compare("Fednova", {"momentum": 0.5}, reference, **TROUBLE)


def test_scaffold_counts_the_steps_that_stragglers_did(compare):
    """A client whose update is lost keeps its control variate, so that the server's is the mean of all."""

    def reference(problem):
        weights = problem.start
        for client in problem.clients:
            client.variate = [torch.zeros_like(each) for each in weights]
        for (chosen, shares), epochs in zip(problem.rounds, problem.epochs):
            common, reached = mean([client.variate for client in problem.clients], [1 / 3] * 3), []
            for client, steps in zip(chosen, epochs):
                local = weights
                for _ in range(steps):
                    local = add(local, add(add(gradient(local, client), client.variate, -1), common), -RATE)
                reached.append(local)
                client.variate = add(add(client.variate, common, -1), add(weights, local, -1), 1 / (steps * RATE))
            weights = mean(reached, shares)
        return weights

    compare("Scaffold", {}, reference, **TROUBLE)


def test_fedcm_counts_the_steps_that_stragglers_did(compare):
    def reference(problem):
        weights, direction = problem.start, [0.0] * len(problem.start)
        for (chosen, shares), epochs in zip(problem.rounds, problem.epochs):
            reached = []
            for client, steps in zip(chosen, epochs):
                local = weights
                for _ in range(steps):
                    mixture = [0.3 * one + 0.7 * other for one, other in zip(gradient(local, client), direction)]
                    local = add(local, mixture, -RATE)
                reached.append(local)
            steps = sum(share * each for share, each in zip(shares, epochs))
            before, weights = weights, mean(reached, shares)
            direction = [(old - new) / (RATE * steps) for old, new in zip(before, weights)]
        return weights

    compare("Fedcm", {"alpha": 0.3}, reference, **TROUBLE)
