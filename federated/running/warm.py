"""Code that runs in the fork server, from which warm trials are forked, and in the forks."""

import atexit
import contextlib
import importlib
import json
import os
import pathlib
import shutil
import signal
import sys
import typing
from multiprocessing import reduction

from federated import extension
from federated.options import prepare_streams, system_error_behind
from federated.running.exits import exit_code_of, system_error_exit

DIRECTORY_VARIABLE = "FEDERATED_FORKSERVER_DIRECTORY"
EXTENSIONS_VARIABLE = "FEDERATED_FORKSERVER_EXTENSIONS"


def end_fork_server(kind: type[BaseException], error: BaseException, traceback: typing.Any) -> None:
    """End with the exit code of a system error, such as the limit of processes. The parent reports it."""
    cause = system_error_behind(error)
    if cause is not None and not isinstance(cause, ConnectionError):  # that is, the parent lives
        os._exit(system_error_exit(cause))
    sys.__excepthook__(kind, error, traceback)


if DIRECTORY_VARIABLE in os.environ:
    # Normally the parent removes the directory of the fork server's socket. If the parent is killed, the fork server does so as
    # it exits.
    atexit.register(shutil.rmtree, os.environ.pop(DIRECTORY_VARIABLE), ignore_errors=True)
    sys.excepthook = end_fork_server


def check() -> None:
    """In a fork: import torch, and end with the exit code of that. The fork server skips modules that it cannot import."""
    sys.exit(exit_code_of(lambda: importlib.import_module("torch")))


# All trials of a launch run the extensions as they are now, even if they are edited meanwhile. If one cannot be loaded here,
# the forks try again and report why.
if EXTENSIONS_VARIABLE in os.environ:
    with contextlib.suppress(Exception), open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        extension.load(json.loads(os.environ.pop(EXTENSIONS_VARIABLE)))


class Inherited(int):
    """A file descriptor that a fork inherits. In the fork it is unpickled as its number there."""

    def __reduce__(self) -> tuple:
        return _number_of, (reduction.DupFd(int(self)),)


def _number_of(descriptor: typing.Any) -> int:
    return descriptor.detach()


def run_script(command: list[str], log: pathlib.Path, environment: dict[str, str | int]) -> None:
    """In the fork: run the script of `command` as a new process would."""
    os.setsid()
    os.environ.update(
        {name: str(value) for name, value in environment.items()}
    )  # CUDA reads them at its first use, and the parent never uses it
    with open(log, "ab") as output, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    prepare_streams()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _, script, *arguments = command
    sys.argv = [script, *arguments]
    sys.exit(importlib.import_module(pathlib.Path(script).stem).main(arguments))
