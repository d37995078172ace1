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
from federated.options import USAGE_ERROR, Parser, UsageError, exit_with, integer, names_of, number, one_of, output_file, say
from federated.reporting import tables
from federated.reporting.collect import SWEEP, collect, with_settings
from federated.reporting.report import Report, ignored
from federated.reporting.selection import DEFAULT_SELECTION, SELECTIONS
from federated.settings import Settings
from federated.study import Conditions

NOTHING_DONE = 1

EXPORTS = (".csv", ".parquet", ".json")


def make_parser() -> Parser:
    parser = Parser(prog="collect_results.py", usage="collect_results.py [OPTION ...]", description=__doc__)
    parser.add_argument(
        "--output_dir", nargs="+", type=options.directory, default=["sweep_logs"], metavar="DIR",
        help="holds the sweeps; several are read as one (default: sweep_logs)",
    )  # fmt: skip
    parser.add_argument(
        "--selection", type=one_of(SELECTIONS), default=DEFAULT_SELECTION, metavar="NAME",
        help=f"how the round and the setting are selected: {', '.join(SELECTIONS)}; a note under the table explains it "
        f"(default: {DEFAULT_SELECTION})",
    )  # fmt: skip
    parser.add_argument(
        "--target", type=number(0, 1), metavar="ACC", help="also report the round and the time that reached this test accuracy"
    )
    parser.add_argument(
        "--delta", type=number(0, 1, above=True), metavar="DELTA",
        help="delta of the epsilon that trials with --dp_clip have; default: 1e-5, or num_clients^-1.1 if that is less",
    )  # fmt: skip
    parser.add_argument(
        "--against", type=is_name, metavar="ALGORITHM",
        help="compare all others with this one; default: the first of the table",
    )  # fmt: skip
    parser.add_argument(
        "--where", type=condition, nargs="+", default=[], metavar="SETTING=VALUE",
        help="only sweeps with these settings, as in --where partition=dirichlet participation=0.2; for several values of one "
        "setting: with any of them",
    )  # fmt: skip
    group = parser.add_argument_group("what is printed")
    group.add_argument(
        "--columns", type=one_of(names_of(Settings)), nargs="+", metavar="SETTING",
        help="a row for each algorithm, and the values of these settings side by side, as in --columns partition_alpha",
    )  # fmt: skip
    group.add_argument(
        "--format", type=one_of(tables.FORMATS), default="github", metavar="NAME",
        help=f"format of the tables: {', '.join(tables.FORMATS)} (default: github)",
    )  # fmt: skip
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
    group.add_argument(
        "--plots", type=options.directory, metavar="DIR",
        help="pictures for a paper, as pdf, png and svg: DIR/column is 3.3 in wide, DIR/full 6.9 in",
    )  # fmt: skip
    group.add_argument(
        "--html", type=output_file((".html",)), metavar="FILE", help="one page to show to others: tables, curves, settings"
    )
    return parser


def condition(text: str) -> tuple[str, str]:
    """Parse SETTING=VALUE."""
    name, is_given, value = text.partition("=")
    if not is_given or name not in names_of(Settings):
        raise argparse.ArgumentTypeError(f"{text!r} is not SETTING=VALUE with one of {', '.join(names_of(Settings))}")
    return name, value


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    where: Conditions = {}
    for name, value in args.where:
        where.setdefault(name, []).append(value)
    try:
        if args.columns is not None and args.format in ("csv", "json"):
            raise UsageError(f"--columns is for tables: --format {args.format} has a column for each setting")
        collected = collect(args.output_dir, where)
        if collected.rounds.empty:
            say("\n".join([*ignored(collected), f"No finished trials in {', '.join(args.output_dir)}."]))
            return NOTHING_DONE
        known = [*(each.registered_algorithm for each in collected.settings.values()), *algorithms.REGISTRY]
        against = args.against and next((name for name in known if name.lower() == args.against.lower()), args.against)
        report = Report(collected, args.selection, args.target, against, args.columns, args.delta)
        if args.export is not None:
            export(with_settings(report.rounds, collected.settings), args.export)
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
    elif args.format == "github" and args.columns is None:
        print_text(report, args.top)
    else:
        print_tables(report, args.format, args.top)
    sys.stdout.flush()
    for line in report.ignored:
        say(line)
    if args.html is not None:
        say(f"Page: {args.html}")
    return 0


def print_text(report: Report, top: int | None) -> None:
    for _, row in report.best.iterrows():
        settings = report.settings[row[SWEEP]]
        print(f"Best hyperparameter setting: {row['hash']} with mean test accuracy: {row['accuracy']:.4f}")
        print(f"Model: {settings.model_arch}\nDataset: {settings.dataset}\nAlgorithm: {settings.algorithm}")
        for name in report.varying:
            print(f"{name}: {tables.value_of(settings, name)}")
        print(f"{report.heading}: {tables.with_deviation(row['accuracy'], row['accuracy_std'])}\n")
    print_tables(report, "github", top)
    print("\nJob Statistics:\n")
    jobs = report.job_statistics()
    for title, (_, job) in zip(map(report.title, report.settings), jobs.iterrows()):
        if len(jobs) > 1:
            print(f"{title}:")
        print(f"Number of hyperparameter sets: {job['Hyper-parameter Sets']}")
        print(f"Number of trials: {job['Trials']}")
        print(f"Number of clients: {job['Clients']}")
        print(f"Training time: {job['Training Time (s)']} s in total, {job['Training Time a Trial (s)']} s a trial")
        print(f"Bytes sent: {job['MB Sent a Trial']} MB a trial")


def print_tables(report: Report, table_format: str, top: int | None) -> None:
    sections = [("Table", report.table(table_format), report.notes()), *report.sections(table_format, top)]
    escape = tables.ESCAPE[table_format]
    texts = ["\n\n".join([f"{escape(heading)}:", table, *map(escape, notes)]) for heading, table, notes in sections]
    print("\n\n".join(texts))


def print_json(report: Report, top: int) -> None:
    tests = with_settings(report.comparison, report.settings) if len(report.comparison) else report.comparison
    print(json.dumps(
        {
            "selection": report.selection,
            "results": json.loads(report.top(top).to_json(orient="records")),
            "comparison": json.loads(tests.to_json(orient="records")),
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
