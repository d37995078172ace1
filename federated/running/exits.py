"""The exit codes of a trial's processes, and the causes that they and signals indicate."""

import contextlib
import errno
import multiprocessing
import os
import pathlib
import signal
import sys
import typing

from federated import extension
from federated.lock import LockedError
from federated.options import FAILED, USAGE_ERROR, UsageError, system_error_behind
from federated.running.channel import PeerLostError
from federated.trial import DivergedError

# Exit codes of a trial's process, besides 0, USAGE_ERROR and Python's own
LOCKED_EXIT, LOST_PEER_EXIT, DIVERGED_EXIT, DEVICE_MEMORY_EXIT = 3, 4, 5, 6
SYSTEM_ERROR_EXIT = 64  # plus errno: an error of the operating system, such as a full disk
OUT_OF_MEMORY_EXIT = SYSTEM_ERROR_EXIT + errno.ENOMEM
UNKNOWN_EXIT = 255  # multiprocessing's own if the fork server, which knew the code, is gone
_PYTHON_FAILED, _LOG_FAILED = 1, 120

# Hints that the system's texts lack
_ERRORS = {
    errno.ENOSPC: "space or inodes are used up where the trial lies: see `df -h` and `df -i`",
    errno.EDQUOT: "your space or number of files is used up where the trial lies",
    errno.EFBIG: "`ulimit -f`, or the largest file of the file system",
    errno.EROFS: "the system makes it so after an error of the disk",
    errno.EIO: "the disk or the file server has failed",
    errno.ESTALE: "the file server has lost the file",
    errno.ENOTCONN: "the process that serves the file system has ended",
    errno.EACCES: "permissions have changed, or your ticket for the file server has expired",
    errno.EPERM: "permissions have changed",
    errno.EMFILE: "raise `ulimit -n` or lower --jobs",
    errno.ENFILE: "the machine's limit: lower --jobs",
    errno.EAGAIN: "no more processes or threads may start: raise `ulimit -u` or lower --jobs",
    errno.ENOMEM: "the machine's, the cgroup's or `ulimit -v`: lower --jobs or --client_processes",
}
_SIGNALS = {
    signal.SIGKILL: "by a user, or because of a limit of memory or time",
    signal.SIGTERM: "by a user, or by a batch system",
    signal.SIGBUS: "a file that it reads was truncated, or memory or disk space is used up",
    signal.SIGSEGV: "a fault of a library or of the memory",
    signal.SIGILL: "a library is built for another processor",
    signal.SIGXCPU: "`ulimit -t` is used up",
}
_CODES = {
    _PYTHON_FAILED: "ended with an error of its program",
    USAGE_ERROR: "refused its options",
    LOST_PEER_EXIT: "lost another process of its trial",
    DIVERGED_EXIT: "diverged",
    DEVICE_MEMORY_EXIT: "ran out of the GPU's memory (others may hold some: see nvidia-smi; else try a smaller "
    "batch_size, a smaller model or --precision bf16)",
    OUT_OF_MEMORY_EXIT: f"ran out of memory ({_ERRORS[errno.ENOMEM]})",
    _LOG_FAILED: "could not write the end of its log",
    UNKNOWN_EXIT: "ended for an unknown reason: the process that knew it, from which it was forked, has ended, too",
}
# How torch and CUDA's libraries say that the device's memory is used up
_DEVICE_MEMORY = (
    "CUDA out of memory",
    "HIP out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
# Errors that fewer trials at once may avoid, and errors that may well be over at the next attempt
_NO_ROOM = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_PASSING = (errno.EIO, errno.ESTALE, *_NO_ROOM)


def system_error_exit(error: OSError) -> int:
    """The exit code of a process that `error` ends."""
    return SYSTEM_ERROR_EXIT + (error.errno or 0)


def meaning_of(code: int) -> str:
    """The meaning of an exit code of a trial's process. A signal is a negative number."""
    if code in _CODES:
        return _CODES[code]
    if code < 0:
        names = {each.value: each.name for each in signal.Signals}
        return f"was killed by {names.get(-code, f'signal {-code}')}{_hint(_SIGNALS, -code)}"
    if (number := code - SYSTEM_ERROR_EXIT) in errno.errorcode:
        return f"ended with the system's error {os.strerror(number)!r}{_hint(_ERRORS, number)}"
    return f"ended with exit code {code}"


def with_hint(error: OSError) -> str:
    """The text of an error, with a hint if there is one."""
    return f"{error}{_hint(_ERRORS, error.errno)}"


def no_trial_can_start(error: OSError) -> UsageError:
    return UsageError(f"no trial can be started: {with_hint(error)}")


def _hint(hints: dict, key: int | None) -> str:
    return f" ({hints[key]})" if key in hints else ""


def is_accident(code: int | None) -> bool:
    """True if a trial whose process ended with `code`, or fell silent (None), may well succeed next time."""
    return code is None or code < 0 or code in (LOST_PEER_EXIT, UNKNOWN_EXIT) or code - SYSTEM_ERROR_EXIT in _PASSING


def lacks_room(code: int | None) -> bool:
    """True if a process that ended with `code` lacked, or probably lacked, resources that fewer trials would leave free."""
    return code == UNKNOWN_EXIT or (code is not None and code - SYSTEM_ERROR_EXIT in _NO_ROOM)


def exit_code_of(work: typing.Callable[[], object]) -> int:
    """Do the `work` of a trial's process. An error that ends it becomes the last line on stderr and the exit code."""
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
        raise  # of stdout, see exit_with; those of channels are PeerLostErrors
    except (Exception, SystemExit) as error:
        cause = system_error_behind(error)
        if any(words in str(error) for words in _DEVICE_MEMORY):
            reason, code = " ".join(str(error).split()), DEVICE_MEMORY_EXIT
        elif extension.own_frames(error) and (cause is None or cause.errno != errno.ENOMEM):
            extension.print_traceback(error)
            reason, code = extension.explain(error), FAILED
        elif cause is None:
            raise
        else:
            reason, code = str(cause), system_error_exit(cause)
    finally:
        for child in multiprocessing.active_children():  # started by an extension: Python would wait for it
            child.kill()
    with contextlib.suppress(OSError):  # on a full disk the log takes nothing
        print(reason, file=sys.stderr, flush=True)
    return code
