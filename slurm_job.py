"""What an element of the slurm launcher's arrays runs, on the node: its trials, as local_parallel would, or a launch."""

import argparse
import contextlib
import os
import pathlib
import time

import sweep
from command_launchers import LocalParallel
from federated import extension, slurm
from federated.options import Parser, add_options, command_words, exit_with, options_from, shown
from federated.running.exits import exit_code_of
from federated.running.processes import Interrupted, interrupted_by_signals
from federated.running.progress import Progress
from federated.running.slurm_launcher import WAIT_SECONDS, listed_trials, words_of_launch
from federated.settings import RunOptions
from federated.trial import CHECKPOINT, PREVIOUS, Trial


def existing_file(text: str) -> pathlib.Path:
    try:
        if pathlib.Path(text).is_file():
            return pathlib.Path(text)
    except (OSError, ValueError):  # no name can be so
        pass
    raise argparse.ArgumentTypeError(f"{shown(text)} is not a file")


def parse(argv: list[str] | None) -> argparse.Namespace:
    extension.load_given("slurm_job.py", argv)
    parser = Parser(prog="slurm_job.py", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--trials", type=existing_file, metavar="FILE", help="the list that the launcher wrote")
    what.add_argument("--launch", type=existing_file, metavar="FILE", help="the launch that the launcher wrote")
    add_options(parser, RunOptions)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    os.environ[slurm.JOB_VARIABLE] = slurm.this_job()
    if args.launch is not None:
        time.sleep(WAIT_SECONDS)  # results that were written on another host may take a moment to be seen
        return sweep.main([*words_of_launch(args.launch), *command_words({"extension": tuple(args.extension)})])
    with interrupted_by_signals("ending; the checkpoints stay.", process_ends=True):
        return run_element(args)


def run_element(args: argparse.Namespace) -> int:
    """Run the trials of this element of the array that are left. Returns the exit code."""
    trials = listed_trials(args.trials, int(os.environ["SLURM_ARRAY_TASK_ID"]))
    left = [trial for trial in trials if not trial.is_done()]
    before = list(map(progress_marker, left))
    output_dir, run = args.trials.parent.parent.parent, options_from(RunOptions, args)
    if not left:
        return 0
    try:
        with Progress(left) as progress:
            code = exit_code_of(lambda: LocalParallel().launch(left, output_dir, run, progress.report))
        return code or progress.exit_code()
    except Interrupted as interrupted:
        if not slurm.is_being_ended():  # else Slurm says why
            requeue_or_fail(left, has_advanced=list(map(progress_marker, left)) != before)
        return 128 + interrupted.signum


def progress_marker(trial: Trial) -> tuple[bool, int]:
    """A marker that changes whenever the trial has made progress that lasts."""
    newest = 0
    for name in (CHECKPOINT, PREVIOUS):  # between two renames there is only the previous one
        with contextlib.suppress(FileNotFoundError):
            newest = max(newest, (trial.directory / name).stat().st_mtime_ns)
    return trial.is_done(), newest


def requeue_or_fail(trials: list[Trial], has_advanced: bool) -> None:
    """On SIGTERM, e.g. before the time limit: requeue the job if a trial advanced, else record the reason in each trial."""
    why = "got a signal to end, as Slurm sends before the time limit"
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
    exit_with(main)
