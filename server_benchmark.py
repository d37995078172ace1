"""The server of one trial: it makes the model, leads the rounds, and writes the results.

Started by hand, each command in a terminal of its own, with any settings below:

    python server_benchmark.py --output_dir my_trial --client_processes 2
    python client_benchmark.py --host ADDRESS          (twice; the server prints ADDRESS)

With --host HOST:PORT clients may run on other machines. Messages are then authenticated by the secret in FEDERATED_KEY,
but not encrypted.
"""

import argparse
import functools
import pathlib

from federated import extension
from federated.lock import Lock
from federated.options import Parser, UsageError, add_options, address, directory, exit_with, integer, json_object, options_from
from federated.running.channel import PeerLostError
from federated.running.exits import exit_code_of
from federated.running.listener import AnyListener, make_listener
from federated.running.processes import LOCK_VARIABLE, end_with_parent, inherited
from federated.settings import MAX_PROCESSES, ServerOptions, Settings, check_tensorboard
from federated.trial import DivergedError, Trial
from hparams_registry import check_hparams, default_hparams


def parse(argv: list[str] | None) -> argparse.Namespace:
    extension.load_given("server_benchmark.py", argv)
    parser = Parser(prog="server_benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=directory, required=True, metavar="DIR", help="the trial's directory")
    parser.add_argument("--trial_seed", type=integer(0), default=0, metavar="INT", help="seed of all its random draws")
    parser.add_argument(
        "--hparams", type=json_object, default={}, metavar="JSON", help="hyper-parameters; default: the registry's defaults"
    )
    parser.add_argument("--hparams_seed", type=integer(0), default=0, metavar="INT", help="recorded with the results")
    parser.add_argument(
        "--host", type=address, metavar="ADDRESS", help="HOST:PORT to listen at; default: a private Unix socket"
    )
    parser.add_argument(
        "--client_processes",
        type=integer(1, MAX_PROCESSES),
        metavar="INT",
        help="client processes to wait for; default: one per participant",
    )
    add_options(parser.add_argument_group("how it is run"), ServerOptions)
    add_options(parser.add_argument_group("what it computes"), Settings)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Hold the trial's lock and listen for client processes while the server runs the trial."""
    settings, options = options_from(Settings, args), options_from(ServerOptions, args)
    key = settings.hparams_key
    hparams = default_hparams(*key) | check_hparams(args.hparams, *key)
    if options.tensorboard:
        check_tensorboard()
    trial = Trial(settings, hparams, args.hparams_seed, args.trial_seed, pathlib.Path(args.output_dir))
    try:
        trial.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir: {args.output_dir!r} cannot be made ({error.strerror}): name another") from error
    inherited_lock = inherited(LOCK_VARIABLE)
    is_launched = inherited_lock is not None
    lock, listener = Lock(trial.directory, inherited_lock), None
    try:
        listener = make_listener(args.host)
        end_with_parent(functools.partial(close_and_release, listener, lock))
        from federated.running.rounds import serve  # torch takes a second to import: client processes may connect meanwhile

        serve(trial, listener, args.client_processes or settings.participants, options)
    except (PeerLostError, DivergedError) as error:
        if not is_launched:  # a launcher sees all processes, so it knows the cause better
            trial.record_failure("server", str(error), is_final=isinstance(error, DivergedError))
        raise
    finally:
        if listener is not None:
            listener.close()
        if not is_launched:  # else the launcher releases it once all processes have ended
            lock.release()


def close_and_release(listener: AnyListener, lock: Lock) -> None:
    listener.close()
    lock.release()


if __name__ == "__main__":
    exit_with(main)
