"""Start a trial's processes and end them.

Every process that is started here ends when its parent ends, in whatever way: it has one end of a socket whose other end only
its parent has, and ends when that is closed.
"""

import atexit
import contextlib
import errno
import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
import typing
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.connection import wait as wait_for_any

from federated import models, privacy, version
from federated.options import UsageError, command_words, names_of
from federated.running import warm
from federated.running.exits import SYSTEM_ERROR_EXIT, meaning_of, no_trial_can_start
from federated.running.temporary import socket_directory
from federated.settings import ProcessOptions, ServerOptions
from federated.trial import Trial

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
    if (sentinel := inherited(PARENT_VARIABLE)) is None:  # started by hand
        return

    def watch() -> None:
        wait_for_any([sentinel])
        try:
            clean_up()
        finally:
            if os.getpgid(0) == os.getpid():  # with the processes that it has started
                os.killpg(0, signal.SIGKILL)
            os._exit(128 + signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


# Commands


def script_command(script: str, options: dict[str, typing.Any], *arguments: str) -> list[str]:
    """The command line that runs one of the project's scripts with this Python: `arguments`, then `options`."""
    return [sys.executable, str(version.HERE / script), *arguments, *command_words(options)]


def trial_commands(trial: Trial, address: str | None, client_processes: int, run: ServerOptions) -> dict[str, list[str]]:
    """{role: command} of a trial's processes, each a list of arguments. The server comes first. They connect through
    `address`, or if it is None, through a socket that they inherit."""

    def of(options: type) -> dict:
        return {"host": address} | {name: getattr(run, name) for name in names_of(options)}

    of_server = trial.server_options() | of(ServerOptions) | {"client_processes": client_processes}
    of_server["keep_checkpoints"] |= trial.may_get_more_rounds
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
        """Kill it if it still runs, and the processes that it has started and left behind."""

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
        self.sentinel = _sentinel(self._process.pid, ours)

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
    """A fork of the fork server, which has imported what trials need. It survives if somebody kills the fork server."""

    _context = multiprocessing.get_context("forkserver")
    extensions: tuple[str, ...] = ()  # that the fork server loads
    code: str | None = None  # of the fork server, see version.code()

    def __init__(self, command: list[str], log: pathlib.Path, environment: Environment) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            additions = {
                name: warm.Inherited(value) if isinstance(value, int) else value
                for name, value in {**environment, PARENT_VARIABLE: theirs.fileno()}.items()
            }
            process = self._context.Process(target=warm.run_script, args=(command, log, additions))
            self._process = typing.cast(typing.Any, process)
            try:
                start_fork(self._process)
                try:
                    self.sentinel = _sentinel(self._process.pid, self._socket)
                except ProcessLookupError:  # the fork server has already reported its end
                    self.sentinel = os.dup(self._process.sentinel)
            except BaseException:
                self._socket.close()
                raise

    @property
    def exitcode(self) -> int | None:
        wait_for_any([self.sentinel])  # a fork server that was killed would report no end
        self._process.join()
        return self._process.exitcode

    def kill(self) -> None:
        if not wait_for_any([self.sentinel], 0):  # else its number may be another process's
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
        _kill_group(self._process.pid)

    def close(self) -> None:
        self._socket.close()
        self._process.close()
        os.close(self.sentinel)


def _sentinel(pid: int, socket: socket.socket) -> int:
    """A file descriptor that is readable once the process `pid` has ended. If the system has none, it is one of `socket`, whose
    other end the process has; children that outlive it keep that end open. Raises ProcessLookupError if it has ended."""
    if hasattr(os, "pidfd_open"):
        try:
            return os.pidfd_open(pid)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EPERM):  # a kernel before 5.3, or a sandbox
                raise
    return os.dup(socket.fileno())


