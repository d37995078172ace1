"""Tries algorithms, models, data sets and partitions in seconds, without a sweep."""

import dataclasses
import functools
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from federated import algorithms, extension, models
from federated.data import datasets, partition
from federated.options import UsageError
from federated.running import resources
from federated.running.processes import ForkedProcess, preload
from federated.running.supervisor import Failure, Outcome, RunningTrial, run_trials
from federated.settings import RunOptions, Settings
from federated.trial import CLIENTS, RESULTS, Trial, hparams_hash, trial_path

SHAPES = ("digits", "heart_disease", "mnist", "cifar10", "shakespeare")  # built-in data sets whose shapes models are tried on
SETTINGS: dict[str, Any] = {
    "dataset": "digits",
    "model_arch": "mlp",
    "num_clients": 3,
    "rounds": 2,
    "samples_per_client": 40,
    "device": "cpu",
}

# {their name in a line: settings} that algorithms are tried under besides, all at once; one may refuse some of them
FURTHER: dict[str, dict[str, Any]] = {
    "stragglers": {"straggler_fraction": 0.5},
    "lost updates": {"dropout_fraction": 0.3},
    "compression": {"compression": "topk"},
    "privacy": {"dp_clip": 1.0},
}

# The trials under the same settings, {their directory: client processes}; that in RESUMED is killed after its first round
RESUMED = "resumed"
TRIALS = {"two": 2, "one": 1, RESUMED: 2}
STATE = "state that changes: "  # begins a line of a trial's log, see check_watch
WATCH = str(pathlib.Path(__file__).with_name("check_watch.py"))


@dataclasses.dataclass(frozen=True)
class Names:
    """The names to check."""

    algorithms: list[str]
    models: list[str]
    datasets: list[str]
    partitions: list[str]

    @classmethod
    def of_extensions(cls) -> "Names":
        """The names that the loaded extensions have added."""
        registries = (algorithms.REGISTRY, models.REGISTRY, datasets.REGISTRY, partition.REGISTRY)
        return cls(*(list(registry.owners) for registry in registries))

    @classmethod
    def built_in(cls) -> "Names":
        """All built-in names, but only those data sets that need no download."""
        return cls(list(algorithms.REGISTRY), list(models.REGISTRY), list(SHAPES[:2]), list(partition.REGISTRY))


def check(names: Names, run: RunOptions, default_hparams: Callable[[Settings], dict]) -> Iterator[tuple[bool, str]]:
    """Yield (is right, a line that says what was found) for each of `names`."""
    for name in names.datasets:
        yield _result(f"dataset {name}", functools.partial(_check_dataset, name, run.data_dir))
    for name in names.models:
        yield _result(f"model {name}", functools.partial(_check_model, name, [*names.datasets, *SHAPES]))
    on = list(dict.fromkeys([*names.datasets, "digits"]))
    for name in names.partitions:
        yield _result(f"partition {name}", functools.partial(_check_partition, name, on, run.data_dir))
    if names.algorithms:
        yield from _check_algorithms(names.algorithms, run, default_hparams)


