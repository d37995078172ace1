"""A directory for sockets, which need short paths."""

import os
import tempfile

from federated.options import UsageError

# A socket's address has at most 107 bytes; this leaves enough for the sockets' names
_MAX_SOCKET_DIRECTORY = 70


def socket_directory() -> str:
    """The first directory for temporary files with a path short enough for sockets. Raises UsageError if there is none."""
    for path in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if len(os.fsencode(path)) <= _MAX_SOCKET_DIRECTORY and os.access(path, os.W_OK | os.X_OK):
            return path
    raise UsageError(
        f"TMPDIR: the path {tempfile.gettempdir()!r} is too long for sockets, and neither /tmp nor /var/tmp can be written to: "
        f"set it to a path of at most {_MAX_SOCKET_DIRECTORY} bytes"
    )
