"""Command-line options: a wrong value gets one line that names it and the valid ones, and exit code 2."""

import argparse
import json
import math
import os
import pathlib

USAGE_ERROR = 2


class UsageError(Exception):
    """The user asked for something that cannot be done; the text is the one line to show."""


class Parser(argparse.ArgumentParser):
    """An argparse parser without abbreviations whose errors are one line."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\n")


def defaults_of(add_arguments) -> dict:
    """{name: default} of the options that add_arguments(parser) adds."""
    parser = Parser()
    add_arguments(parser)
    return vars(parser.parse_args([]))


def command_line(add_arguments, args: argparse.Namespace) -> list[str]:
    """What `args` hold of the options that add_arguments(parser) adds, as a command line that it parses to the same."""
    given = {name: getattr(args, name) for name in defaults_of(add_arguments)}
    flags = [f"--{name}" for name, value in given.items() if value is True]
    values = {name: value for name, value in given.items() if value is not None and not isinstance(value, bool)}
    return [*(part for name, value in values.items() for part in (f"--{name}", str(value))), *flags]


MOST = 10**9  # where nothing else bounds a whole number


def whole(low, high=MOST):
    """A parser of whole numbers in [low, high]."""
    return _number(int, "a whole number", low, high)


def real(low, high, above=False):
    """A parser of numbers in [low, high], or in (low, high] with `above`."""
    return _number(float, "a number", low, high, above)


def _number(kind, what, low, high, above=False):
    bounds = f"{'above' if above else 'of at least'} {low} and at most {high}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not ((value > low if above else value >= low) and value <= high):
            raise argparse.ArgumentTypeError(f"{shown(text)} is not {what} {bounds}")
        return value

    return parse


def one_of(names, ignore_case=False):
    """A parser of one of `names`; with `ignore_case` the user's own spelling is kept."""
    names = list(names)
    fold = str.lower if ignore_case else str

    def parse(text):
        if fold(text) not in map(fold, names):
            raise argparse.ArgumentTypeError(f"{shown(text)} is not one of {', '.join(names)}")
        return text

    return parse


def host_and_port(text):
    """HOST:PORT as given, checked."""
    host, _, port = text.rpartition(":")
    if not (is_plain(host) and port.isascii() and port.isdecimal() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not HOST:PORT with a port from 1 to 65535")
    return text


def address(text):
    """HOST:PORT, or the path of a Unix socket."""
    if "/" not in text:
        return host_and_port(text)
    if not is_plain(text) or len(text.encode()) > 107:  # what fits into a sockaddr_un
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is neither HOST:PORT nor the path of a Unix socket of at most 107 bytes"
        )
    return text


def json_object(text):
    """A JSON object."""
    try:
        value = json.loads(text, object_pairs_hook=_each_name_once)
    except (ValueError, RecursionError) as error:
        value = error
    if not isinstance(value, dict):
        reason = f" ({value})" if isinstance(value, _TwiceError) else ""
        raise argparse.ArgumentTypeError(f"""{shown(text)} is not a JSON object such as '{{"batch_size": 32}}'{reason}""")
    return value


class _TwiceError(ValueError):
    """A name stands twice in a JSON object."""


def _each_name_once(pairs):
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(f"{shown(next(name for name in names if names.count(name) > 1))} stands twice in it")
    return value


def directory(text):
    """A path that is a directory or could become one."""
    if not is_plain(text):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a directory: it is empty or has characters no name may have")
    try:
        existing = os.path.abspath(text)
        while not _exists(existing):
            existing = os.path.dirname(existing)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a directory: {error.strerror}") from error
    if not os.path.isdir(existing):
        what = "a link that leads nowhere" if os.path.islink(existing) else "a file"
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a directory: {shown(existing)} is {what}")
    if not os.access(existing, os.R_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a directory of yours: {shown(existing)} may not be read")
    return text


def output_file(suffixes):
    """A parser of the path of a file to write, whose name ends in one of `suffixes`."""

    def parse(text):
        path = pathlib.Path(text)
        if not is_plain(text) or path.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a file's name that ends in {', '.join(suffixes)}")
        if not os.path.isdir(path.parent) or os.path.isdir(path):
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a file in a directory that is there")
        return path

    return parse


def _exists(path):
    """Whether something has the name `path`. Raises OSError where nothing ever could."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_plain(text):
    """Whether `text` may be part of a name: neither empty nor with NUL or bytes that are no UTF-8."""
    return bool(text) and "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def shown(value) -> str:
    """`value` as an error message quotes it: on one line, and not without end."""
    return shortened(repr(value))


def shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:150]}…{text[-20:]}"
