"""The part `pfl`: the workload on which Granqvist et al. (NeurIPS 2024, table 1) compared frameworks, on random images: 1,000
clients of 50 samples of CIFAR-10's shape, 50 of them a round, batches of 10, one epoch, evaluation every 10 rounds. Ours holds
out samples of each client besides, on which it evaluates too."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import torch
from common import PROJECT, cifar, launch, places, synchronize
from steps import worker_of
from torch import nn

from benchmarks.overhead import options_of
from benchmarks.plain import accuracy
from federated import models
from federated.data import partition
from federated.learning.device_data import DeviceData
from federated.seeds import stream_seed
from federated.settings import Settings
from hparams_registry import default_hparams

CLIENTS, SAMPLES, CHOSEN, BATCH, EVERY, ROUNDS, ALL_ROUNDS = 1000, 50, 50, 10, 10, 150, 1500
MODEL, RATE = "cnn_femnist", 0.1


def rows(device, tiny):
    clients, chosen, rounds, test = (20, 2, 4, 50) if tiny else (CLIENTS, CHOSEN, ROUNDS, 10_000)
    samples = 56  # of which 6 are held out
    settings = Settings(
        model_arch=MODEL,
        dataset="cifar10",
        num_clients=clients,
        participation=chosen / clients,
        samples_per_client=samples,
        local_optimizer="sgd",
        rounds=rounds,
        eval_every=EVERY,
        device=device,
    )
    hparams = default_hparams("Fedavg", "cifar10", "sgd") | {"batch_size": BATCH, "learning_rate": RATE}
    data = cifar(clients * samples, test)

    def row(way, rounds, seconds, **more):
        projected = ALL_ROUNDS * seconds / rounds / 60
        return {"way": way, "rounds": rounds, "seconds": seconds, "minutes_of_1500_rounds": projected, **more}

    options = [*options_of(settings), "--num_hparams", 1, "--num_trials", 1]
    options += ["--hparams", f'{{"batch_size": {BATCH}, "learning_rate": {RATE}, "momentum": 0, "weight_decay": 0}}']
    with places(clients * samples, test) as (data_dir, output_dir):
        for processes, share in ((1, 1), (2, 3), (4, 3)):
            if tiny and processes > 2:
                continue
            these = [*options, "--client_processes", processes, "--rounds", max(2, rounds // share)]
            wall, results = launch(data_dir, output_dir / str(processes), device, *these)
            (content,) = results.values()
            seconds = content["provenance"]["seconds"]
            parts = {f"s_{stage}": seconds[stage] for stage in ("training", "evaluation")}
            name = f"this sweep, {processes} client processes"
            yield row(name, max(2, rounds // share), seconds["rounds"], **parts, s_with_start=wall)
    yield row("captured arithmetic", *arithmetic(settings, hparams, data, rounds, device))
    yield row("plain loop", *plain(settings, hparams, data, max(2, rounds // 3), device))
    if importlib.util.find_spec("pfl") is None:
        print("pfl itself is not installed: pip install pfl, or PYTHONPATH with its wheel unpacked")
        return
    command = [sys.executable, str(pathlib.Path(__file__).with_name("pfl_itself.py"))]
    command += list(map(str, (clients, chosen, max(2, rounds // 3), test)))
    paths = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "PFL_PYTORCH_DEVICE": device}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"pfl failed:\n{done.stderr[-3000:]}")
    yield row("pfl", max(2, rounds // 3), float(done.stdout.split()[-1]))


def arithmetic(settings, hparams, data, rounds, device):
    """(rounds, seconds) of the same training and evaluation in one process, without a server."""
    worker = worker_of(settings, hparams, data, partition.split(data, settings, 0))
    rng, blocks = np.random.default_rng(0), range(len(worker.plan.blocks))

    def one(round):
        worker.receive()
        if round % EVERY == 0:
            worker.evaluate(blocks, round)
        for number in rng.choice(settings.num_clients, settings.participants, replace=False).tolist():
            worker.train(number, round).metrics()

    one(0)  # captures
    start = time.perf_counter()
    for round in range(rounds):
        one(round)
    synchronize(device)
    return rounds, time.perf_counter() - start


def plain(settings, hparams, data, rounds, device):
    """(rounds, seconds) of a plain PyTorch loop in one process, with the samples on the device, averaging there."""
    splits = partition.split(data, settings, 0)
    on_device = DeviceData(data, settings, torch.device(device))
    images, labels = on_device.gather(False, torch.arange(len(data.train_labels)))
    test_images, test_labels = on_device.gather(True, torch.arange(len(data.test_labels)))
    indices = [torch.from_numpy(each.train).to(device) for each in splits]
    model = models.build(MODEL, data.spec, hparams["dropout_rate"], 0).to(device)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = np.random.default_rng(0)

    def one(round):
        nonlocal state
        average = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        for number in rng.choice(len(splits), settings.participants, replace=False):
            model.load_state_dict(state)
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
            torch.manual_seed(stream_seed(0, int(number), round, "dropout"))
            for batch in indices[number][torch.randperm(len(indices[number]), device=device)].split(BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
            for name, tensor in model.state_dict().items():
                average[name].add_(tensor, alpha=1 / settings.participants)
        state = average
        if round % EVERY == 0:
            model.load_state_dict(state)
            accuracy(model, test_images, test_labels)

    one(0)
    synchronize(device)
    start = time.perf_counter()
    for round in range(rounds):
        one(round)
    synchronize(device)
    return rounds, time.perf_counter() - start


def decisions(rows):
    minutes = {row["way"]: row["minutes_of_1500_rounds"] for row in rows}
    ours = {way: value for way, value in minutes.items() if way.startswith("this sweep")}
    if not ours:
        return
    first, best = next(iter(ours)), min(ours, key=ours.get)
    if ours[best] < 0.9 * ours[first]:
        yield f"{best} take {ours[best] / ours[first]:.2f} of one's time: raise the default of --client_processes on a GPU"
    else:
        yield "more client processes on the device gain nothing: one stays the default"
    for other, wanted in (("captured arithmetic", 1.5), ("pfl", 1 / 3), ("plain loop", None)):
        if other in minutes:
            share = ours[best] / minutes[other]
            verdict = "" if wanted is None else f", wanted at most {wanted:.2f}: {'met' if share <= wanted else 'not met'}"
            yield f"this sweep takes {share:.2f} of the time of {other}{verdict}"
