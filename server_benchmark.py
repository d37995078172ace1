"""The server of one trial: it makes the model, leads the rounds, and writes the results.

By hand, in a terminal each, with any of the settings below:

    python server_benchmark.py --output_dir my_trial --client_processes 2
    python client_benchmark.py --host ADDRESS          (twice; the server prints ADDRESS)

With --host HOST:PORT clients may run on other machines. Messages are then authenticated by the secret in FEDERATED_KEY,
but not encrypted.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import pathlib
import platform
import resource
import sys
import time

import numpy as np

from federated import algorithms, checkpoint, datasets, partition, version
from federated.channel import Door, Hub, Memory, PeerLost, is_duration
from federated.evaluation import BLOCK, Plan
from federated.files import write_atomically
from federated.lock import Lock
from federated.options import Parser, UsageError, address, directory, json_object, whole
from federated.processes import (
    GIVER_VARIABLE,
    MOST_PROCESSES,
    add_run_arguments,
    add_server_arguments,
    end_with_parent,
    exit_code_of,
)
from federated.record import Record
from federated.seeds import stream_seed
from federated.settings import add_arguments, check_has_model, check_tensorboard, settings_from
from federated.trial import MODEL, Diverged, Trial
from hparams_registry import check_hparams, default_hparams

# The most of a trial's time that goes into checkpoints, if they are not asked for after each round
CHECKPOINT_SHARE = 0.05


def parse(argv):
    parser = Parser(prog="server_benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=directory, required=True, metavar="DIR", help="the trial's directory")
    parser.add_argument("--trial_seed", type=whole(0), default=0, metavar="INT", help="seed of all that is random in it")
    parser.add_argument(
        "--hparams", type=json_object, default={}, metavar="JSON", help="hyper-parameters; default: the registry's defaults"
    )
    parser.add_argument("--hparams_seed", type=whole(0), default=0, metavar="INT", help="recorded with the results")
    parser.add_argument(
        "--host", type=address, metavar="ADDRESS", help="HOST:PORT to listen at; default: a private Unix socket"
    )
    parser.add_argument(
        "--client_processes",
        type=whole(1, MOST_PROCESSES),
        metavar="INT",
        help="client processes to wait for; default: one a participant",
    )
    add_run_arguments(parser)
    add_server_arguments(parser)
    add_arguments(parser)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    return exit_code_of(lambda: run(args))


def run(args):
    """Hold the trial's lock and open its door while the trial is served."""
    settings = settings_from(args)
    draw = (settings.algorithm, settings.dataset, settings.local_optimizer)
    hparams = default_hparams(*draw) | check_hparams(args.hparams, *draw)
    if args.tensorboard:
        check_tensorboard()
    this = Trial(settings, hparams, args.hparams_seed, args.trial_seed, pathlib.Path(args.output_dir))
    try:
        this.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir: {args.output_dir!r} cannot be made ({error.strerror}): name another") from error
    giver = int(os.environ.pop(GIVER_VARIABLE, "0"))
    lock, door = Lock(this.directory, giver=giver), None
    try:
        door = Door(args.host)
        end_with_parent(lambda: (door.close(), lock.release()))
        serve(this, door, args.client_processes or settings.participants, args)
    except (PeerLost, Diverged) as error:
        if not giver:  # a launcher sees all processes, so it knows the cause better
            this.record_failure("server", str(error))
        raise
    finally:
        if door is not None:
            door.close()
        lock.release()