def _kill_group(pid: int) -> None:
    """Kill what is left of the process group that process `pid` led. The group keeps this number until it is empty."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def preload(trials: typing.Iterable[Trial], more: typing.Iterable[str] = (), extensions: tuple[str, ...] = ()) -> None:
    """Start the fork server. It imports what trials need and the modules `more`, and loads the `extensions`. It looks for
    modules on PYTHONPATH and not in the current directory, which may hold another version, and skips those it does not find.
    The fork server of an earlier launch is used again if it has the same code and extensions. Raises UsageError if no trial
    could be started."""
    check_open_files()
    modules = dict.fromkeys(
        ("server_benchmark", "client_benchmark", "federated.running.rounds", "federated.learning.worker", *more)
    )
    for trial in trials:
        modules.update(dict.fromkeys([*models.imports_of(trial.settings.model_arch), *privacy.imports_of(trial.settings)]))
    ForkedProcess._context.set_forkserver_preload([warm.__name__, *modules])
    if (ForkedProcess.extensions, ForkedProcess.code) != (extensions, version.code()):
        _end_fork_server(forkserver._forkserver)
        ForkedProcess.extensions, ForkedProcess.code = extensions, version.code()
    process = ForkedProcess._context.Process(target=warm.check)
    try:
        start_fork(process)
    except OSError as error:
        raise no_trial_can_start(error) from error
    process.join()
    if process.exitcode:
        raise UsageError(f"no trial can be started: a process for it {meaning_of(process.exitcode)}")


def start_fork(process: typing.Any) -> None:
    """Start a process of multiprocessing. If somebody has killed the fork server, start a new one. Raises OSError if the fork
    server ends by itself."""
    server: typing.Any = forkserver._forkserver
    for _ in range(2):
        if server._forkserver_pid is None or _exit_code(server, os.WNOHANG) is not None:
            _start_fork_server(server)
        try:
            with _no_main_module():
                process.start()
            return
        except (EOFError, ConnectionError):
            code = _exit_code(server, 0) or 0
            if code > SYSTEM_ERROR_EXIT:
                break
    number = code - SYSTEM_ERROR_EXIT if code > SYSTEM_ERROR_EXIT else errno.ENOMEM
    raise OSError(number, f"the process that trials are forked from has ended: {os.strerror(number)}")


def _exit_code(server: typing.Any, options: int) -> int | None:
    """How the fork server ended; None while it runs."""
    pid, status = os.waitpid(server._forkserver_pid, options)
    if not pid:
        return None
    os.close(server._forkserver_alive_fd)
    server._forkserver_pid = None
    return os.waitstatus_to_exitcode(status)


def _end_fork_server(server: typing.Any) -> None:
    if server._forkserver_pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server._forkserver_pid, signal.SIGKILL)  # on a milder signal it would wait for processes that trials left
        _exit_code(server, 0)


def _start_fork_server(server: typing.Any) -> None:
    before = dict(os.environ)
    path = os.pathsep.join(filter(None, [str(version.HERE), before.get("PYTHONPATH")]))
    directory = tempfile.mkdtemp(prefix="federated-", dir=socket_directory())
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    multiprocessing.current_process()._config["tempdir"] = directory  # type: ignore[attr-defined]
    try:
        os.environ.update({"PYTHONPATH": path, "PYTHONSAFEPATH": "1", warm.DIRECTORY_VARIABLE: directory})
        if ForkedProcess.extensions:
            os.environ[warm.EXTENSIONS_VARIABLE] = json.dumps(ForkedProcess.extensions)
        with _no_main_module():
            forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    _keep_reachable(server)


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Context that hides the main module from multiprocessing, which would run it again in each process. Trials need none, a
    notebook's cannot be run, and a script that calls sweep.main() would launch again."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _keep_reachable(server: typing.Any) -> None:
    """Connect to the fork server through a file descriptor of its socket. It stays valid if the socket's file is removed, as by
    a job that tidies the directory for temporary files."""
    address = server._forkserver_address
    if hasattr(os, "O_PATH") and not address.startswith("/proc/"):
        server._forkserver_address = f"/proc/self/fd/{os.open(address, os.O_PATH | os.O_CLOEXEC)}"


def files_needed(jobs: int = 0, processes: int = 0) -> int:
    """How many open files `jobs` trials at once need here, of `processes` client processes each. A trial has its lock, each of
    its processes two pipes, a socket and a sentinel."""
    return 32 + jobs * (1 + 4 * (1 + processes))


def check_open_files(jobs: int = 0, processes: int = 0) -> None:
    """Raises UsageError if `jobs` trials at once, of `processes` client processes each, need more open files than the limit:
    the fork server would end in the middle of a sweep."""
    needed, limit = files_needed(jobs, processes), max_open_files()
    if limit < needed:
        raise UsageError(
            f"Too many open files: {jobs} trials at once need {needed}, the limit is {limit}: raise `ulimit -n` or lower --jobs"
        )


def max_open_files() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


# Signals


class Interrupted(BaseException):
    """A signal asked this process to end. Not an Exception, so that no handler of errors swallows it."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


@contextlib.contextmanager
def interrupted_by_signals(message: str, process_ends: bool) -> Iterator[None]:
    """Context in which the first SIGINT, SIGTERM or SIGHUP prints `message` and raises Interrupted. Further ones are ignored:
    killing the trials' processes and tidying up is as fast as ending without. They are also ignored after the context if the
    process ends then; a notebook continues. A signal that this process was started to ignore, such as nohup's SIGHUP, stays
    ignored."""

    def interrupt(signum: int, frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"{signal.Signals(signum).name}: {message}", file=sys.stderr, flush=True)
        raise Interrupted(signum)

    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {each: handler for each, handler in handlers.items() if handler != signal.SIG_IGN}
    try:
        for each in before:
            signal.signal(each, interrupt)
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, signal.SIG_IGN if process_ends else handler)
