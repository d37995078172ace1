"""Times rounds of broadcast, upload and average through the project's channels, with real client processes. Alternates them
with the same rounds over bare sockets, on which a message is one byte.

python benchmarks/channel.py            on Unix sockets and shared memory; --tcp for bytes over loopback
"""

import argparse
import multiprocessing
import os
import pathlib
import socket
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch
from overhead import spread

from federated.learning.memory import SharedMatrices
from federated.running.channel import Hub
from federated.running.listener import Listener, connect

FLOATS = {"0.4 MB": 100_000, "44.7 MB": 11_173_962}


def shapes(floats, clients):
    return {"broadcast": (1, floats), "updates": (clients, floats)}


def client(address, bare, number, floats, clients):
    """On each message, copy the broadcast weights as training would, change one, and upload."""
    torch.set_num_threads(1)
    channel = connect(address, number, 60)
    memory = channel.receive_memory(shapes(floats, clients))
    broadcast, update = torch.from_numpy(memory.broadcast)[0], torch.from_numpy(memory.updates)[number]
    weights = torch.empty(floats)

    def train():
        weights.copy_(broadcast)
        weights[0] += number
        update.copy_(weights)

    while "stop" not in channel.receive():
        train()
        channel.send({"trained": number}, [("updates", number)])
        bare.recv(1)
        train()
        bare.send(b"1")


def times_of_rounds(floats, clients, rounds, address):
    """Milliseconds of rounds through the channel, and of those with bare sockets [rounds] each."""
    torch.set_num_threads(1)
    listener = Listener(address)
    context = multiprocessing.get_context("forkserver")
    bare, processes = [], []
    for number in range(clients):
        ours, theirs = socket.socketpair()
        bare.append(ours)
        processes.append(context.Process(target=client, args=(listener.address, theirs, number, floats, clients)))
        processes[-1].start()
    memory = SharedMatrices(shapes(floats, clients), shared=True)
    channels = []
    for channel in listener.accept(clients, 60):
        channel.send_memory(memory)
        channels.append(channel)
    listener.close()
    hub = Hub(channels, 60, lambda: None)
    broadcast, updates = torch.from_numpy(memory.broadcast), torch.from_numpy(memory.updates)
    broadcast.zero_()
    average = torch.empty(floats)

    def exchange(round):
        for channel in channels:
            channel.send({"round": round}, [("broadcast", 0)])
        for _ in channels:
            hub.receive(range(clients))

    def exchange_bare(round):
        for each in bare:
            each.send(b"1")
        for each in bare:
            each.recv(1)

    def timed(exchange, round):
        start = time.perf_counter()
        exchange(round)
        torch.mul(updates[0], 1 / clients, out=average)
        for update in updates[1:]:
            average.add_(update, alpha=1 / clients)
        broadcast[0].copy_(average)
        return 1000 * (time.perf_counter() - start)

    times = [(timed(exchange, round), timed(exchange_bare, round)) for round in range(rounds + 3)]
    for channel in channels:
        channel.send({"stop": True})
    for process in processes:
        process.join()
    return zip(*times[3:])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tcp", action="store_true")
    args = parser.parse_args(argv)
    os.environ.setdefault("FEDERATED_KEY", "benchmark")
    print("payload, clients: min / median / max ms a round, with bare sockets, ratio of the medians")
    for name, floats in FLOATS.items():
        for clients in (2, 8):
            address = "127.0.0.1:50151" if args.tcp else None
            times, bare = times_of_rounds(floats, clients, 300 if floats < 1e6 else 30, address)
            ratio = statistics.median(times) / statistics.median(bare)
            print(f"{name}, {clients}: {spread(times)}   {spread(bare)}   {ratio:.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
