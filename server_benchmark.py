"""The server of one trial: it makes the model, leads the rounds, and writes the results.

By hand, in a terminal each, with any of the settings below:

    python server_benchmark.py --output_dir my_trial --client_processes 2
    python client_benchmark.py --host ADDRESS          (twice; the server prints ADDRESS)

With --host HOST:PORT clients may run on other machines. Messages are then authenticated by the secret in FEDERATED_KEY,
but not encrypted.
"""

import argparse
import os
import pathlib
import sys

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
from federated.running.channel import PeerLostError
from federated.running.listener import Listener
from federated.settings import add_arguments, check_tensorboard, settings_from
from federated.trial import Diverged, Trial
from hparams_registry import check_hparams, default_hparams


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
    """Hold the trial's lock and listen for client processes while the trial runs."""
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
    lock, listener = Lock(this.directory, giver=giver), None
    try:
        listener = Listener(args.host)
        end_with_parent(lambda: (listener.close(), lock.release()))
        from federated.running.rounds import serve  # imports torch, which takes a second: clients can connect by now

        serve(this, listener, args.client_processes or settings.participants, args)
    except (PeerLostError, Diverged) as error:
        if not giver:  # a launcher sees all processes, so it knows the cause better
            this.record_failure("server", str(error))
        raise
    finally:
        if listener is not None:
            listener.close()
        lock.release()


if __name__ == "__main__":
    sys.exit(main())
