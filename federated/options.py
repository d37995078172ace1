"""Command-line options: a wrong value gets one line that names it and the valid ones, and exit code 2."""

import argparse
import dataclasses
import errno
import fcntl
import io
import json
import math
import os
import pathlib
import shlex
import signal
import sys
import textwrap
import typing
from collections.abc import Callable, Collection

from federated import version
from federated.files import read_regular

# Exit codes of the scripts besides 0; 128 + n means that signal n ended the script
FAILED, USAGE_ERROR, ALL_LOCKED = 1, 2, 3


class UsageError(Exception):
    """The user asked for something that cannot be done; the text is the one line to show."""


def say(text: str) -> None:
    """Print a message for the user. Data go to stdout, messages to stderr."""
    print(text, file=sys.stderr, flush=True)


_NOT_ONE_OF = " is not one of "
PIPE_CLOSED = 128 + signal.SIGPIPE  # the exit code of a command whose reader has gone, as a shell reports it


def prepare_streams() -> None:
    """Open /dev/null as each standard stream that is closed, as by `>&-`, or open the other way, so that no file or socket of
    this process gets its number. No output fails for want of a character: the encoding is the environment's, as whoever set it
    has a reader for it, which sees "?" for what it lacks."""
    for number, (name, useless) in enumerate((("stdin", os.O_WRONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_RDONLY))):
        if _access_mode(number) in (None, useless):
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, number)
            os.set_inheritable(number, True)
            if nothing != number:
                os.close(nothing)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def _access_mode(descriptor: int) -> int | None:
    """O_RDONLY, O_WRONLY or O_RDWR; None if it is closed."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        return None


# The texts for it of torch, Python and the system's loader of libraries
_OUT_OF_MEMORY = ("out of memory", "allocate memory", "failed to map segment")
_OUT_OF_THREADS = "can't start new thread"


def system_error_behind(error: BaseException) -> OSError | None:
    """The operating system's error behind `error`; None if it is an error of the program."""
    if isinstance(error, OSError):
        return error
    text, number = str(error).partition("\n")[0], None
    if isinstance(error, MemoryError) or any(words in text.lower() for words in _OUT_OF_MEMORY):
        number = errno.ENOMEM
    elif _OUT_OF_THREADS in text:
        number = errno.EAGAIN
    return None if number is None else OSError(number, os.strerror(number), text or "memory")


