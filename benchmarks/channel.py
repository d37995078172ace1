"""Times a round of broadcast, upload and average through the channel's own classes, with real client processes.

python benchmarks/channel.py            on Unix sockets and shared memory; --tcp for bytes over loopback
"""

import argparse
import multiprocessing
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch

from federated.channel import Door, Hub, Memory, knock

FLOATS = {"0.4 MB": 100_000, "44.7 MB": 11_173_962}


def shapes(floats, clients):
    return {"broadcast": (1, floats), "updates": (clients, floats)}


def client(address, number, floats, clients):
    """Copy the broadcast weights as training would, change one, and upload."""
    torch.set_num_threads(1)
    channel = knock(address, number, 60)
    memory = channel.receive_memory(shapes(floats, clients))
    broadcast, update = torch.from_numpy(memory.broadcast)[0], torch.from_numpy(memory.updates)[number]
    weights = torch.empty(floats)
    while "stop" not in channel.receive():
        weights.copy_(broadcast)
        weights[0] += number
        update.copy_(weights)
        channel.send({"trained": number}, [("updates", number)])


def seconds_per_round(floats, clients, rounds, address):
    torch.set_num_threads(1)
    door = Door(address)
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=client, args=(door.address, number, floats, clients)) for number in range(clients)]
    for process in processes:
        process.start()
    memory = Memory(shapes(floats, clients), shared=True)
    channels = []
    for channel in door.admit(clients, 60):
        channel.send_memory(memory)
        channels.append(channel)
    door.close()
    hub = Hub(channels, 60, lambda: None)
    broadcast, updates = torch.from_numpy(memory.broadcast), torch.from_numpy(memory.updates)
    broadcast.zero_()
    average = torch.empty(floats)
    times = []
    for round in range(rounds + 3):
        start = time.perf_counter()
        for channel in channels:
            channel.send({"round": round}, [("broadcast", 0)])
        for _ in channels:
            hub.receive(range(clients))
        torch.mul(updates[0], 1 / clients, out=average)
        for update in updates[1:]:
            average.add_(update, alpha=1 / clients)
        broadcast[0].copy_(average)
        times.append(time.perf_counter() - start)
    for channel in channels:
        channel.send({"stop": True})
    for process in processes:
        process.join()
    return times[3:]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tcp", action="store_true")
    args = parser.parse_args(argv)
    os.environ.setdefault("FEDERATED_KEY", "benchmark")
    print("payload, clients: min / median / max ms a round")
    for name, floats in FLOATS.items():
        for clients in (2, 8):
            address = "127.0.0.1:50151" if args.tcp else None
            times = [1000 * t for t in seconds_per_round(floats, clients, 300 if floats < 1e6 else 30, address)]
            print(f"{name}, {clients}: {min(times):.2f} / {statistics.median(times):.2f} / {max(times):.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
