"""Start a trial's processes, give their exit codes a meaning, and end them.

Every process that is started here ends when the process that started it does, however that ends: it holds one end of
something whose other end only its parent holds, and leaves when that is closed.
"""

import contextlib
import errno
import json
import multiprocessing
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import typing
from multiprocessing import forkserver
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.util import get_temp_dir

from federated import extension, models
from federated.lock import LockedError
from federated.options import FAILED, USAGE_ERROR, UsageError, command_words, names_of
from federated.running import warm
from federated.running.channel import PeerLostError
from federated.running.temporary import socket_directory
from federated.settings import ProcessOptions, ServerOptions
from federated.trial import DivergedError, Trial
from federated.version import HERE

# Variables with the file descriptors that a trial's process inherits from its launcher
PARENT_VARIABLE = "FEDERATED_PARENT_FD"  # closed when the launcher ends
LOCK_VARIABLE = "FEDERATED_LOCK_FD"  # the trial's lock, which the launcher acquired


def inherited(variable: str) -> int | None:
    """The file descriptor of `variable`, for this process alone; None if it was started by hand."""
    if (number := os.environ.pop(variable, None)) is None:
        return None
    os.set_inheritable(int(number), False)
    return int(number)


def end_with_parent(clean_up: typing.Callable[[], object]) -> None:
    """Called by a trial's process as it starts: when its parent ends, call `clean_up` and end at once."""
    parent = multiprocessing.parent_process()
    sentinel = parent.sentinel if parent is not None else inherited(PARENT_VARIABLE)
    if sentinel is None:  # started by hand
        return

    def watch() -> None:
        wait_for_any([sentinel])
        try:
            clean_up()
        finally:
            if os.getpgid(0) == os.getpid():  # with what it has started
                os.killpg(0, signal.SIGKILL)
            os._exit(128 + signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


# Exit codes

# How a trial's process ends, besides 0, USAGE_ERROR and what Python itself has
LOCKED_EXIT, LOST_PEER_EXIT, DIVERGED_EXIT = 3, 4, 5
SYSTEM_ERROR_EXIT = 64  # and more: an error of the operating system, such as a full disk, by its number
OUT_OF_MEMORY_EXIT = SYSTEM_ERROR_EXIT + errno.ENOMEM


def exit_code_of(work: typing.Callable[[], object]) -> int:
    """Do the `work` of a trial's process. What ends it becomes its last line on stderr and the exit code."""
    try:
        work()
        return 0
    except UsageError as error:
        reason, code = f"{pathlib.Path(sys.argv[0]).name}: error: {error}", USAGE_ERROR
    except LockedError as error:
        reason, code = str(error), LOCKED_EXIT
    except PeerLostError as error:
        reason, code = str(error), LOST_PEER_EXIT
    except DivergedError as error:
        reason, code = str(error), DIVERGED_EXIT
    except BrokenPipeError:
        raise  # of stdout, as those of channels are PeerLostErrors: see exit_with
    except (Exception, SystemExit) as error:
        if _is_out_of_memory(error):
            reason = f"out of memory: {str(error).splitlines()[0] if str(error) else 'none left'}"
            code = OUT_OF_MEMORY_EXIT
        elif extension.own_frames(error):
            extension.print_traceback(error)
            reason, code = extension.explain(error), FAILED
        elif isinstance(error, OSError):
            reason, code = str(error), SYSTEM_ERROR_EXIT + (error.errno or 0)
        else:
            raise
    with contextlib.suppress(OSError):  # on a full disk the log takes nothing
        print(reason, file=sys.stderr, flush=True)
    return code


def _is_out_of_memory(error: BaseException) -> bool:
    texts = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(text in str(error) for text in texts))


def meaning_of(code: int) -> str:
    """What the exit code of a trial's process says."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    if code == DIVERGED_EXIT:
        return "diverged"
    if code == OUT_OF_MEMORY_EXIT:
        return "ran out of memory"
    if SYSTEM_ERROR_EXIT < code < 128:
        return f"ended with the system's error {os.strerror(code - SYSTEM_ERROR_EXIT)!r}"
    return f"ended with exit code {code}"


# Commands


def script_command(script: str, options: dict[str, typing.Any], *arguments: str) -> list[str]:
    """The command line that runs one of the project's scripts with this Python: `arguments`, then `options`."""
    return [sys.executable, str(HERE / script), *arguments, *command_words(options)]


def trial_commands(trial: Trial, address: str | None, client_processes: int, run: ServerOptions) -> dict[str, list[str]]:
    """{role: command} of a trial's processes, each a list of arguments. The server comes first. They meet at `address`, or if
    that is None, through a socket that they inherit."""

    def of(options: type) -> dict:
        return {"host": address} | {name: getattr(run, name) for name in names_of(options)}

    of_server = trial.server_options() | of(ServerOptions) | {"client_processes": client_processes}
    commands = {"server": script_command("server_benchmark.py", of_server)}
    for process in range(client_processes):
        of_client = of(ProcessOptions) | {"process": process}
        commands[f"client_process_{process}"] = script_command("client_benchmark.py", of_client)
    return commands


# Ways to start a command


