"""The algorithms' identities, their closed forms on quadratics, and the mistakes that other implementations have made."""

import contextlib
import functools
import json
import os
import signal
import time
import types

import numpy as np
import pytest
import torch
from helpers import Sweep, processes_of, results
from in_process import SEED, pixels
from torch.nn import functional

from federated import algorithms, models
from federated.algorithms.fedavg import Server
from federated.algorithms.fednova import effective_steps
from federated.data import datasets, partition
from federated.learning.device_data import batch_sizes
from federated.learning.flat import Flat
from federated.learning.local_model import classifier_of
from federated.running import checkpoint
from federated.seeds import stream_seed
from hparams_registry import default_hparams, random_hparams

# Identities


@pytest.mark.parametrize(
    ("algorithm", "hparams", "settings", "is_exact"),
    [
        ("Fedprox", {"mu": 0.0}, {}, True),
        ("Moon", {"mu": 0.0}, {}, True),
        ("Fedavgm", {"server_momentum": 0.0}, {}, False),
        ("Scaffold", {}, {"rounds": 1}, True),
        ("Fedbn", {}, {}, True),
        ("Fednova", {}, {}, False),
        ("Fednova", {"momentum": 0.9}, {"optimizer_state": "reset"}, False),
        ("Ditto", {"lambda": 0.0}, {}, True),
        ("Apfl", {"alpha": 0.0, "dropout_rate": 0.0}, {}, True),
        ("Fedexp", {"epsilon": 1e-12}, {"num_clients": 1}, True),
        ("Fedsam", {"rho": 0.0, "dropout_rate": 0.0}, {}, True),
        ("Fedcm", {"alpha": 1.0}, {}, True),
        ("Fedntd", {"beta": 0.0}, {}, True),
        ("Fedlc", {"tau": 0.0}, {}, True),
        ("Feddecorr", {"beta": 0.0}, {}, True),
        ("Finetune", {"finetune_epochs": 2, "momentum": 0.9}, {"optimizer_state": "keep"}, True),
    ],
)
def test_what_equals_fedavg(train, algorithm, hparams, settings, is_exact):
    shared = {name: value for name, value in hparams.items() if name in ("momentum", "dropout_rate")}
    fedavg = train("Fedavg", shared, **settings).broadcast[0]
    other = train(algorithm, hparams, **settings).broadcast[0]
    if is_exact:
        assert torch.equal(fedavg, other)
    else:
        torch.testing.assert_close(other, fedavg, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hparams", [{"mu": 1.0}, {"mu": 10.0}])
def test_what_does_not_equal_fedavg(train, hparams):
    """So that the identities above say something: with their terms the algorithms go elsewhere."""
    fedavg = train("Fedavg").broadcast[0]
    for algorithm in ("Fedprox", "Moon"):
        assert (train(algorithm, hparams).broadcast[0] - fedavg).norm() > 1e-3 * fedavg.norm()


@pytest.mark.parametrize("clients", [1, 3])
def test_centralized_is_plain_training_on_all_samples(train, clients):
    run = train("Centralized", {"momentum": 0.9}, num_clients=clients, optimizer_state="keep")
    data = datasets.load("digits", "data")
    indices = torch.from_numpy(np.concatenate([each.train for each in partition.split(data, run.settings, SEED)]))
    model = models.build("mlp", data.spec, 0.5, stream_seed(SEED, "model"))
    optimizer = torch.optim.SGD(model.parameters(), lr=run.hparams["learning_rate"], momentum=0.9)
    for round in range(run.settings.rounds):
        order = torch.Generator().manual_seed(stream_seed(SEED, 0, round, "order"))
        torch.manual_seed(stream_seed(SEED, 0, round, "dropout"))
        for batch in indices[torch.randperm(len(indices), generator=order)].split(16):
            inputs, labels = pixels(data, batch.numpy())
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    reached = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.testing.assert_close(run.broadcast[0], reached.detach(), rtol=1e-4, atol=1e-6)
    if clients == 1:
        assert torch.equal(train("Fedavg", {"momentum": 0.9}, num_clients=1).broadcast[0], run.broadcast[0])


def test_full_batches_make_a_step_of_gradient_descent(train):
    """Fedsgd, and Fedavg with one batch an epoch, on clients of unequal sizes: one step along the gradient over all."""
    options = {"partition": "quantity", "samples_per_client": None, "rounds": 1}
    run = train("Fedsgd", {"dropout_rate": 0.0}, **options)
    data = datasets.load("digits", "data")
    splits = partition.split(data, run.settings, SEED)
    assert len({len(each.train) for each in splits}) == 3
    model = models.build("mlp", data.spec, 0.0, stream_seed(SEED, "model"))
    inputs, labels = pixels(data, np.concatenate([each.train for each in splits]))
    functional.cross_entropy(model(inputs), labels).backward()
    expected = torch.cat([(p - run.hparams["learning_rate"] * p.grad).detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(run.broadcast[0], expected, rtol=1e-4, atol=1e-6)
    fedavg = train("Fedavg", {"dropout_rate": 0.0, "batch_size": 2000}, **options)
    torch.testing.assert_close(fedavg.broadcast[0], expected, rtol=1e-4, atol=1e-6)


def test_scaffolds_control_variates_sum_up_in_every_round(train):
    """With partial participation and several epochs; those of clients that never trained are zero."""
    run = train("Scaffold", num_clients=5, participation=0.4, rounds=6, local_epochs=2)
    for round in range(6):
        size = run.broadcast.shape[1]
        rows = {name: torch.from_numpy(row[1:]) for name, row in run.rounds[round].items() if name.startswith("client_")}
        total = sum(rows.values())[:size]
        c = torch.from_numpy(run.rounds[round]["broadcast"][1])
        assert c.norm() > 0.01
        torch.testing.assert_close(total, 5 * c, rtol=1e-4, atol=1e-5)


def test_dittos_own_model_without_lambda_is_local_training(train):
    """With momentum, so that the two optimizers of a client must not share theirs; in full batches, whose order is the same."""
    hparams = {"dropout_rate": 0.0, "batch_size": 100, "momentum": 0.9}
    ditto, local = train("Ditto", hparams | {"lambda": 0.0}), train("Local", hparams)
    for client in range(3):
        torch.testing.assert_close(ditto.kept(client), local.kept(client), rtol=1e-4, atol=1e-6)
    start = Flat(models.build("mlp", datasets.REGISTRY["digits"], 0.0, stream_seed(SEED, "model"))).weights
    torch.testing.assert_close(local.broadcast[0], start)


@pytest.mark.parametrize("algorithm", ["Fedper", "Fedrep"])
def test_what_a_client_keeps_never_leaves_it(train, algorithm):
    run = train(algorithm, num_clients=3, rounds=3)
    model = models.build("mlp", datasets.REGISTRY["digits"], 0.5, stream_seed(SEED, "model"))
    flat = Flat(model)
    head = flat.mask_of([classifier_of(model)])
    assert head.sum() == 128 * 10 + 10
    torch.testing.assert_close(run.broadcast[0][head], flat.weights[head])
    assert not torch.allclose(run.broadcast[0][~head], flat.weights[~head])
    own = torch.stack([run.kept(client)[head] for client in range(3)])
    assert (own - own.mean(0)).norm() > 0.01 * own.norm()


def test_fedbabus_head_never_moves_in_training(train):
    run = train("Fedbabu", {"momentum": 0.9, "weight_decay": 0.1})
    model = models.build("mlp", datasets.REGISTRY["digits"], 0.5, stream_seed(SEED, "model"))
    flat = Flat(model)
    head = flat.mask_of([classifier_of(model)])
    assert torch.equal(run.broadcast[0][head], flat.weights[head])
    assert (run.broadcast[0] - flat.weights).norm() > 0.01 * flat.weights.norm()


def test_fedrep_fixes_what_it_does_not_train(train):
    """The head is trained from the global body: with no learning left for the body the upload is the global body."""
    run = train("Fedrep", {"head_epochs": 2, "momentum": 0.9, "weight_decay": 0.1}, rounds=1)
    per = train("Fedper", {"momentum": 0.9, "weight_decay": 0.1}, rounds=1)
    assert not torch.allclose(run.broadcast[0], per.broadcast[0])
    steps = []

    class Client(Quadratic):
        def step(self, optimizer=0, only=None):
            steps.append((optimizer, only.clone()))
            super().step(optimizer, only)

    rep = algorithms.load("Fedrep")({"head_epochs": 2, "learning_rate": 0.1})
    head = torch.tensor([False, False, True])
    rep.kept = lambda client: head
    client = Client(rep, torch.eye(3), torch.ones(3), steps=3)
    client.weights.zero_()
    client.begin(torch.zeros(1, 3, dtype=torch.float64))
    rep.train(client)
    assert [(optimizer, only.tolist()) for optimizer, only in steps] == [(0, head.tolist())] * 6 + [(1, (~head).tolist())] * 3


def test_fedbn_keeps_batchnorm_by_its_type(train):
    """Also those of ResNet's downsampling, whose names do not say "bn"; and their statistics, but not their counters."""
    model = models.build("resnet18", datasets.REGISTRY["digits"], 0.0, 0)
    flat = Flat(model)
    client = types.SimpleNamespace(model=model, mask_of=flat.mask_of)
    kept = algorithms.load("Fedbn")({}).kept(client)
    layers = {name: module for name, module in model.named_modules() if "BatchNorm" in type(module).__name__}
    assert "layer2.0.downsample.1" in layers and len(layers) == 20
    assert kept.sum() == sum(4 * module.num_features for module in layers.values())
    assert kept[flat.num_parameters :].all()


@pytest.mark.parametrize("algorithm", ["Moon", *(name for name in algorithms.REGISTRY if algorithms.load(name).personal)])
def test_evaluation_changes_nothing(train, algorithm):
    """Also where clients train for it; they keep moments, which that could touch."""
    hparams = {"momentum": 0.9} if algorithms.load(algorithm).takes_momentum else {}
    often, rarely = (train(algorithm, hparams, eval_every=rounds) for rounds in (1, 100))
    assert torch.equal(often.broadcast, rarely.broadcast)
    rows = [name for name in rarely.rounds[-1] if name.startswith("client_")]
    assert len(rows) == 3
    assert all(np.array_equal(often.rounds[-1][name], rarely.rounds[-1][name]) for name in rows)


# Quadratics: f_i(w) = (w - a_i)' H_i (w - a_i) / 2


class Quadratic:
    """A client whose loss is a quadratic: the interface of TrainingClient, in float64."""

    def __init__(self, algorithm, hessian, minimum, steps, samples=1.0, relative_size=1.0):
        self.algorithm, self.hessian, self.minimum = algorithm, hessian.double(), minimum.double()
        self.num_steps, self.samples, self.relative_size = steps, samples, relative_size
        self.weights = self.parameters = torch.zeros(len(minimum), dtype=torch.float64)
        self.gradient = torch.zeros_like(self.weights)
        self.state = torch.zeros(algorithm.client_vectors, len(minimum), dtype=torch.float64)
        self.is_new = True
        self.gradients = []

    def begin(self, broadcast):
        self.broadcast, self.global_weights, self.global_parameters = broadcast, broadcast[0], broadcast[0]
        self.weights.copy_(broadcast[0])
        self.steps, self.gradients = 0, []

    def batches(self, epochs=1, is_recorded=True):
        return range(self.num_steps * epochs)

    def backward(self, batch, is_recorded=True):
        self.gradient.copy_(self.hessian @ (self.weights - self.minimum))
        self.gradients.append(self.gradient.clone())

    def step(self, optimizer=0, only=None):
        change = self.algorithm.hparams["learning_rate"] * self.gradient
        self.weights.sub_(change if only is None else change * only)
        self.steps += 1


class Federation:
    """Quadratic clients and the server of an algorithm."""

    def __init__(self, algorithm, hparams, steps, samples, seed=0, dimension=4):
        generator = torch.Generator().manual_seed(seed)
        self.algorithm = algorithms.load(algorithm)({"learning_rate": 0.05, "momentum": 0.0} | hparams)
        self.samples = np.array(samples, dtype=float)
        self.clients = []
        for count, size in zip(steps, samples):
            root = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
            hessian = root @ root.T + 0.5 * torch.eye(dimension, dtype=torch.float64)
            minimum = 3 * torch.randn(dimension, generator=generator, dtype=torch.float64)
            self.clients.append(Quadratic(self.algorithm, hessian, minimum, count, size, size / self.samples.mean()))
        zeros = functools.partial(torch.zeros, dtype=torch.float64)
        self.server = Server(
            zeros(self.algorithm.broadcasts, dimension),
            zeros(self.algorithm.server_vectors, dimension),
            dimension,
            len(self.clients),
        )
        self.algorithm.start(self.server)

    def round(self, chosen=None):
        chosen = list(range(len(self.clients)) if chosen is None else chosen)
        self.server.samples = self.samples[chosen]
        self.server.steps = np.array([self.clients[number].num_steps for number in chosen])
        total = torch.zeros(self.algorithm.uploads, self.server.broadcast.shape[1], dtype=torch.float64)
        for place, (weights, number) in enumerate(zip(zip(*self.algorithm.weights(self.server)), chosen)):
            client = self.clients[number]
            client.begin(self.server.broadcast)
            self.algorithm.train(client)
            upload = torch.zeros_like(total)
            self.algorithm.upload(client, upload)
            client.is_new = False
            self.algorithm.receive(self.server, place, upload)
            total += upload * torch.tensor(weights)[:, None]
        self.algorithm.step(self.server, total)

    def optimum(self):
        shares = self.samples / self.samples.sum()
        return torch.linalg.solve(
            sum(share * client.hessian for share, client in zip(shares, self.clients)),
            sum(share * client.hessian @ client.minimum for share, client in zip(shares, self.clients)),
        )

    def fixed_point(self, scale):
        """Where sum of scale_i (I - (I - eta H_i)^K_i) (x - a_i) is zero."""
        pulls = [
            number
            * (torch.eye(4, dtype=torch.float64) - torch.matrix_power(torch.eye(4) - 0.05 * client.hessian, client.num_steps))
            for number, client in zip(scale, self.clients)
        ]
        return torch.linalg.solve(sum(pulls), sum(pull @ client.minimum for pull, client in zip(pulls, self.clients)))

    def distance(self, point):
        return ((self.server.weights - point).norm() / point.norm()).item()


UNEQUAL = {"steps": [2, 5, 9], "samples": [1, 2, 4]}


def test_fedavgs_fixed_point_is_biased_as_known():
    federation = Federation("Fedavg", {}, **UNEQUAL)
    for _ in range(600):
        federation.round()
    assert federation.distance(federation.fixed_point(federation.samples)) < 1e-9
    assert federation.distance(federation.optimum()) > 0.05


def test_fednova_weighs_clients_by_samples_and_not_by_steps():
    federation = Federation("Fednova", {}, **UNEQUAL)
    for _ in range(2000):
        federation.round()
    assert federation.distance(federation.fixed_point(federation.samples / [2, 5, 9])) < 1e-9
    biased = Federation("Fedavg", {"learning_rate": 1e-3}, **UNEQUAL)
    nova = Federation("Fednova", {"learning_rate": 1e-3}, **UNEQUAL)
    for _ in range(2000):
        biased.round()
        nova.round()
    assert nova.distance(nova.optimum()) < 0.02 < 0.1 < biased.distance(biased.optimum())


def test_a_round_of_fednova():
    """x + tau_eff sum of p_i (y_i - x) / tau_i with tau_eff = sum of p_i tau_i, where y_i is known for a quadratic."""
    federation = Federation("Fednova", {}, **UNEQUAL)
    x = torch.zeros(4, dtype=torch.float64)
    for _ in range(2):
        federation.round()
        shares = federation.samples / 7
        changes = 0
        for share, client in zip(shares, federation.clients):
            shrinks = torch.matrix_power(torch.eye(4) - 0.05 * client.hessian, client.num_steps)
            changes += share / client.num_steps * (client.minimum + shrinks @ (x - client.minimum) - x)
        x = x + (shares * [2, 5, 9]).sum() * changes
        torch.testing.assert_close(federation.server.weights, x)


@pytest.mark.parametrize("chosen", [None, "half"])
def test_scaffold_reaches_the_optimum(chosen):
    federation = Federation("Scaffold", {"server_learning_rate": 1.0}, steps=[3, 3, 3, 3], samples=[1, 1, 1, 1])
    rng = np.random.default_rng(0)
    for _ in range(3000):
        federation.round(None if chosen is None else sorted(rng.choice(4, 2, replace=False)))
    assert federation.distance(federation.optimum()) < 1e-6


def test_scaffolds_control_variate_is_the_mean_gradient_of_the_last_training():
    """Option II, over all steps of all epochs."""
    federation = Federation("Scaffold", {"server_learning_rate": 1.0}, steps=[2, 5], samples=[1, 3])
    for _ in range(3):
        federation.round()
        for client in federation.clients:
            torch.testing.assert_close(client.state[0], torch.stack(client.gradients).mean(0))


@pytest.mark.parametrize("chosen", [None, "half"])
def test_feddyn_reaches_the_optimum_of_the_loss_over_all_samples(chosen):
    federation = Federation("Feddyn", {"alpha": 1.0}, steps=[60] * 4, samples=[1, 2, 3, 4])
    rng = np.random.default_rng(0)
    for _ in range(300):
        federation.round(None if chosen is None else sorted(rng.choice(4, 2, replace=False)))
    assert federation.distance(federation.optimum()) < 1e-6


def test_feddyns_server_term_is_the_mean_of_all_clients_terms():
    """Also with partial participation."""
    federation = Federation("Feddyn", {"alpha": 0.5}, steps=[3] * 4, samples=[1] * 4)
    for chosen in ([0, 1], [1, 3], [2]):
        federation.round(chosen)
        mean = sum(client.state[0] for client in federation.clients) / 4
        torch.testing.assert_close(federation.server.state[0], mean)


def test_feddyns_terms_act_once_the_weights_have_left():
    federation = Federation("Feddyn", {"alpha": 0.5}, steps=[1], samples=[1])
    client = federation.clients[0]
    client.begin(torch.ones(1, 4, dtype=torch.float64))
    for expected in (0.0, 0.5):
        client.backward(None)
        before = client.gradient.clone()
        federation.algorithm.correct_gradient(client)
        torch.testing.assert_close(client.gradient - before, torch.full((4,), expected, dtype=torch.float64))
        client.weights.add_(1)


def test_dittos_own_model_is_held_near_the_old_global_weights():
    federation = Federation("Ditto", {"lambda": 0.7}, steps=[3, 3], samples=[1, 1])
    own = [torch.zeros(4, dtype=torch.float64) for _ in federation.clients]
    for _ in range(2):
        old = federation.server.weights.clone()
        federation.round()
        for v, client in zip(own, federation.clients):
            for _ in range(3):
                v -= 0.05 * (client.hessian @ (v - client.minimum) + 0.7 * (v - old))
            torch.testing.assert_close(client.state[0], v)


def test_apfl_mixes_its_vector_with_the_local_weights():
    federation = Federation("Apfl", {"alpha": 0.25}, steps=[2], samples=[1])
    client = federation.clients[0]
    w = v = torch.zeros(4, dtype=torch.float64)
    for _ in range(3):
        federation.round()
        for _ in range(2):
            w = w - 0.05 * client.hessian @ (w - client.minimum)
            v = v - 0.05 * 0.25 * client.hessian @ (0.25 * v + 0.75 * w - client.minimum)
        torch.testing.assert_close(client.state[0], v)
        torch.testing.assert_close(federation.server.weights, w)


def test_pfedmes_models_are_proximal_points():
    """With many inner steps theta is the minimum of f + lambda/2 |theta - w|^2, a linear system for a quadratic."""
    hparams = {"lambda": 2.0, "inner_steps": 3000, "personal_learning_rate": 0.02, "beta": 1.0}
    federation = Federation("Pfedme", hparams, steps=[2], samples=[1])
    client = federation.clients[0]
    w = torch.zeros(4, dtype=torch.float64)
    for _ in range(2):
        federation.round()
        for _ in range(2):
            theta = torch.linalg.solve(client.hessian + 2 * torch.eye(4), client.hessian @ client.minimum + 2 * w)
            w = w - 0.05 * 2 * (w - theta)
        torch.testing.assert_close(client.state[0], theta)
        torch.testing.assert_close(federation.server.weights, w)


# The servers' steps, beside a second writing of the papers' formulas


@pytest.mark.parametrize("algorithm", ["Fedavgm", "Fedadagrad", "Fedadam", "Fedyogi"])
def test_server_optimizers(algorithm):
    hparams = {"server_learning_rate": 0.3, "server_momentum": 0.9, "beta1": 0.9, "beta2": 0.99, "tau": 0.01}
    if algorithm == "Fedadagrad":
        del hparams["beta1"]
    this = algorithms.load(algorithm)(hparams)
    server = Server(torch.ones(1, 3), torch.zeros(this.server_vectors, 3), num_parameters=2, num_clients=4)
    this.start(server)
    x, m, v = np.ones(2), np.zeros(2), np.full(2, 0.01**2)
    for average in ([2.0, 0.5, 8.0], [1.5, 0.6, 9.0], [1.4, 0.2, 7.0]):
        this.step(server, torch.tensor([average]))
        delta = np.array(average[:2]) - x
        if algorithm == "Fedavgm":
            m = 0.9 * m + delta
            x = x + 0.3 * m
        else:
            m = delta if algorithm == "Fedadagrad" else 0.9 * m + 0.1 * delta
            v = {
                "Fedadagrad": v + delta**2,
                "Fedadam": 0.99 * v + 0.01 * delta**2,
                "Fedyogi": v - 0.01 * delta**2 * np.sign(v - delta**2),
            }[algorithm]
            x = x + 0.3 * m / (np.sqrt(v) + 0.01)
        np.testing.assert_allclose(server.weights[:2], x, rtol=1e-5)
        assert server.weights[2] == average[2]  # a BatchNorm statistic is averaged as it is


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_effective_steps_are_what_gradients_count_under_momentum(momentum):
    for steps in (1, 2, 7):
        velocity, total = np.zeros(steps), np.zeros(steps)
        for step in range(steps):
            velocity = momentum * velocity + np.eye(steps)[step]
            total += velocity
        assert effective_steps(steps, momentum) == pytest.approx(total.sum())


@pytest.mark.parametrize(
    ("samples", "sizes"), [(1, [1]), (64, [64]), (65, [65]), (66, [64, 2]), (129, [64, 65]), (130, [64, 64, 2])]
)
def test_no_batch_is_of_one_sample_and_none_is_dropped(samples, sizes):
    assert batch_sizes(samples, {"batch_size": 64}) == sizes


def test_weights_are_shares_among_those_that_answered():
    server = Server(torch.zeros(2, 1), None, 1, num_clients=10, samples=np.array([1.0, 3.0]), steps=np.array([1, 3]))
    assert algorithms.load("Fedavg")({}).weights(server)[0].tolist() == [0.25, 0.75]
    shares, changes = algorithms.load("Scaffold")({}).weights(server)
    assert list(shares) == [0.25, 0.75] and changes == [0.1, 0.1]


@pytest.mark.parametrize("algorithm", algorithms.REGISTRY)
def test_the_registry_has_defaults_and_draws(algorithm):
    """For each local optimizer that it is defined for; the draws keep the bounds that values by hand have to keep."""
    from hparams_registry import check_hparams

    for optimizer in algorithms.load(algorithm).local_optimizers:
        default = default_hparams(algorithm, "digits", optimizer)
        for seed in range(1, 30):
            drawn = random_hparams(algorithm, "digits", seed, optimizer)
            assert drawn.keys() == default.keys()
            assert check_hparams(drawn, algorithm, "digits", optimizer) == drawn


# Through the real command


ALL = ("--num_trials", 1, "--num_hparams", 1, "--algorithm", *algorithms.REGISTRY)
STATEFUL = ("--num_clients", 4, "--participation", 0.5, "--partition", "dirichlet", "--samples_per_client", 100)


@pytest.mark.slow
def test_clients_keep_their_state_in_whichever_process_they_are(launch_here, tmp_path):
    """All algorithms in one launch, with kept moments where they allow it; the same bits with one process and with three."""

    for processes in (1, 3):
        options = ("--rounds", 3, "--local_optimizer", "sgd", "--hparams", '{"momentum": 0.5}', "--client_processes", processes)
        launched = launch_here(tmp_path / str(processes), *STATEFUL, *ALL, *options)
        assert launched.returncode == 0, launched.stderr
    found = results(tmp_path / "1")
    assert len(found) == len(algorithms.REGISTRY) and found == results(tmp_path / "3")


@pytest.mark.slow
@pytest.mark.process
def test_clients_keep_their_state_over_a_kill(launch_here, tmp_path):
    """One trial of each algorithm, interrupted after some rounds by SIGKILL of all its processes."""

    out, options = tmp_path / "out", ("--rounds", 30, "--optimizer_state", "keep", "--checkpoint_seconds", 0)
    kept = [name for name in algorithms.REGISTRY if algorithms.load(name).keeps_moments]
    command = (*STATEFUL, *ALL[:4], "--algorithm", *kept, *options)
    sweep = Sweep(out, *map(str, command), "--retries", "1")
    killed = set()
    while sweep.process.poll() is None:
        for path in out.glob(f"*/*/trial_0/{checkpoint.CHECKPOINT}"):
            if path.parent not in killed:
                killed.add(path.parent)
                for pid in processes_of(path.parent).values():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)  # not to take the trials' core
    assert sweep.wait()[0] == 0
    assert len(killed) == len(kept)
    assert launch_here(tmp_path / "calm", *command, "--checkpoint_seconds", 10).returncode == 0
    assert results(out) == results(tmp_path / "calm")


@pytest.mark.slow
def test_defaults_work_on_digits(launch_here, tmp_path):
    """No divergence over five seeds, and a better model than guessing: the global one, or the clients' own."""
    launched = launch_here(tmp_path, *ALL, "--num_trials", 5, "--rounds", 12, "--samples_per_client", 700, "--eval_every", 12)
    assert launched.returncode == 0, launched.stderr
    for path in tmp_path.rglob("results.json"):
        record = json.loads(path.read_text())
        name = "test_acc" if record["has_global_model"] else "local_acc_weighted"
        assert record["curves"][name][-1] > 0.3, (record["settings"]["algorithm"], record["curves"][name])


@pytest.mark.slow
@pytest.mark.process
def test_defaults_work_on_data_with_owners(call, tmp_path):
    """As above, on the four hospitals, with a model that is a classifier alone."""
    options = ("--skip_confirmation", "--output_dir", tmp_path / "out", "--dataset", "heart_disease", "--rounds", 20)
    launched = call("sweep.py", "launch", *options, *ALL)
    assert launched.returncode == 0, launched.stderr
    for name in algorithms.REGISTRY:
        (path,) = (tmp_path / "out").glob(f"*_{name}/*/*/results.json")
        assert json.loads(path.read_text())["curves"]["local_acc_weighted"][-1] > 0.6, name


def test_an_optimizer_that_an_algorithm_is_not_defined_for_is_refused(launch_here, tmp_path):
    refused = launch_here(tmp_path / "out", "--algorithm", "Fedavg", "scaffold", "--local_optimizer", "adam")
    assert refused.returncode == 2 and not (tmp_path / "out").exists()
    assert refused.stderr.splitlines()[-1].endswith("--local_optimizer adam: scaffold is defined for sgd only")
