"""Write the tables of docs/options.md and docs/algorithms.md that the parsers and the registry hold:

    python docs/make_tables.py

Each table replaces the lines below its mark, <!-- name -->, up to the next empty line. tests/test_docs.py fails if one is out
of date.
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Iterable

DOCS = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

import collect_results  # noqa: E402
import hparams_registry as registry  # noqa: E402
import sweep  # noqa: E402


def tables() -> dict[str, str]:
    """{page: its text with the tables as they have to be}."""
    made = {}
    for page in ("options.md", "algorithms.md"):
        text = (DOCS / page).read_text()
        for name, lines in _lines().items():
            before, mark, after = text.partition(f"<!-- {name} -->\n")
            if mark:
                text = before + mark + "".join(f"{line}\n" for line in lines) + after[re.match(r"(?:.+\n)*", after).end() :]
        made[page] = text
    return made


def _lines() -> dict[str, list[str]]:
    """{name of a table: its lines}."""
    commands = next(each for each in sweep.make_parser([])._actions if isinstance(each, argparse._SubParsersAction)).choices
    shown: set[str] = set()
    made = {}
    for command, parser in {**commands, "collect_results": collect_results.make_parser()}.items():
        # options of launch are listed once; other commands' tables have those that launch lacks
        made[command] = _table(("option", "what it does"), _options(parser, set() if command == "collect_results" else shown))
    made["hyper-parameters of all"] = _hparams(
        {
            ("all but `Fedsgd`", "batch_size"): registry.BATCH_SIZE,
            ("all; see the [models](models.md)", "dropout_rate"): registry.DROPOUT_RATE,
            **{(f"`{name}`", "learning_rate"): hparam for name, hparam in registry.LEARNING_RATE.items()},
            **{(f"`{where}`, `{name}`", "learning_rate"): hparam for (where, name), hparam in registry.OVERRIDES.items()},
            ("`sgd`, if the algorithm takes it", "momentum"): registry.MOMENTUM,
            ("`sgd`", "weight_decay"): registry.WEIGHT_DECAY,
        },
        "of",
    )
    own = {
        (f"`{algorithm}`", name): hparam
        for algorithm, hparams in registry.OF_ALGORITHM.items()
        for name, hparam in hparams.items()
    }
    made["hyper-parameters of algorithms"] = _hparams(own, "algorithm")
    return made


def _options(parser: argparse.ArgumentParser, shown: set[str]) -> Iterable[tuple[str, str]]:
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.option_strings and action.help and action.option_strings[-1] not in shown | {"--help", "--version"}:
            shown.add(action.option_strings[-1])
            value = "" if action.nargs == 0 else f" {action.metavar} …" if action.nargs == "+" else f" {action.metavar}"
            yield f"`{action.option_strings[-1]}{value}`", " ".join(formatter._expand_help(action).split()).replace("|", "\\|")


def _hparams(hparams: dict[tuple[str, str], registry.Hparam], of: str) -> list[str]:
    return _table(
        (of, "hyper-parameter", "default", "domain"),
        ((where, f"`{name}`", f"{hparam.default:.4g}", str(hparam.domain)) for (where, name), hparam in hparams.items()),
    )


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ("---",) * len(heads), *rows)]


if __name__ == "__main__":
    for page, text in tables().items():
        (DOCS / page).write_text(text)
