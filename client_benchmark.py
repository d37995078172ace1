"""A client process of a trial. It trains and evaluates the clients of the federation that the server assigns to it.

By hand: start server_benchmark.py, which prints its address, then this once for each client process that it waits for:

    python client_benchmark.py --host ADDRESS

On another machine ADDRESS is the server's HOST:PORT, FEDERATED_KEY must hold the same secret on both sides, and
--data_dir names the data there.
"""

import argparse
import os
import threading
import time
import typing

from federated import extension, version
from federated.options import Parser, UsageError, add_options, address, exit_with, integer, options_from
from federated.running import protocol
from federated.running.channel import Channel, PeerLostError
from federated.running.exits import exit_code_of
from federated.running.listener import JOIN_VARIABLE, connect, join
from federated.running.processes import end_with_parent, inherited
from federated.settings import MAX_PROCESSES, ProcessOptions, Settings

if typing.TYPE_CHECKING:
    from federated.learning.worker import Worker


def parse(argv: list[str] | None) -> argparse.Namespace:
    extension.load_given("client_benchmark.py", argv)
    parser = Parser(prog="client_benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    is_by_hand = JOIN_VARIABLE not in os.environ
    parser.add_argument(
        "--host", type=address, required=is_by_hand, metavar="ADDRESS", help="the address that the server prints"
    )
    parser.add_argument(
        "--process",
        type=integer(0, MAX_PROCESSES - 1),
        metavar="N",
        help="number of this client process; default: the next free one",
    )
    add_options(parser, ProcessOptions)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return exit_code_of(lambda: run(args.host, args.process, options_from(ProcessOptions, args)))


def run(host: str | None, process: int | None, options: ProcessOptions) -> None:
    end_with_parent(lambda: None)
    try:
        take_part(host, process, options)
    except PeerLostError as error:
        raise PeerLostError(f"the server is lost: {error}") from error


def take_part(host: str | None, number: int | None, options: ProcessOptions) -> None:
    """Join the trial and do what the server asks for until it says stop."""
    import torch

    from federated.data import datasets, partition
    from federated.learning.device import device_name, keep_freed_memory
    from federated.learning.worker import Worker

    keep_freed_memory()
    descriptor = inherited(JOIN_VARIABLE)
    channel = join(number, descriptor) if descriptor is not None else connect(str(host), number, options.timeout)
    welcome = channel.receive()
    if "refused" in welcome:
        raise PeerLostError(f"it refused this client process: {welcome['refused']}")
    check_same_code(welcome)
    process, processes = welcome["process"], welcome["processes"]
    memory = channel.receive_memory(welcome["memory"])
    settings = Settings(**welcome["settings"])
    dataset = datasets.load(settings.dataset, options.data_dir)
    splits = partition.split(dataset, settings, welcome["trial_seed"])
    worker = Worker(settings, welcome["hparams"], welcome["trial_seed"], dataset, splits, memory)
    updates = torch.from_numpy(memory.updates[process]).view(worker.algorithm.uploads, -1)
    my_blocks = worker.plan.blocks_of(process, processes)
    clients_keep = bool(memory.clients.size)
    with ChannelHeartbeat(channel, worker, options.timeout):
        channel.send(protocol.ready(device_name(worker.device)))
        while "stop" not in (message := channel.receive()):
            worker.receive()
            if message["evaluate"]:
                start = time.perf_counter()
                worker.evaluate(my_blocks, message["round"])
                answer = protocol.evaluated(message["round"], time.perf_counter() - start)
                channel.send(answer, [("evaluation", block) for block in my_blocks])
            for position, (number, batches) in enumerate(message["train"]):
                start = time.perf_counter()
                client = worker.train(number, message["round"], batches)
                answer = protocol.trained(number, **client.metrics(), seconds=time.perf_counter() - start)
                if position:  # the row holds the client before until the server says that it has added its update
                    channel.receive()
                worker.upload(client, updates)
                rows = [("updates", process)] + [("clients", number)] * clients_keep
                channel.send(answer, rows)


def check_same_code(welcome: dict) -> None:
    """Raises UsageError if this process runs other code than the server that sent `welcome`."""
    ours, theirs = {each.path.name: each.digest for each in version.LOADED.values()}, welcome["extensions"]
    if theirs.keys() != ours.keys():
        names = [" ".join(sorted(each)) or "no extension" for each in (theirs, ours)]
        raise UsageError(f"--extension: the server has loaded {names[0]}, this client process {names[1]}: give both the same")
    if welcome["code"] != version.code():
        what = [name for name in theirs if theirs[name] != ours[name]]
        raise UsageError(
            f"the server runs other code ({welcome['code']}) than this client process ({version.code()})"
            + (f": {' and '.join(what)} differ" if what else "")
        )


class ChannelHeartbeat:
    """Context manager that sends heartbeats to the server while the worker makes progress."""

    def __init__(self, channel: Channel, worker: "Worker", timeout: float) -> None:
        self._channel, self._worker, self._interval = channel, worker, timeout / 4
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()  # a thread that still runs as Python ends may abort it

    def _beat(self) -> None:
        last = 0
        while not self._over.wait(self._interval):
            if self._worker.progress != last:
                last = self._worker.progress
                try:
                    self._channel.send(protocol.ALIVE)
                except PeerLostError:
                    return


if __name__ == "__main__":
    exit_with(main)
