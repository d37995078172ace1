"""The server of one trial: set up, resume, accept the client processes, lead the rounds, finish.

Read `run` first: it is the loop over rounds. One exchange of messages a round asks the client processes for the evaluation of
the weights that it brings and for training from them.
"""

import contextlib
import dataclasses
import functools
import math
import os
import resource
import sys
import time

import numpy as np
import torch

from federated import algorithms, models, privacy, version
from federated.algorithms.fedavg import Server
from federated.data import datasets, partition
from federated.learning import compression
from federated.learning.client_row import RowLayout
from federated.learning.device_data import batch_sizes
from federated.learning.evaluation import BLOCK, EvaluationPlan
from federated.learning.flat import Flat
from federated.learning.memory import SharedMatrices
from federated.learning.record import SELECTED, Record
from federated.options import UsageError
from federated.running import checkpoint, participants, private_average, protocol, provenance
from federated.running.channel import Channel, Hub, naming
from federated.running.listener import AnyListener
from federated.running.observers import BestModel, Checkpoints, Clock, EventFile, Observer
from federated.seeds import stream_seed
from federated.settings import ServerOptions, Settings, check_has_model
from federated.trial import DivergedError, Trial


def serve(trial: Trial, listener: AnyListener, processes: int, options: ServerOptions) -> torch.Tensor:
    """Lead a trial from its first client process's joining to its results. Returns the broadcast vectors [broadcasts, size]
    after the last round."""
    server = TrialServer(trial, processes, options)
    server.resume()
    server.accept_clients(listener)
    server.run()
    return server.finish()