def exit_with(main: Callable[[], int]) -> typing.NoReturn:
    """End this process with the exit code of main(). If the reader of its output goes away, as in `… | head -3`, end without a
    word."""
    prepare_streams()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it is ignored, as whoever started this may have it, no end has a code
    try:
        try:
            code: typing.Any = main()
        except SystemExit as ended:  # argparse's, after --help or a wrong option
            code = ended.code
        except KeyboardInterrupt:  # in a command that handles no signals, or before one does
            code = 128 + signal.SIGINT
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)  # the code is known
        sys.stdout.flush()
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        if (cause := system_error_behind(error)) is None:
            raise
        code = PIPE_CLOSED
        if not isinstance(error, BrokenPipeError):
            code = FAILED
            say(f"{pathlib.Path(sys.argv[0]).name}: error: {cause.filename or 'standard output'}: {cause.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python flushes once more as it ends
    sys.exit(code)


class HelpFormatter(argparse.HelpFormatter):
    """Help that breaks lines at spaces alone, as a value such as --time=2:00:00 is to be copied, and says once that an option
    takes several values."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(f"{indent}{line}" for line in self._split_lines(text, width - len(indent)))

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return f"{action.metavar} ..." if action.nargs == "+" else super()._format_args(action, default_metavar)


class Parser(argparse.ArgumentParser):
    """An argparse parser without abbreviations whose errors are one line."""

    def __init__(self, **kwargs) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        # What to add to the message that a name is not one of those there are
        self.hint: Callable[[], str] = str
        text = f"FedSweep {version.VERSION}, code {version.code()}"
        self.add_argument("--version", action="version", version=text, help="print the version and the digest of the code")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """The words of a line in a file of arguments, as a shell would take them apart."""
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:
            self.error(f"{shortened(arg_line)!r} in a file of arguments: {error}")

    def parse_known_args(self, args=None, namespace=None):
        try:
            return super().parse_known_args(args, namespace)
        except UnicodeDecodeError as error:
            self.error(f"a file of arguments is no text: {error}")

    def error(self, message: str) -> typing.NoReturn:
        hint = self.hint() if _NOT_ONE_OF in message else ""
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}{hint}\n")


Options = typing.TypeVar("Options")


def option(
    default: typing.Any,
    parse: typing.Callable | None,
    help: str | Callable[[], str],
    metavar: str | None = None,
    several: bool = False,
    bare: typing.Any = None,
) -> typing.Any:
    """A field of a dataclass of options: its name is the option's. `parse` is argparse's type; None makes a flag. A help that
    lists what extensions may add to is a function. With `several` the field is a tuple. `bare` is the value of the option if
    none is given with it."""
    metadata = {"parse": parse, "help": help, "metavar": metavar, "several": several, "bare": bare}
    return dataclasses.field(default=default, metadata=metadata)


def add_options(
    parser: typing.Any,
    options: type,
    given_only: bool = False,
    several: typing.Collection[str] = (),
    without: typing.Collection[str] = (),
) -> None:
    """Add to `parser` the option of each field of the dataclass `options`, but for those in `without`. With `given_only`, the
    namespace holds only what the user gave. An option in `several` takes one value or more."""
    for field in dataclasses.fields(options):
        if field.name in without:
            continue
        parse, default, help = field.metadata["parse"], field.default, field.metadata["help"]
        what: dict[str, typing.Any] = {"action": "store_true"}
        if parse is not None:
            kind = "name" if field.type is str else getattr(field.type, "__name__", str(field.type))
            metavar = field.metadata["metavar"] or kind.upper()
            what = {"type": parse, "metavar": metavar, "nargs": "+" if field.name in several else None}
            if (bare := field.metadata["bare"]) is not None:
                what |= {"nargs": "?", "const": bare}
        shown_default = f" (default: {default})" if default not in (None, ()) and parse is not None else ""
        if field.metadata["several"]:
            default, what = [], what | {"nargs": "+", "action": "extend"}
        parser.add_argument(
            f"--{field.name}",
            default=argparse.SUPPRESS if given_only else default,
            help=(help() if callable(help) else help) + shown_default,
            **what,
        )


def options_from(options: type[Options], namespace: argparse.Namespace) -> Options:
    """The dataclass `options` with what `namespace` has of its fields; the others keep their defaults."""
    given = {name: value for name, value in vars(namespace).items() if name in names_of(options)}
    return options(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def names_of(options: type) -> list[str]:
    """The names of the options in a dataclass."""
    return [field.name for field in dataclasses.fields(options)]


def command_words(values: dict[str, typing.Any]) -> list[str]:
    """The words of a command line that set the options `values`, {name: value}. Name and value stand in one word, so that no
    value can be taken for an option. True sets a flag; None and False leave the option out; a tuple gives it once for each
    value, a list once with all of them."""
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, tuple):
            words += [f"--{name}={each}" for each in value]
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


MAX_INTEGER = 10**9  # if nothing else bounds an integer


def integer(low: float, high: float = MAX_INTEGER) -> Callable[[str], float]:
    """A parser of whole numbers in [low, high]."""
    return _number(int, "a whole number", low, high)


def number(low: float, high: float, above: bool = False) -> Callable[[str], float]:
    """A parser of numbers in [low, high], or in (low, high] with `above`."""
    return _number(float, "a number", low, high, above)


def _number(kind: Callable[[str], float], what: str, low: float, high: float, above: bool = False) -> Callable[[str], float]:
    bounds = f"{'above' if above else 'of at least'} {low} and at most {high}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not ((value > low if above else value >= low) and value <= high):
            raise argparse.ArgumentTypeError(f"{shown(text)} is not {what} {bounds}")
        return value

    return parse


def one_of(names: Collection[str], ignore_case: bool = False) -> Callable[[str], str]:
    """A parser of one of `names`, as they are when it is called; with `ignore_case` the user's own spelling is kept."""
    fold = str.lower if ignore_case else str

    def parse(text: str):
        if fold(text) not in map(fold, names):
            raise argparse.ArgumentTypeError(f"{shown(text)}{_NOT_ONE_OF}{', '.join(names)}")
        return text

    return parse


def host_and_port(text: str) -> str:
    """HOST:PORT as given, checked."""
    host, _, port = text.rpartition(":")
    if not (is_plain(host) and port.isascii() and port.isdecimal() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not HOST:PORT with a port from 1 to 65535")
    return text


def address(text: str) -> str:
    """HOST:PORT, or the path of a Unix socket."""
    if "/" not in text:
        return host_and_port(text)
    if not is_plain(text) or len(text.encode()) > 107:  # what fits into a sockaddr_un
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is neither HOST:PORT nor the path of a Unix socket of at most 107 bytes"
        )
    return text


def json_object(text: str) -> dict:
    """A JSON object."""
    try:
        value = json.loads(text, object_pairs_hook=_each_name_once)
    except (ValueError, RecursionError) as error:
        value = error
    if not isinstance(value, dict):
        reason = f" ({value})" if isinstance(value, _TwiceError) else ""
        raise argparse.ArgumentTypeError(f"""{shown(text)} is not a JSON object such as '{{"batch_size": 32}}'{reason}""")
    return value


def json_object_or_file(text: str) -> dict:
    """A JSON object, or the one in the file that `text` names."""
    if text.lstrip().startswith("{") or not is_plain(text):
        return json_object(text)
    try:
        content = read_regular(pathlib.Path(text), _MAX_FILE_BYTES).decode()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(
            f"""{shown(text)} is neither a JSON object such as '{{"batch_size": 32}}' nor a file that holds one: {reason}"""
        ) from error
    try:
        return json_object(content)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"the file {shown(text)} holds no domains: {error}") from error