def serve(this: Trial, door, processes: int, args):
    """Lead the trial from the first client's joining to the results. Returns the broadcast vectors after the last round."""
    from federated import models
    from federated.algorithms.fedavg import Server
    from federated.flat import Flat
    from federated.training import batch_sizes, row_size_of, torch

    clock = Clock()

    # The settings, the data and the initial model
    settings, hparams = this.settings, this.hparams
    torch.set_num_threads(settings.threads)
    algorithm = algorithms.load(settings.algorithm)(hparams)
    dataset = datasets.load(settings.dataset, args.data_dir)
    parts = partition.split(dataset, settings, this.trial_seed)
    plan = Plan(parts, len(dataset.test_labels), algorithm.personal)
    model = models.build(settings.model_arch, dataset.spec, hparams["dropout_rate"], stream_seed(this.trial_seed, "model"))
    flat = Flat(model)
    if args.save_model:
        check_has_model(settings)
    keeps = row_size_of(settings, hparams, flat)
    memory = Memory(
        {
            "broadcast": (algorithm.broadcasts, flat.size),
            "updates": (processes, algorithm.uploads * flat.size),
            "clients": (settings.num_clients, keeps),
            "evaluation": (len(plan.blocks), 2 * BLOCK),
        },
        shared=True,
    )
    server = Server(
        broadcast=torch.from_numpy(memory.broadcast),
        state=torch.zeros(algorithm.server_vectors, flat.size),
        num_parameters=flat.num_parameters,
        num_clients=settings.num_clients,
    )
    server.weights.copy_(flat.weights)
    algorithm.start(server)
    updates = [torch.from_numpy(row).view(algorithm.uploads, -1) for row in memory.updates]
    average = torch.empty(algorithm.uploads, flat.size)
    samples = np.array([len(part.train) for part in parts])
    if algorithm.pooled:
        samples = np.array([samples.sum()])
    steps = np.array([settings.local_epochs * len(batch_sizes(int(count), hparams)) for count in samples])
    del model, flat

    # What an earlier run of the trial has left to go on from
    vector_bytes = memory.broadcast[0].nbytes
    record = Record(settings, plan, parts, (algorithm.broadcasts + algorithm.uploads) * vector_bytes)
    saved = {"broadcast": memory.broadcast, "server_state": server.state.numpy(), **record.arrays}
    selected = torch.empty_like(server.weights) if args.save_model else None
    if selected is not None:
        saved[SELECTED] = selected.numpy()
    runs = [{"round": 0, "code": version.CODE, "git_revision": version.git_revision(), "time": time.strftime("%FT%T%z")}]
    stored = checkpoint.load(this.directory)
    if stored is not None and selected is not None and SELECTED not in stored[1]:
        print("starts anew: the checkpoint was made without --save_model, so the best model so far is lost", flush=True)
        stored = None
    if stored is not None:
        runs = resume(this, stored, runs[0], saved, memory.clients)
    first_round, have_trained = runs[-1]["round"], set(record.trained_clients())
    events = None
    if args.tensorboard:
        from federated.events import Events

        events = Events(this, record)

    # The client processes
    clock.note("start")
    print(f"waiting for {processes} client processes at {door.address}", flush=True)
    channels = []
    for process, channel in enumerate(door.admit(processes, args.timeout)):
        channel.send(
            {
                "code": version.CODE,
                "process": process,
                "processes": processes,
                "settings": dataclasses.asdict(settings),
                "hparams": hparams,
                "trial_seed": this.trial_seed,
                "memory": memory.shapes,
            }
        )
        channel.send_memory(memory)
        channel.expect({"ready": str})
        channels.append(channel)
    door.close()
    hub = Hub(channels, args.timeout, sign_of_life=SignOfLife())
    devices = [None] * processes
    while None in devices:
        process, message = hub.receive([process for process in range(processes) if devices[process] is None])
        devices[process] = message["ready"]

    clock.note("join")
    blocks_of = [plan.blocks_of(process, processes) for process in range(processes)]
    own_of = [{plan.blocks[block].client for block in blocks} - {None} for blocks in blocks_of]  # evaluated by their own model

    def ask(round, evaluate, training) -> dict:
        """Have the processes evaluate the weights they are sent and train the clients `training` from them, whose uploads
        are summed in `average`. Returns the clients' messages."""
        server.samples, server.steps = samples[training], steps[training]
        weights = algorithm.weights(server) if training else []
        hub.expect(range(processes))
        for process, channel in enumerate(channels):
            mine = training[process::processes]
            rows = [("broadcast", row) for row in range(algorithm.broadcasts)]
            if keeps:
                own = own_of[process] if evaluate else set()
                rows += [("clients", client) for client in sorted(own.union(mine))]
            channel.send({"round": round, "evaluate": evaluate, "train": mine}, rows)
            if evaluate:
                form = {"evaluated": round, "seconds": {"evaluation": is_duration}}
                channel.expect(form, [("evaluation", block) for block in blocks_of[process]])
            for client in mine:
                form = {"trained": client, "loss": float, "accuracy": float, "seconds": {"training": is_duration}}
                channel.expect(form, [("updates", process)] + [("clients", client)] * bool(keeps))

        if events is not None:  # while the processes work
            events.write(round - 1)

        # Updates arrive in any order and are added in that of the clients. Waited for are those that evaluate and the one
        # whose update is next: another may itself be waiting, for its last update to be added.
        arrived, added, evaluating = {}, 0, set(range(processes)) if evaluate else set()
        while added < len(training) or evaluating:
            next_one = {added % processes} if added < len(training) else set()
            process, message = hub.receive(evaluating | next_one)
            clock.add(message.pop("seconds"))
            if "evaluated" in message:
                evaluating.remove(process)
                continue
            arrived[message["trained"]] = message
            while added < len(training) and training[added] in arrived:
                process = added % processes
                for upload, total, weight in zip(updates[process], average, weights):
                    if added:
                        total.add_(upload, alpha=weight[added])
                    else:
                        torch.mul(upload, weight[added], out=total)
                if added + processes < len(training):
                    channels[process].send({"added": training[added]})
                    hub.expect([process])
                added += 1
        return arrived

    def note_evaluation(round):
        record.evaluated(round, memory.evaluation)
        if selected is not None and round == record.best_round():
            selected.copy_(server.weights)

    # The rounds. One message asks for the evaluation of the weights it brings and for training from them, so that there is
    # one wait a round: the evaluation of round r's model runs before the training of round r + 1. Where clients have models
    # of their own, training would change them while others evaluate.
    next_checkpoint = time.monotonic() + args.checkpoint_seconds
    for round in range(first_round, settings.rounds + 1):
        start = time.perf_counter()
        evaluate = round % settings.eval_every == 0 or round == settings.rounds
        training = participants(settings, this.trial_seed, round, algorithm.pooled) if round < settings.rounds else []
        if evaluate and training and algorithm.personal:
            ask(round, True, [])
            note_evaluation(round)
            evaluate = False
        arrived = ask(round, evaluate, training)
        if evaluate:
            note_evaluation(round)
        if training:
            if not math.isfinite(average.sum()):
                raise Diverged(f"diverged: an update of round {round + 1} of {settings.rounds} is not finite")
            algorithm.step(server, average)
            record.trained(round, arrived, time.perf_counter() - start)
            have_trained.update(training)
            if time.monotonic() >= next_checkpoint:
                this.check_not_taken_over()
                begin = time.monotonic()
                rows = {f"client_{client}": memory.clients[client] for client in sorted(have_trained) if keeps}
                checkpoint.save(this.directory, {"round": round + 1, "trial": this.identity(), "runs": runs}, saved | rows)
                took = time.monotonic() - begin
                if args.checkpoint_seconds:  # of large models and many clients writing may take long
                    next_checkpoint = time.monotonic() + max(args.checkpoint_seconds, took / CHECKPOINT_SHARE)
                clock.add({"checkpoint": took})
    for channel in channels:
        channel.send({"stop": True})
    hub.close()
    if events is not None:
        events.finish()
    clock.note("rounds")
    provenance = describe() | {"devices": devices, "seconds": clock.seconds, "runs": runs, "failures": this.failures()}
    provenance["data_dir"] = os.path.abspath(args.data_dir)
    provenance["server_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    this.check_not_taken_over()
    if selected is not None:
        write_model(this.directory / MODEL, settings, dataset.spec, hparams, selected)
    told = {"personal": algorithm.personal, "has_global_model": algorithm.has_global_model}
    this.write_results(this.description() | told | record.results() | {"provenance": provenance}, record.clients())
    this.forget_attempts()
    return server.broadcast


def resume(this: Trial, stored, run: dict, saved: dict, client_rows) -> list[dict]:
    """Put the `stored` checkpoint back into the arrays of `saved` and the clients' rows. Returns the runs of the trial, of
    which this `run` is the last. Raises UsageError where it is another trial's."""
    state, arrays = stored
    if SELECTED not in saved:  # then --save_model was given to the run before and is not to this one
        arrays.pop(SELECTED, None)
    if state["trial"] != this.identity():
        raise UsageError(
            f"{str(this.directory)!r} holds the checkpoint of a trial with other settings: give those, or another --output_dir"
        )
    for name, array in arrays.items():
        target = saved[name] if name in saved else client_rows[int(name.removeprefix("client_"))]
        target[...] = array
    print(f"goes on after round {state['round']}", flush=True)
    before = state["runs"][-1]
    if before["code"] != run["code"]:
        print(
            f"the code has changed since round {before['round']}: it was {before['code']} (revision {before['git_revision']}) "
            f"and is {run['code']} (revision {run['git_revision']})",
            flush=True,
        )
    return [*state["runs"], run | {"round": state["round"]}]


SELECTED = "selected_model"  # in a checkpoint


def write_model(path: pathlib.Path, settings, spec, hparams, weights):
    """Write the model with `weights` [size] as a plain state_dict, which torch loads without this project."""
    from federated import models
    from federated.flat import Flat
    from federated.training import torch

    model = models.build(settings.model_arch, spec, hparams["dropout_rate"], 0)
    Flat(model).weights.copy_(weights)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_atomically(path, lambda file: torch.save(tensors, file))


def participants(settings, trial_seed, round, pooled) -> list[int]:
    """The clients that train in `round`, in the order of their numbers; the first one for all where data is pooled."""
    if pooled:
        return [0]
    if settings.participants == settings.num_clients:
        return list(range(settings.num_clients))
    rng = np.random.default_rng(stream_seed(trial_seed, round, "participants"))
    return sorted(rng.choice(settings.num_clients, settings.participants, replace=False).tolist())


class Clock:
    """Where the time of a trial goes: the server's own stages, and of its rounds what clients computed."""

    def __init__(self):
        self.seconds = {}
        self._last = time.perf_counter()

    def note(self, stage):
        """What went by since the last note was `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now

    def add(self, seconds):
        for stage, more in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + more


class SignOfLife:
    """Touches the log, at most once a second: who started the server tells by that whether it still works."""

    def __init__(self):
        self._touched = 0.0

    def __call__(self):
        if time.monotonic() - self._touched > 1:
            self._touched = time.monotonic()
            with contextlib.suppress(OSError):  # a closed terminal, a pipe
                os.utime(sys.stdout.fileno())


def describe() -> dict:
    """Where the results come from."""
    import torch

    return {
        "git_revision": version.git_revision(),
        "argv": sys.argv,
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
    }


if __name__ == "__main__":
    sys.exit(main())
