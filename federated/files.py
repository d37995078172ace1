"""Writing files that are whole or absent."""

import os
import pathlib


def write_atomically(path: pathlib.Path, content):
    """Write a file that is whole or absent, whatever happens meanwhile. `content` is a text, or a function that is given the
    file to write to and called before the file gets its name."""
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")  # a pid may be one on another host too
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