_MAX_FILE_BYTES = 1 << 20


class _TwiceError(ValueError):
    """A JSON object has the same name twice."""


def _each_name_once(pairs: list[tuple[str, typing.Any]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(f"it has {shown(next(name for name in names if names.count(name) > 1))} twice")
    return value


def directory(text: str) -> str:
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


def python_file(text: str) -> str:
    """The absolute path of a Python file that is there."""
    if not is_plain(text) or not text.endswith(".py") or not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a Python file that is there")
    return os.path.abspath(text)


@dataclasses.dataclass(frozen=True)
class ExtensionOptions:
    """The code of the user's own that a process loads, see federated.extension."""

    extension: tuple[str, ...] = option(
        (),
        python_file,
        "files of your own algorithms, models, data sets, …: see docs/own_code.md",
        metavar="FILE",
        several=True,
    )


def output_file(suffixes: tuple[str, ...]) -> Callable[[str], pathlib.Path]:
    """A parser of the path of a file to write, whose name ends in one of `suffixes`."""

    def parse(text: str):
        path = pathlib.Path(text)
        if not is_plain(text) or path.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a file's name that ends in {', '.join(suffixes)}")
        if not os.path.isdir(path.parent) or os.path.isdir(path):
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a file in a directory that is there")
        return path

    return parse


def _exists(path: str) -> bool:
    """True if something exists at `path`. Raises OSError if nothing can."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_plain(text: str) -> bool:
    """Whether `text` may be part of a name: neither empty nor with NUL or bytes that are no UTF-8."""
    return bool(text) and "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def shown(value: object) -> str:
    """`value` as an error message quotes it: on one line, and shortened."""
    return shortened(repr(value))


def shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:150]}…{text[-20:]}"
