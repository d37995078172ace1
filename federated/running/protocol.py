"""The messages between a trial's server and its client processes, in the order in which a trial sends them.

Each function writes one message, which is a small JSON object. Its receiver may call the same function with a type or a
predicate in place of a value: the result is the schema that `channel.matches` checks what arrives against.
"""

import dataclasses
import math

from federated import version
from federated.settings import Settings


def hello(process: int | None, trial: str | None = None) -> dict:
    """Client process -> server, once it has proved that it has the key: its number and the id of the trial that it was started
    for, if it was given them."""
    return ({} if process is None else {"process": process}) | ({} if trial is None else {"trial": trial})


def refusal(reason: str) -> dict:
    """Server -> client process: it may not join."""
    return {"refused": reason}


def welcome(process: int, processes: int, settings: Settings, hparams: dict, trial_seed: int, memory: dict) -> dict:
    """Server -> client process: what the trial computes, and the `shapes` of the memory that follows."""
    return {
        "code": version.code(),
        "extensions": {each.path.name: each.digest for each in version.LOADED.values()},
        "process": process,
        "processes": processes,
        "settings": dataclasses.asdict(settings),
        "hparams": hparams,
        "trial_seed": trial_seed,
        "memory": memory,
    }


def ready(device: object) -> dict:
    """Client process -> server: it has loaded the data and computes on this device."""
    return {"ready": device}


READY_SCHEMA = ready(str)


def work(round: int, evaluate: bool, train: list[tuple[int, int]]) -> dict:
    """Server -> client process, with the rows that it needs: evaluate the weights of `round`, train these clients from them,
    each on so many batches."""
    return {"round": round, "evaluate": evaluate, "train": train}


def is_duration(value: object) -> bool:
    """Whether a value is a number of seconds."""
    return type(value) is float and 0 <= value < math.inf


ALIVE = {"alive": True}  # client process -> server, now and then: its work makes progress


def evaluated(round: int, seconds: object) -> dict:
    """Client process -> server, with the rows of its blocks: their evaluation is done."""
    return {"evaluated": round, "seconds": {"evaluation": seconds}}


def evaluated_schema(round: int) -> dict:
    return evaluated(round, is_duration)


def trained(client: int, loss: object, accuracy: object, seconds: object) -> dict:
    """Client process -> server, with the update and what the client keeps: a client has trained,
    with these means over its samples."""
    return {"trained": client, "loss": loss, "accuracy": accuracy, "seconds": {"training": seconds}}


def trained_schema(client: int) -> dict:
    return trained(client, float, float, is_duration)


def added(client: int) -> dict:
    """Server -> client process: the update of `client` is added to the sum, so its row may take the next one."""
    return {"added": client}


STOP = {"stop": True}  # server -> client process: the trial is over
