"""Command-line options: a wrong value gets one line that names it and the valid ones, and exit code 2."""

import argparse
import json
import math
import os

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


def whole(low, high=None):
    """A parser of whole numbers in [low, high]."""
    return _number(int, "a whole number", low, high)


def real(low, high=None, above=False):
    """A parser of finite numbers in [low, high], or in (low, high] with `above`."""
    return _number(float, "a number", low, high, above)


def _number(kind, what, low, high, above=False):
    bounds = f"above {low}" if above else f"of at least {low}"
    if high is not None:
        bounds += f" and at most {high}"

    def parse(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not (math.isfinite(value) and (value > low if above else value >= low) and (high is None or value <= high)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bounds}")
        return value

    return parse


def one_of(names, ignore_case=False):
    """A parser of one of `names`; with `ignore_case` the user's own spelling is kept."""
    names = list(names)
    fold = str.lower if ignore_case else str

    def parse(text):
        if fold(text) not in map(fold, names):
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(names)}")
        return text

    return parse


def host_and_port(text):
    """HOST:PORT as given, checked."""
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdecimal() and 1 <= int(port) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT with a port from 1 to 65535")
    return text


def json_object(text):
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"""{text!r} is not a JSON object such as '{{"batch_size": 32}}'""")
    return value


def directory(text):
    """A path that is a directory or could become one."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a directory")
    existing = os.path.abspath(text)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise argparse.ArgumentTypeError(f"{text!r} is not a directory: {existing!r} is a file")
    return text
