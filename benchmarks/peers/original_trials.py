"""The trials as the original scripts run them: for each trial a new server process, 5 seconds of sleep, then a new process for
each client, which imports everything, sends its weights over TCP each round, and evaluates on the whole test set.

Weights are sent as bytes of float32. The original pickled them into gRPC messages, which is slower.
"""

import json
import subprocess
import sys
import time
from multiprocessing.connection import Client as connect_to
from multiprocessing.connection import Listener

PORT, KEY = 50153, b"benchmark"


def server(rounds):
    """Average what two clients send, round by round; print the accuracy that the first one reports last."""
    import numpy as np

    with Listener(("127.0.0.1", PORT), authkey=KEY) as listener:
        clients = [listener.accept() for _ in range(2)]
        for _ in range(rounds):
            average = sum(np.frombuffer(client.recv_bytes(), np.float32) for client in clients) / np.float32(2)
            for client in clients:
                client.send_bytes(average.tobytes())
        reports = [client.recv_bytes().decode() for client in clients]
        print(reports[0])


def client(work, data_dir, hparams, trial_seed, number):
    import torch
    import torchvision  # noqa: F401
    from work import WORK, Client

    member = Client(work, data_dir, json.loads(hparams), int(trial_seed), int(number))
    channel = connect_to(("127.0.0.1", PORT), authkey=KEY)
    parameters = list(member.model.parameters())
    for round in range(WORK[work].rounds):
        member.train(member.model.state_dict(), round)
        channel.send_bytes(torch.nn.utils.parameters_to_vector(parameters).detach().numpy().tobytes())
        average = torch.frombuffer(bytearray(channel.recv_bytes()), dtype=torch.float32)
        torch.nn.utils.vector_to_parameters(average, parameters)
        accuracy = member.test_accuracy(member.model.state_dict())
    channel.send_bytes(str(accuracy).encode())


def main(work, data_dir, count):
    from work import WORK, trials_of

    accuracies = []
    for hparams, trial_seed in trials_of(work, int(count)):
        script = [sys.executable, __file__]
        running = subprocess.Popen([*script, "server", str(WORK[work].rounds)], stdout=subprocess.PIPE, text=True)
        time.sleep(5)
        clients = [
            subprocess.Popen([*script, "client", work, data_dir, json.dumps(hparams), str(trial_seed), str(number)])
            for number in range(2)
        ]
        for each in clients:
            each.wait()
        accuracies.append(float(running.communicate()[0]))
    print(json.dumps(accuracies))


if __name__ == "__main__":
    if sys.argv[1] == "server":
        server(int(sys.argv[2]))
    elif sys.argv[1] == "client":
        client(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