def _result(what: str, find: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, f"{what}: {find()}"
    except Exception as error:  # of an extension
        if extension.own_frames(error) and not isinstance(error, UsageError):
            extension.print_traceback(error)
        return False, f"{what}: {extension.explain(error)}"


def _check_dataset(name: str, data_dir: str) -> str:
    data, again = (datasets.load(name, data_dir) for _ in range(2))
    for field in ("train_inputs", "train_labels", "test_inputs", "test_labels", "train_owners", "test_owners"):
        if not np.array_equal(getattr(data, field), getattr(again, field)):
            raise UsageError(f"{field} differ if a process reads them again, as each does")
    owners = f", {data.spec.num_owners} owners" if data.spec.num_owners else ""
    samples = f"{len(data.train_labels)} + {len(data.test_labels)} samples"
    return f"{samples} of {data.spec}, {data.spec.num_classes} classes{owners}"


def _check_model(name: str, on: list[str]) -> str:
    fits, misfits = [], []
    for dataset in dict.fromkeys(on):
        spec = datasets.REGISTRY[dataset]
        try:
            models.check(name, spec)
            models.check_logits(name, models.build(name, spec, 0.5, 0), spec)
            fits.append(f"{spec} of {dataset}")
        except Exception as error:
            misfits.append(error)
    if not fits:
        raise misfits[0]
    return f"logits in training and evaluation, on {'; '.join(fits)}"


def _check_partition(name: str, on: list[str], data_dir: str) -> str:
    tried = []
    for dataset in on:
        spec = datasets.REGISTRY[dataset]
        clients = spec.num_owners if name == "natural" else max(4, spec.num_classes)  # so that somebody may have each label
        if clients is None:
            continue
        settings = Settings(dataset=dataset, partition=name, num_clients=clients)
        data = datasets.load(dataset, data_dir)
        for seed in (0, 1):
            splits, again = (partition.split(data, settings, seed) for _ in range(2))
            held = np.sort(np.concatenate([samples for each in splits for samples in (each.train, each.val)]))
            if not np.array_equal(held, np.arange(len(data.train_labels))):
                raise UsageError(f"of {len(data.train_labels)} samples of {dataset}, {len(np.unique(held))} belong to a client")
            if not all(np.array_equal(ours.train, theirs.train) for ours, theirs in zip(splits, again)):
                raise UsageError(f"on {dataset} it differs each time: it has to draw from the generator that it gets")
        tried.append(dataset)
    return f"every sample once, no empty client, the same for the same seed, on {', '.join(tried)}"


# Algorithms


def _check_algorithms(
    names: list[str], run: RunOptions, default_hparams: Callable[[Settings], dict]
) -> Iterator[tuple[bool, str]]:
    """Three trials of each algorithm, which have to give the same bits: see TRIALS. And three more under FURTHER settings."""
    watched = dataclasses.replace(run, extension=(*run.extension, WATCH), checkpoint_seconds=0.0)
    ended: dict[pathlib.Path, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="fedsweep-check-") as work:
        trials = {
            what: [_trial(settings, pathlib.Path(work, kind), default_hparams) for kind in TRIALS]
            for name in names
            for what, settings in _cases(name)
        }
        processes = {each.directory: count for of_case in trials.values() for each, count in zip(of_case, TRIALS.values())}

        def begin(trial: Trial, slot: int) -> RunningTrial:
            return RunningTrial(trial, ForkedProcess, {}, processes[trial.directory], watched)

        every = [trial for of_case in trials.values() for trial in of_case]
        preload(every, extensions=run.extension)
        run_trials(every, begin, resources.cores(), 1, lambda trial, outcome: ended.update({trial.directory: outcome}))
        for what, of_case in trials.items():
            yield _result(f"algorithm {what}", functools.partial(_compare, of_case, ended))


def _cases(algorithm: str) -> Iterator[tuple[str, Settings]]:
    """Yield (what a line calls it, the settings): the algorithm alone, then under all of FURTHER that it allows."""
    yield algorithm, Settings(algorithm=algorithm, **SETTINGS)
    under, given = [], SETTINGS
    for name, further in FURTHER.items():
        try:
            Settings(algorithm=algorithm, **given, **further)
        except UsageError:
            continue
        under.append(name)
        given = given | further
    yield f"{algorithm} under {', '.join(under)}", Settings(algorithm=algorithm, **given)


def _trial(settings: Settings, directory: pathlib.Path, default_hparams: Callable[[Settings], dict]) -> Trial:
    hparams = default_hparams(settings)
    if "batch_size" in hparams:
        hparams["batch_size"] = 16
    return Trial(settings, hparams, 0, 0, trial_path(directory / settings.name / hparams_hash(hparams), 0))


def _compare(trials: list[Trial], ended: dict[pathlib.Path, Outcome]) -> str:
    for kind, trial in zip(TRIALS, trials):
        if isinstance(outcome := ended[trial.directory], Failure):
            raise UsageError(f"the trial {kind!r} failed: {outcome}")
    two, one, resumed = map(_bits, trials)
    unlike = [what for what, other in (("with one client process", one), ("resumed", resumed)) if other != two]
    if not unlike:
        return "two rounds with two client processes, with one, and resumed give the same bits"
    logs = [log.read_text(errors="replace") for trial in trials for log in trial.directory.glob("*.log")]
    state = sorted({line.removeprefix(STATE) for log in logs for line in log.splitlines() if line.startswith(STATE)})
    what = f"it changes and nothing keeps {'; '.join(state)}" if state else "the check did not find the state that it keeps"
    raise UsageError(f"two rounds with two client processes give other bits {' and '.join(unlike)}: {what}")


def _bits(trial: Trial) -> object:
    """The results of a trial."""
    content = json.loads((trial.directory / RESULTS).read_text())
    del content["curves"]["round_seconds"], content["provenance"]
    with np.load(trial.directory / CLIENTS) as clients:
        return content, {name: clients[name].tobytes() for name in clients.files}
