"""Launchers: each gets the trials that are not done and runs them. A new one is a function here and an entry in REGISTRY.

    launcher(trials, args, report)

args are sweep.py's options; report(trial, outcome) is to be called for each trial that ended, with True or a
federated.processes.Failure.
"""

import functools
import os
import resource
import shlex
import tempfile

from federated import algorithms, machine, models
from federated.channel import key_from_environment, unix_address
from federated.options import UsageError
from federated.processes import GIVER_VARIABLE, Cold, RunningTrial, Warm, run_trials, trial_commands
from federated.trial import write_sweep_file

# What a process has to be able to open at once where trials fork from it
LEAST_FILES = 32
# A trial's process is counted as this much memory where the number of trials at once is not given.
PROCESS_BYTES = 1 << 29


def local_sequential(trials, args, report):
    """One trial after another, each process started as a user would start it."""
    _run_locally(trials, args, report, Cold, most=1)


def local_parallel(trials, args, report):
    """As many trials at once as the machine holds, forked from a process that has imported what they need."""
    preload(trials)
    _run_locally(trials, args, report, Warm, most=1 if args.host else len(trials))


def dry_run(trials, args, report):
    """Print the commands of every trial, run nothing."""
    for trial in trials:
        address = args.host or unix_address(str(trial.directory.resolve()))
        commands = trial_commands(trial, address, client_processes(trial, args, 1, []), args)
        print(" &\n".join(map(shlex.join, commands.values())))


REGISTRY = {"local_sequential": local_sequential, "local_parallel": local_parallel, "dry_run": dry_run}


def _run_locally(trials, args, report, start, most):
    """Run `trials` on this machine, at most `most` at once."""
    settings = trials[0].settings  # of which all have the same device, precision and threads
    if settings.device == "cuda" or settings.precision != "fp32":  # else no need to wait for torch's import
        from federated.training import resolve_device

        resolve_device(settings)
    if args.host:
        key_from_environment()  # raises UsageError before anything is made
    for each in {trial.directory.parent.parent: trial for trial in trials}.values():
        check_writable(each)
    gpus = [] if settings.device == "cpu" else machine.gpus()
    if args.jobs:
        jobs = args.jobs
    elif gpus:
        jobs = len(gpus) * args.trials_per_device
    else:
        jobs = min(machine.cores() // settings.threads, machine.memory() // (2 * PROCESS_BYTES))
    jobs = max(1, min(jobs, most, len(trials)))

    def begin(trial, place):
        environment = {GIVER_VARIABLE: str(os.getpid())}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
        start_here = functools.partial(start, environment=environment)
        return RunningTrial(trial, start_here, client_processes(trial, args, jobs, gpus), args)

    run_trials(trials, begin, jobs, args.retries, report)


def check_writable(trial):
    """Raises UsageError where the trial's sweep cannot write its files, before any is started."""
    sweep_dir = trial.directory.parent.parent
    try:
        write_sweep_file(sweep_dir, trial.settings)
        with tempfile.TemporaryFile(dir=sweep_dir):
            pass
    except OSError as error:
        raise UsageError(f"--output_dir: {str(sweep_dir)!r} cannot be written to ({error.strerror}): name another") from error


def preload(trials):
    """Have trials fork from a process that has imported what they need. Raises UsageError where that could open no files."""
    if (most := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < LEAST_FILES:
        raise UsageError(f"Too many open files: {most} are allowed and {LEAST_FILES} are needed: raise `ulimit -n`")
    modules = {"server_benchmark": None, "client_benchmark": None, "federated.training": None}
    for trial in trials:
        modules[algorithms.load(trial.settings.algorithm).__module__] = None
        modules.update(dict.fromkeys(models.imports_of(trial.settings.model_arch)))
    Warm.preload(list(modules))


def client_processes(trial, args, jobs, gpus):
    """Of a trial: as asked for, else one on a GPU, else one a participant up to the trial's share of the cores."""
    settings = trial.settings
    share = 1 if gpus else max(1, machine.cores() // (jobs * settings.threads))
    return min(args.client_processes or share, settings.participants)