class Process(typing.Protocol):
    """A process that was started. Its output goes to the end of a log."""

    sentinel: int  # a file descriptor that is readable once the process has ended

    @property
    def exitcode(self) -> int | None:
        """Wait for the end. A signal is a negative number."""

    def kill(self) -> None:
        """Kill it if it still runs, and what it has started and left behind."""

    def close(self) -> None: ...


# Additions to the environment: a number is a file descriptor, which the process inherits
Environment = dict[str, str | int]
Start = typing.Callable[[list[str], pathlib.Path, Environment], Process]  # command, log, additions to the environment


class SpawnedProcess:
    """A new Python, as a user would start it by hand."""

    def __init__(self, command: list[str], log: pathlib.Path, environment: Environment) -> None:
        ours, theirs = socket.socketpair()
        with open(log, "ab") as output, theirs:
            additions = {**environment, PARENT_VARIABLE: theirs.fileno()}
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[value for value in additions.values() if isinstance(value, int)],
                start_new_session=True,
                env={**os.environ, **{name: str(value) for name, value in additions.items()}},
            )
        self._socket = ours
        # Not the end of the socket, which a child that the process has forked may keep open.
        self.sentinel = os.pidfd_open(self._process.pid) if hasattr(os, "pidfd_open") else os.dup(ours.fileno())

    @property
    def exitcode(self) -> int | None:
        return self._process.wait()

    def kill(self) -> None:
        self._process.kill()
        _kill_group(self._process.pid)

    def close(self) -> None:
        self._socket.close()
        os.close(self.sentinel)


class ForkedProcess:
    """A fork of a process that has imported what trials need."""

    _context = multiprocessing.get_context("forkserver")

    def __init__(self, command: list[str], log: pathlib.Path, environment: Environment) -> None:
        additions = {name: warm.Inherited(value) if isinstance(value, int) else value for name, value in environment.items()}
        self._process = self._context.Process(target=warm.run_script, args=(command, log, additions))
        self._process.start()
        self.sentinel = self._process.sentinel

    @property
    def exitcode(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
        _kill_group(self._process.pid)

    def close(self) -> None:
        self._process.close()


def _kill_group(pid: int | None) -> None:
    """Kill what is left of the process group that a process led. It keeps its number as long as anything is."""
    assert pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def preload(trials: typing.Iterable[Trial], more: typing.Iterable[str] = (), extensions: tuple[str, ...] = ()) -> None:
    """Start the process that trials are forked from, with what they need and the modules `more` imported, and the `extensions`
    loaded. It looks for modules on PYTHONPATH and in no current directory, which may hold another version, and skips those it
    does not find. Raises UsageError if it could not open enough files."""
    check_open_files()
    modules = dict.fromkeys(
        ("server_benchmark", "client_benchmark", "federated.running.rounds", "federated.learning.worker", *more)
    )
    for trial in trials:
        modules.update(dict.fromkeys(models.imports_of(trial.settings.model_arch)))
    ForkedProcess._context.set_forkserver_preload(["__main__", warm.__name__, *modules])
    before, temporary = dict(os.environ), tempfile.tempdir
    path = os.pathsep.join(filter(None, [str(HERE), before.get("PYTHONPATH")]))
    try:
        tempfile.tempdir = socket_directory()  # where multiprocessing makes the directory of its socket
        os.environ.update({"PYTHONPATH": path, "PYTHONSAFEPATH": "1", warm.DIRECTORY_VARIABLE: get_temp_dir()})
        if extensions:
            os.environ[warm.EXTENSIONS_VARIABLE] = json.dumps(extensions)
        forkserver.ensure_running()
    finally:
        tempfile.tempdir = temporary
        os.environ.clear()
        os.environ.update(before)
    _keep_reachable(forkserver._forkserver)


def _keep_reachable(server: typing.Any) -> None:
    """Connect to the fork server through a file descriptor of its socket, which stays what it is if its name is removed, as by
    what tidies the directory for temporary files."""
    address = server._forkserver_address
    if hasattr(os, "O_PATH") and not address.startswith("/proc/"):
        server._forkserver_address = f"/proc/self/fd/{os.open(address, os.O_PATH | os.O_CLOEXEC)}"


def check_open_files(jobs: int = 0, processes: int = 0) -> None:
    """Raises UsageError if `jobs` trials at once, of `processes` client processes each, need more open files than the limit:
    the process to fork from would end in the middle of a sweep. A trial has its lock, each of its processes two pipes."""
    needed, limit = 32 + jobs * (1 + 2 * (1 + processes)), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit < needed:
        raise UsageError(
            f"Too many open files: {jobs} trials at once need {needed}, of {limit}: raise `ulimit -n` or lower --jobs"
        )


# Signals


class Interrupted(BaseException):
    """A signal asked this process to end. Not an Exception, so that no handler of errors swallows it."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


def interrupt_on_signals(message: str) -> None:
    """Print `message` and raise Interrupted on the first SIGINT, SIGTERM or SIGHUP. Ignore further ones: what follows is
    killing the trials' processes and tidying up, which is as fast as ending without. A signal that this process was started
    to ignore, such as nohup's SIGHUP, stays ignored."""

    def interrupt(signum: int, frame: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"{signal.Signals(signum).name}: {message}", file=sys.stderr, flush=True)
        raise Interrupted(signum)

    signals = [each for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN]
    for each in signals:
        signal.signal(each, interrupt)
