"""The trials in Flower's simulation engine. Run by compare.py, in an environment with flwr[simulation].

Flower at its best on this work: one process and one Ray for all trials, one actor a core, one thread each, data and model
kept by each actor between rounds, one evaluation of the global model a round, in the server's process, no client evaluation.
"""

import json
import logging
import os
import sys

os.environ.update(RAY_USAGE_STATS_ENABLED="0", FLWR_TELEMETRY_ENABLED="0")

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

work, data_dir, count = sys.argv[1], sys.argv[2], int(sys.argv[3])


def run(hparams, trial_seed):
    from work import WORK, initial_model

    client_app, server_app = ClientApp(), ServerApp()
    last = {}

    def client(number):
        from work import client_of  # by name, so that little is sent to an actor each round

        return client_of(work, data_dir, json.dumps(hparams), trial_seed, number)

    @client_app.train()
    def train(message, context):
        member = client(int(context.node_config["partition-id"]))
        round = message.content["config"]["server-round"] - 1
        state = member.train(message.content["arrays"].to_torch_state_dict(), round)
        metrics = MetricRecord({"num-examples": len(member.labels)})
        return Message(content=RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)

    def evaluate(round, arrays):
        last["round"] = round
        last["accuracy"] = client(0).test_accuracy(arrays.to_torch_state_dict())
        return MetricRecord({"accuracy": last["accuracy"]})

    @server_app.main()
    def main(grid, context):
        arrays = ArrayRecord(initial_model(work, hparams, trial_seed).state_dict())
        FedAvg(fraction_evaluate=0.0).start(grid, arrays, num_rounds=WORK[work].rounds, evaluate_fn=evaluate)

    run_simulation(
        server_app, client_app, num_supernodes=2, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    )
    if last["round"] != WORK[work].rounds:
        sys.exit(f"Flower ended after round {last['round']}")
    return last["accuracy"]


if __name__ == "__main__":
    from work import trials_of

    logging.getLogger("flwr").setLevel(logging.ERROR)
    print(json.dumps([run(*trial) for trial in trials_of(work, count)]))