class TrialServer:
    """A trial as its server sees it.

    memory      what the server and its client processes share, see `_shared_memory`
    state       the data of the algorithm's server half: the broadcast vectors and its own
    average     [uploads, size]: the weighted sum of the updates of the last exchange
    record      the metrics so far
    runs        of each run of the trial, this one last: the round it began after, its code and its time
    """

    def __init__(self, trial: Trial, processes: int, options: ServerOptions) -> None:
        """Load the data, make the initial model from the trial's seed, and lay out the memory."""
        self.clock = Clock()
        self.trial, self.processes, self.options = trial, processes, options
        self.settings, hparams = trial.settings, trial.hparams
        torch.set_num_threads(self.settings.threads)
        self.algorithm = algorithms.load(self.settings.algorithm)(hparams)
        if options.save_model:
            check_has_model(self.settings)
        self._is_private = self.settings.dp_clip is not None
        data = datasets.load(self.settings.dataset, options.data_dir)
        self.spec = data.spec
        if self._is_private:
            models.check_has_no_statistics(self.settings.model_arch, data.spec)
        splits = partition.split(data, self.settings, trial.trial_seed)
        self.plan = EvaluationPlan(splits, partition.test_set(data, self.settings, splits), self.algorithm.personal)
        seed = stream_seed(trial.trial_seed, "model")
        flat = Flat(models.build(self.settings.model_arch, data.spec, hparams["dropout_rate"], seed))
        self.memory = self._shared_memory(flat)
        self.state = Server(
            broadcast=torch.from_numpy(self.memory.broadcast),
            state=torch.zeros(self.algorithm.server_vectors, flat.size),
            num_parameters=flat.num_parameters,
            num_clients=self.settings.num_clients,
        )
        self.state.weights.copy_(flat.weights)
        self.algorithm.start(self.state)
        self.average = torch.empty(self.algorithm.uploads, flat.size)
        self._updates = [torch.from_numpy(row).view(self.algorithm.uploads, -1) for row in self.memory.updates]
        samples = np.array([len(each.train) for each in splits])
        self._samples = np.array([samples.sum()]) if self.algorithm.pooled else samples
        self._batches = np.array([len(batch_sizes(int(count), hparams)) for count in self._samples])  # of an epoch
        update_bytes = self.algorithm.uploads * compression.message_bytes(self.settings, flat)
        selected_size = flat.size if options.save_model else 0
        self.record = Record(self.settings, self.plan, splits, self._broadcast_bytes, update_bytes, selected_size)

    def _shared_memory(self, flat: Flat) -> SharedMatrices:
        kept = RowLayout.of(self.settings, self.trial.hparams, flat).length
        self._clients_keep = kept > 0
        return SharedMatrices(
            {
                "broadcast": (self.algorithm.broadcasts, flat.size),
                "updates": (self.processes, self.algorithm.uploads * flat.size),
                "clients": (self.settings.num_clients, kept),
                "evaluation": (len(self.plan.blocks), 2 * BLOCK),
            },
            shared=True,
        )

    # Resume

    def resume(self) -> None:
        """Resume from the checkpoint of an earlier run, if there is one; also from one that had fewer rounds to run. Raises
        UsageError if it belongs to another trial, or there are results of more rounds."""
        run = {
            "round": 0,
            "code": version.code(),
            "git_revision": version.git_revision(),
            "time": time.strftime("%FT%T%z"),
            "processor": provenance.processor(),
        }
        self.runs: list[dict] = [run]
        if self.settings.rounds < (done := self.trial.rounds_done()) < math.inf:
            raise UsageError(
                f"{str(self.trial.directory)!r} holds results of {done} rounds: give --rounds={done} or another --output_dir"
            )
        stored = checkpoint.load(self.trial.directory)
        if stored is None:
            return
        state, arrays = stored
        if not self.options.save_model:
            arrays.pop(SELECTED, None)
        elif SELECTED not in arrays:
            print("starts again: the checkpoint was made without --save_model, so the best model so far is lost", flush=True)
            return
        rounds = self.settings.rounds
        known = dataclasses.asdict(Settings()) | state["trial"]  # a version before may not have had each setting
        if known["rounds"] > rounds or known | {"rounds": rounds} != self.trial.identity():
            raise UsageError(
                f"{str(self.trial.directory)!r} holds the checkpoint of a trial with other settings: give those, or another "
                "--output_dir"
            )
        targets = self._saved_arrays()
        for name, array in arrays.items():
            target = targets[name] if name in targets else self.memory.clients[int(name.removeprefix(CLIENT_PREFIX))]
            target[: len(array)] = array  # a record of fewer rounds begins as this one does
        print(f"resumes after round {state['round']}", flush=True)
        before = state["runs"][-1]
        if before["code"] != run["code"]:
            print(
                f"the code has changed since round {before['round']}: it was {before['code']} "
                f"(revision {before['git_revision']}) and is {run['code']} (revision {run['git_revision']})",
                flush=True,
            )
        self.runs = [*state["runs"], run | {"round": state["round"]}]

    def _saved_arrays(self) -> dict[str, np.ndarray]:
        return {"broadcast": self.memory.broadcast, "server_state": self.state.state.numpy(), **self.record.arrays}

    def _snapshot(self, round: int) -> tuple[dict, dict[str, np.ndarray]]:
        """The state and the arrays of a checkpoint after `round` rounds."""
        rows = {}
        if self._clients_keep:
            rows = {f"{CLIENT_PREFIX}{client}": self.memory.clients[client] for client in self.record.trained_clients()}
        return {"round": round, "trial": self.trial.identity(), "runs": self.runs}, self._saved_arrays() | rows

    # Accept the client processes

    def accept_clients(self, listener: AnyListener) -> None:
        """Wait until all client processes have joined, send them what the trial computes, and wait until they are ready."""
        self.clock.note("start")
        print(f"waiting for {self.processes} client processes at {listener.address}", flush=True)
        self._channels: list[Channel] = []
        for process, channel in enumerate(listener.accept(self.processes, self.options.timeout)):
            seed, hparams = self.trial.trial_seed, self.trial.hparams
            with naming(process):
                channel.send(protocol.welcome(process, self.processes, self.settings, hparams, seed, self.memory.shapes))
                channel.send_memory(self.memory)
            channel.expect(protocol.READY_SCHEMA)
            self._channels.append(channel)
        listener.close()
        self._hub = Hub(self._channels, self.options.timeout, LogHeartbeat())
        self.devices: dict[int, str] = {}
        while len(self.devices) < self.processes:
            process, message = self._hub.receive([each for each in range(self.processes) if each not in self.devices])
            self.devices[process] = message["ready"]
        self.runs[-1]["devices"] = sorted(set(self.devices.values()))
        self._blocks_of = [self.plan.blocks_of(process, self.processes) for process in range(self.processes)]
        # To evaluate a client's own model a process needs the client's row
        self._evaluated_clients = [
            {client for block in blocks if (client := self.plan.blocks[block].client) is not None} for blocks in self._blocks_of
        ]

    # The rounds

    def run(self) -> None:
        """Run the remaining rounds, and evaluate the final model."""
        self._observers = self._make_observers()
        for observer in self._observers:
            observer.start()
        rounds = self.settings.rounds
        for round in range(self.runs[-1]["round"], rounds + 1):
            start = time.perf_counter()
            evaluate = round % self.settings.eval_every == 0 or round == rounds
            training = self._work_of(round) if round < rounds else {}
            if evaluate and training and self.algorithm.personal:
                # Training would change clients' own models while other processes evaluate them
                self._exchange(round, True, {})
                evaluate = False
            reports = self._exchange(round, evaluate, training)
            if self._is_private and round < rounds:
                private_average.finish(self.average[0], self.state.weights, self.settings, self.trial.trial_seed, round)
            if training or (self._is_private and round < rounds):
                if not math.isfinite(self.average.sum()):
                    raise DivergedError(f"diverged: an update of round {round + 1} of {rounds} is not finite")
                self.algorithm.step(self.state, self.average)
            if round < rounds:
                self.record.trained(round, reports, time.perf_counter() - start)
                for observer in self._observers:
                    observer.after_round(round + 1)

    def _work_of(self, round: int) -> dict[int, int]:
        """Return {client: the batches that it trains on} of those whose update arrives in `round`, by number. If data is
        pooled, client 0 trains for all."""
        parts = {0: 1.0} if self.algorithm.pooled else participants.draw(self.settings, self.trial.trial_seed, round)
        epochs = self.settings.local_epochs
        return {client: participants.batches_of(part, epochs, int(self._batches[client])) for client, part in parts.items()}

    def _broadcast_bytes(self) -> np.ndarray:
        """Return what the server sends to all participants of each round together [rounds]."""
        settings, seed = self.settings, self.trial.trial_seed
        if self.algorithm.pooled:
            counts = [1] * settings.rounds
        elif self._is_private:
            counts = [len(participants.receivers(settings, seed, round)) for round in range(settings.rounds)]
        else:
            counts = [settings.participants] * settings.rounds
        return np.array(counts) * self.memory.broadcast.nbytes

    def _make_observers(self) -> list[Observer]:
        trial, options, record = self.trial, self.options, self.record
        checkpoints = Checkpoints(trial, self._snapshot, options, self.clock, self.runs[-1]["round"])
        observers = [self.clock, checkpoints]
        if options.tensorboard:
            observers.append(EventFile(trial, record))
        if options.save_model:
            observers.append(BestModel(trial, record, self.spec))
        return observers

    def _exchange(self, round: int, evaluate: bool, work: dict[int, int]) -> dict[int, dict]:
        """Have the client processes evaluate the weights of `round` and train from them, each client in `work` on so many
        batches. Sums the updates in `average`. Returns {client: what it reported}."""
        training, weights = list(work), []
        if self._is_private:
            self.average.zero_()
        elif training:
            self.state.samples, self.state.steps = self._samples[training], np.array(list(work.values()))
            weights = self._weights(len(training))
        self._send_work(round, evaluate, work)
        reports = self._collect(evaluate, training, weights)
        if evaluate:
            self.record.evaluated(round, self.memory.evaluation, self.state.weights.numpy())
        return reports

    def _weights(self, participants: int) -> list:
        """What each participant's uploads count [uploads, participants]. Raises UsageError if the algorithm says another
        number of them."""
        weights = list(self.algorithm.weights(self.state))
        uploads, lengths = self.algorithm.uploads, [len(row) for row in weights]
        if len(weights) not in (1, uploads) or set(lengths) != {participants}:
            raise UsageError(
                f"{type(self.algorithm).__name__}: weights() returned rows of the lengths {lengths}, not "
                f"{' or '.join(sorted({'1', str(uploads)}))} of the length {participants}"
            )
        return weights if len(weights) == uploads else weights * uploads

    def _send_work(self, round: int, evaluate: bool, work: dict[int, int]) -> None:
        """Send each process its work, and allow the messages that answer it."""
        self._hub.restart_timers(range(self.processes))
        for process, channel in enumerate(self._channels):
            train = list(work.items())[process :: self.processes]
            clients = [client for client, _ in train]
            rows = [("broadcast", row) for row in range(self.algorithm.broadcasts)]
            if self._clients_keep:
                evaluated = self._evaluated_clients[process] if evaluate else set()
                rows += [("clients", client) for client in sorted(evaluated.union(clients))]
            self._hub.send(process, protocol.work(round, evaluate, train), rows)
            if evaluate:
                channel.expect(protocol.evaluated_schema(round), [("evaluation", block) for block in self._blocks_of[process]])
            for client in clients:
                kept = [("clients", client)] * self._clients_keep
                channel.expect(protocol.trained_schema(client), [("updates", process), *kept])

    def _collect(self, evaluate: bool, training: list[int], weights) -> dict[int, dict]:
        """Receive all answers. Updates arrive in any order and are summed in client order, so that results do not depend on
        timing. Wait only for evaluations and for the next update in that order: other processes may be blocked until theirs
        is consumed."""
        reports: dict[int, dict] = {}
        added, evaluating = 0, set(range(self.processes)) if evaluate else set()
        while added < len(training) or evaluating:
            next_one = {added % self.processes} if added < len(training) else set()
            process, message = self._hub.receive(evaluating | next_one)
            self.clock.add(message.pop("seconds"))
            if "evaluated" in message:
                evaluating.remove(process)
                continue
            reports[message["trained"]] = message
            while added < len(training) and training[added] in reports:
                self._add_update(added, training, weights)
                added += 1
        return reports

    def _add_update(self, place: int, training: list[int], weights) -> None:
        """Add the update of client training[place] to `average`, and let its process fill the row again."""
        process = place % self.processes
        updates = self._updates[process]
        if self._is_private:
            private_average.add(self.average[0], updates[0], self.state.weights, self.settings.dp_clip)
        else:
            self.algorithm.receive(self.state, place, updates)
        for upload, total, weight in zip(updates, self.average, weights):
            if place:
                total.add_(upload, alpha=weight[place])
            else:
                torch.mul(upload, weight[0], out=total)
        if place + self.processes < len(training):
            self._hub.send(process, protocol.added(training[place]))
            self._hub.restart_timers([process])

    # Finish

    def finish(self) -> torch.Tensor:
        """Dismiss the client processes and write the results."""
        for process in range(self.processes):
            self._hub.send(process, protocol.STOP)
        self._hub.close()
        for observer in self._observers:
            observer.finish()
        origin = provenance.describe() | {
            "devices": [self.devices[process] for process in range(self.processes)],
            "seconds": self.clock.seconds,
            "runs": self.runs,
            "failures": self.trial.failures(),
            "data_dir": os.path.abspath(self.options.data_dir),
            "extensions": [{"path": each.origin, "digest": each.digest} for each in version.LOADED.values()],
            "server_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        kind = {"personal": self.algorithm.personal, "has_global_model": self.algorithm.has_global_model}
        self.trial.check_not_taken_over()
        results = self.trial.description() | kind | privacy.description(self.settings) | self.record.results()
        results |= {"provenance": origin}
        if self.trial.rounds_done() < self.settings.rounds:  # else they belong to these results
            for option, paths in self.trial.extras().items():
                for path in paths if not getattr(self.options, option) else ():
                    path.unlink(missing_ok=True)
        self.trial.write_results(results, self.record.clients())
        self.trial.forget_attempts(self.options.keep_checkpoints)
        return self.state.broadcast


def checkpoint_bytes(trial: Trial, save_model: bool) -> float:
    """About how large a trial's checkpoint is after its last round, without the zip file's own few kilobytes."""
    settings, algorithm = trial.settings, algorithms.load(trial.settings.algorithm)
    flat = _flat_model(settings.model_arch, settings.dataset)
    clients = settings.num_clients
    share = settings.participants / clients * (1 - settings.dropout_fraction)
    trained = 1 if algorithm.pooled else clients * (1 - (1 - share) ** settings.rounds)  # expected
    vectors = algorithm.broadcasts + algorithm.server_vectors + save_model
    recorded = 8 * sum(map(math.prod, Record.shapes(settings).values()))
    return 4 * (vectors * flat.size + trained * RowLayout.of(settings, trial.hparams, flat).length) + recorded


@functools.lru_cache(1)  # of the trials of a sweep, which come one after another
def _flat_model(model_arch: str, dataset: str) -> Flat:
    return Flat(models.build(model_arch, datasets.REGISTRY[dataset], 0.0, 0))


CLIENT_PREFIX = "client_"  # of the names of what clients keep, in a checkpoint


class LogHeartbeat:
    """Touches the server's log at most once a second: the launcher watches when the file last changed."""

    def __init__(self) -> None:
        self._touched = 0.0

    def __call__(self) -> None:
        if time.monotonic() - self._touched > 1:
            self._touched = time.monotonic()
            with contextlib.suppress(OSError):  # a closed terminal, a pipe
                os.utime(sys.stdout.fileno())
