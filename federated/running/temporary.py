"""Where sockets lie: in a directory whose path is short enough."""

import os
import tempfile

from federated.options import UsageError

# A socket's address takes 107 bytes; this leaves enough for the names that sockets get in it
_MAX_SOCKET_DIRECTORY = 70


def socket_directory() -> str:
    """The directory for temporary files whose path is short enough for sockets. Raises UsageError if there is none."""
    for path in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if len(os.fsencode(path)) <= _MAX_SOCKET_DIRECTORY and os.access(path, os.W_OK | os.X_OK):
            return path
    raise UsageError(
        f"TMPDIR: the path {tempfile.gettempdir()!r} is too long for sockets, and neither /tmp nor /var/tmp can be written to: "
        f"set it to a path of at most {_MAX_SOCKET_DIRECTORY} bytes"
    )
