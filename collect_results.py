"""Print the best setting of every sweep: picked on held-out validation data, reported on the test set.

For each trial the round with the best validation accuracy counts. The best setting is the one whose mean validation
accuracy over its trials is highest; its test accuracy is given as mean ± sample standard deviation over the trials.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shlex
import sys
import typing

import pandas

from federated import algorithms, options
from federated.extension import is_name
from federated.files import write_atomically
from federated.options import USAGE_ERROR, Parser, UsageError, exit_with, integer, number, one_of, output_file, say
from federated.reporting import tables
from federated.reporting.collect import SWEEP, collect
from federated.reporting.report import Report, ignored
from federated.reporting.selection import DEFAULT_SELECTION, SELECTIONS

NOTHING_DONE = 1

EXPORTS = (".csv", ".parquet", ".json")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="collect_results.py", description=__doc__)
    parser.add_argument(
        "--output_dir", nargs="+", type=options.directory, default=["sweep_logs"], metavar="DIR", help="of the sweeps"
    )
    parser.add_argument(
        "--selection", type=one_of(SELECTIONS), default=DEFAULT_SELECTION, metavar="NAME",
        help=f"what counts: {', '.join(SELECTIONS)}; README says what they are",
    )  # fmt: skip
    parser.add_argument(
        "--target", type=number(0, 1), metavar="ACC", help="report when this test accuracy was reached; default: do not"
    )
    parser.add_argument(
        "--against", type=is_name, metavar="ALGORITHM",
        help="compare all others with this one; default: the first of the table",
    )  # fmt: skip
    group = parser.add_argument_group("what is printed")
    group.add_argument(
        "--format", type=one_of(tables.FORMATS), default="github", metavar="NAME", help=f"of it: {', '.join(tables.FORMATS)}"
    )
    group.add_argument(
        "--top", type=integer(1), metavar="N",
        help="rank the best N settings of each sweep, and say which hyper-parameters mattered and what k draws are worth",
    )  # fmt: skip
    group.add_argument(
        "--best_command", action="store_true", help="print only the commands that train the best settings with more seeds"
    )
    group = parser.add_argument_group("what is written")
    group.add_argument(
        "--export", type=output_file(EXPORTS), metavar="FILE",
        help=f"a row for each trial and round, into FILE, which ends in {', '.join(EXPORTS)}",
    )  # fmt: skip
    group.add_argument("--plots", type=options.directory, metavar="DIR", help="pictures, as png and svg")
    group.add_argument("--html", type=output_file((".html",)), metavar="FILE", help="one page with the tables and pictures")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        collected = collect([pathlib.Path(directory) for directory in args.output_dir])
        if collected.rounds.empty:
            say("\n".join([*ignored(collected), f"No finished trials in {', '.join(args.output_dir)}."]))
            return NOTHING_DONE
        known = [*collected.rounds["algorithm"].unique(), *algorithms.REGISTRY]
        against = args.against and next((name for name in known if name.lower() == args.against.lower()), args.against)
        report = Report(collected, args.selection, args.target, against)
        if args.export is not None:
            export(report.rounds, args.export)
        if args.plots is not None:
            from federated.reporting import plots

            plots.save_all(report, pathlib.Path(args.plots))
        if args.html is not None:
            from federated.reporting import page

            write_atomically(args.html, page.html_of(report))
    except UsageError as error:
        say(f"collect_results.py: error: {error}")
        return USAGE_ERROR
    except BrokenPipeError:
        raise  # see exit_with
    except OSError as error:
        say(f"collect_results.py: error: {str(error.filename)!r} cannot be written: {error.strerror}")
        return USAGE_ERROR
    if args.best_command:
        print(*best_commands(report, args.output_dir[0]), sep="\n")
    elif args.format == "csv":
        print(report.top(args.top or 1).to_csv(index=False), end="")
    elif args.format == "json":
        print_json(report, args.top or 1)
    elif args.format == "github":
        print_text(report, args.top)
    else:
        print_tables(report, args.format, args.top)
    sys.stdout.flush()
    for line in report.ignored:
        say(line)
    return 0


def print_text(report: Report, top: int | None) -> None:
    for _, row in report.best.iterrows():
        settings = report.settings[tuple(row[SWEEP])]
        print(f"Best hyperparameter setting: {row['hash']} with mean test accuracy: {row['accuracy']:.4f}")
        print(f"Model: {settings.model_arch}\nDataset: {settings.dataset}\nAlgorithm: {settings.algorithm}")
        print(f"{report.heading}: {tables.with_deviation(row['accuracy'], row['accuracy_std'])}\n")
    print_tables(report, "github", top)
    print("\nJob Statistics:\n")
    jobs = report.job_statistics()
    for _, job in jobs.iterrows():
        if len(jobs) > 1:
            print(f"{job['Model']} {job['Dataset']} {job['Algorithm']}:")
        print(f"Number of hyperparameter sets: {job['Hyper-parameter Sets']}")
        print(f"Number of trials: {job['Trials']}")
        print(f"Number of clients: {job['Clients']}")
        print(f"Training time: {job['Training Time (s)']} s in total, {job['Training Time a Trial (s)']} s a trial")
        print(f"Bytes sent: {job['MB Sent a Trial']} MB a trial")


def print_tables(report: Report, form: str, top: int | None) -> None:
    sections = [("Table", report.table(form), report.notes()), *report.sections(form, top)]
    escape = tables.ESCAPE[form]
    texts = ["\n\n".join([f"{escape(heading)}:", table, *map(escape, notes)]) for heading, table, notes in sections]
    print("\n\n".join(texts))


def print_json(report: Report, top: int) -> None:
    tests = report.comparison.to_json(orient="records")
    print(json.dumps(
        {
            "selection": report.selection,
            "results": json.loads(report.top(top).to_json(orient="records")),
            "comparison": json.loads(tests),
            "notes": [*report.notes(), *report.ignored],
        },
        indent=1,
    ))  # fmt: skip


def export(rounds: pandas.DataFrame, path: pathlib.Path) -> None:
    """Write the rows of all trials and rounds. Raises UsageError if a package for it is missing."""
    suffix = path.suffix.lower()

    def write(file: typing.BinaryIO) -> None:
        if suffix == ".csv":
            rounds.to_csv(file, index=False)
        elif suffix == ".json":
            rounds.to_json(file, orient="records")
        else:
            rounds.to_parquet(file, engine="pyarrow", index=False)

    try:
        write_atomically(path, write)
    except ImportError as error:
        raise UsageError(
            "--export: .parquet needs pyarrow, which is not installed: pip install pyarrow, or name a .csv"
        ) from error


def best_commands(report: Report, output_dir: str) -> list[str]:
    """The commands, ready for a shell in any directory, that train each sweep's best setting again, on the same first seeds and
    more."""
    from federated.running.processes import script_command

    commands = []
    for sweep, chosen in report.chosen.items():
        best = chosen.iloc[0]
        options = dataclasses.asdict(report.settings[sweep]) | {
            "hparams": json.loads(best["hparams"]),
            "hparams_seed": best["hparams_seed"],
            "num_hparams": 1,
            "num_trials": max(MORE_TRIALS, 2 * (chosen["trial_seed"].max() + 1)),
            "output_dir": f"{os.path.abspath(output_dir)}_best",
            "data_dir": report.data_dirs.get(sweep),
            "extension": report.extensions.get(sweep),
        }
        commands.append(shlex.join(script_command("sweep.py", options, "launch")))
    return commands


MORE_TRIALS = 10  # of the best setting, at least


if __name__ == "__main__":
    exit_with(main)
