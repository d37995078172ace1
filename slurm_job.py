"""What an element of the slurm launcher's arrays runs, on the node: its trials, as local_parallel would."""

import argparse
import contextlib
import os
import pathlib
import sys

from command_launchers import REGISTRY, add_trial_arguments, listed_trials
from federated import slurm
from federated.options import Parser, shown
from federated.processes import Interrupted, exit_code_of, interrupt_on_signals
from federated.trial import CHECKPOINT
from sweep import Progress


def existing_file(text):
    try:
        if pathlib.Path(text).is_file():
            return pathlib.Path(text)
    except (OSError, ValueError):  # no name can be so
        pass
    raise argparse.ArgumentTypeError(f"{shown(text)} is not a file")


def parse(argv):
    parser = Parser(prog="slurm_job.py", description=__doc__)
    parser.add_argument("--trials", type=existing_file, required=True, metavar="FILE", help="the list that the launcher wrote")
    add_trial_arguments(parser)
    parser.set_defaults(host=None, jobs=None)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    interrupt_on_signals("ending; the checkpoints stay.")
    os.environ[slurm.JOB_VARIABLE] = slurm.this_job()
    trials = listed_trials(args.trials, int(os.environ["SLURM_ARRAY_TASK_ID"]))
    left = [trial for trial in trials if not trial.is_done()]
    before = list(map(mark, left))
    try:
        with Progress(left) as progress:
            code = exit_code_of(lambda: left and REGISTRY["local_parallel"].launch(left, args, progress.report))
        return code or progress.exit_code()
    except Interrupted as interrupted:
        if not slurm.is_being_ended():  # else Slurm tells why
            go_on_later(left, has_advanced=list(map(mark, left)) != before)
        return 128 + interrupted.signum


def mark(trial):
    """How far a trial is: it differs where that is further."""
    with contextlib.suppress(FileNotFoundError):
        return trial.is_done(), (trial.directory / CHECKPOINT).stat().st_mtime_ns
    return trial.is_done(), None


def go_on_later(trials, has_advanced):
    """The job was told to end, as before its time limit. Where it was of use it runs again, else its trials say why not."""
    why = "was told to end, as before its time limit"
    try:
        if has_advanced:
            slurm.requeue(slurm.this_element())
            return
        why += ", before a checkpoint was made"
    except slurm.UnavailableError as error:
        why += f", and is not requeued: {error}"
    for trial in trials:
        if trial.directory.exists() and not trial.is_done():
            trial.record_failure(f"job {slurm.this_element()}", why)


if __name__ == "__main__":
    sys.exit(main())
