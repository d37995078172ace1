"""Launchers: each gets the trials that are not done and runs them. A new one is a function here and an entry in REGISTRY.

    launcher(trials, args, report)

args are sweep.py's options; report(trial, outcome) is to be called for each trial that ended, with True or a
federated.processes.Failure.
"""

import functools
import os
import shlex

from federated import models
from federated.channel import key_from_environment, unix_address
from federated.processes import Cold, RunningTrial, Warm, run_trials, trial_commands


def local_sequential(trials, args, report):
    """One trial after another, each process started as a user would start it."""
    _run_locally(trials, args, report, Cold, jobs=1)


def local_parallel(trials, args, report):
    """As many trials at once as the machine holds, forked from a process that has imported what they need."""
    preload(args.settings.model_arch)
    jobs = args.jobs or max(1, available_cores() // args.settings.threads)
    _run_locally(trials, args, report, Warm, jobs=1 if args.host else jobs)


def dry_run(trials, args, report):
    """Print the commands of every trial, run nothing."""
    for trial in trials:
        address = args.host or unix_address(str(trial.directory.resolve()))
        commands = trial_commands(trial, address, client_processes(args, jobs=1), args.data_dir, args.timeout)
        print(" &\n".join(map(shlex.join, commands.values())))


REGISTRY = {"local_sequential": local_sequential, "local_parallel": local_parallel, "dry_run": dry_run}


def _run_locally(trials, args, report, start, jobs):
    if args.settings.device == "cuda" or args.settings.precision != "fp32":  # else no need to wait for torch's import
        from federated.training import resolve_device

        resolve_device(args.settings)
    if args.host:
        key_from_environment()  # raises UsageError before anything is made
    begin = functools.partial(
        RunningTrial,
        start=start,
        client_processes=client_processes(args, min(jobs, len(trials))),
        host=args.host,
        data_dir=args.data_dir,
        timeout=args.timeout,
    )
    run_trials(trials, begin, jobs, args.retries, report)


def preload(model_arch):
    """Have trials fork from a process that has imported what theirs need."""
    Warm.preload(["server_benchmark", "client_benchmark", "federated.training", *models.IMPORTS.get(model_arch, ())])


def client_processes(args, jobs):
    """Client processes a trial: as asked for, else one a participant up to this trial's share of the cores."""
    settings = args.settings
    share = max(1, available_cores() // (jobs * settings.threads))
    return min(args.client_processes or share, settings.participants)


def available_cores() -> int:
    """Cores this process may use: not all of the machine's under a batch system or taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
