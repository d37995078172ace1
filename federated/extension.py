"""Extensions: files with the user's own algorithms, models, data and launchers, which options can then name.

A file is loaded by its path, under a module name of its own. It may import modules from its own directory. None of these may
have the name of one of this project's or of the installed modules, which Python finds first.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib.abc
import importlib.util
import linecache
import os
import pathlib
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterable, Iterator

from federated import version
from federated.options import ExtensionOptions, Parser, UsageError, add_options, say, shown

Thing = typing.TypeVar("Thing")

_NAME = re.compile(r"\w[\w.+-]{0,63}", re.ASCII)  # directories get this name, too
_registries: list["Registry"] = []
_loading: list[str] = []  # the path of the file that is being loaded
_on_path: set[str] = set()  # directories that were appended to sys.path


def is_name(text: str) -> str:
    """Parse a name for a registry."""
    if not (isinstance(text, str) and _NAME.fullmatch(text)):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a name of at most 64 letters, digits and _ . + -")
    return text


class Registry(dict[str, Thing]):
    """The things that an option can name: {name: thing}. No two names differ by case alone.

    kind    the word for a thing in messages
    owners  {name: the path of the extension that added it}, without the built-in names
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.owners: dict[str, str] = {}
        _registries.append(self)

    def add(self, name: str, thing: Thing) -> None:
        """Add `thing`. Raises UsageError if its name is taken or is no valid name."""
        try:
            is_name(name)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{self.kind} {error}") from error
        for known in self:
            if known.lower() == name.lower():
                of = f"that of {self.owners[known]!r}" if known in self.owners else "a built-in one"
                raise UsageError(f"{self.kind} {name!r} is not a new name: there is {of}")
        self[name] = thing
        if _loading:
            self.owners[name] = _loading[-1]

    def require(self, holds: bool, name: object, what: str) -> None:
        """Unless `holds`, raises UsageError, which says that the thing to be added with this name is not `what`."""
        if not holds:
            raise UsageError(f"{self.kind} {shown(name)} is not {what}")


# Loading


def load_given(prog: str, argv: list[str] | None, afresh: bool = False, file_prefix: str | None = None) -> None:
    """Load the files that --extension names in a command line. A parser that is made afterwards knows the names that they add.
    Words that begin with `file_prefix` name files of arguments, which may name extensions, too. With `afresh`, first forget
    the extensions of an earlier command in this process, such as a notebook's, that this one does not name or that were edited
    since. If a file cannot be loaded, ends this process as a parser does."""
    parser = Parser(prog=prog, add_help=False, exit_on_error=False, fromfile_prefix_chars=file_prefix)
    add_options(parser, ExtensionOptions)
    words = sys.argv[1:] if argv is None else argv
    try:
        given, _ = parser.parse_known_args([word for word in words if word != "--version"])  # the script prints it
        if afresh:
            _forget_others(given.extension)
        load(given.extension)
    except argparse.ArgumentError:
        return  # the script's parser reports it
    except UsageError as error:
        parser.error(str(error))


def load(paths: Iterable[str]) -> None:
    """Load the files at `paths`, each once. Raises UsageError if one cannot be loaded. If its own code failed, prints the
    traceback first."""
    for path in map(os.path.abspath, paths):
        if path not in version.LOADED:
            _load(pathlib.Path(path))


class _Loader(importlib.abc.InspectLoader):
    """Loads a file from the content that was digested, instead of reading it again."""

    def __init__(self, path: pathlib.Path, content: bytes) -> None:
        self._path, self._content = path, content

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self._content)

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self._content, str(self._path))


def _load(path: pathlib.Path) -> None:
    extension = version.LOADED[str(path)] = version.Extension(path, own_files(path))
    stem = re.sub(r"\W", "_", path.stem)
    name = f"extension_{stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    for file, content in extension.files.items():  # tracebacks show the lines that were loaded, even after an edit
        lines = content.decode(errors="replace").splitlines(keepends=True)
        linecache.cache[str(file)] = (len(content), None, lines, str(file))
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
        _on_path.add(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path, loader=_Loader(path, extension.files[path]))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _loading.append(str(path))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for what commands print
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if not isinstance(error, UsageError):
            print_traceback(error)
        text = f"--extension {str(path)!r}: {explain(error)}"
        _forget(str(path))
        raise UsageError(text) from error
    finally:
        _loading.pop()


def _forget_others(paths: list[str]) -> None:
    """Forget the extensions that are not among `paths` or have changed. Raises UsageError if one of these cannot be read."""
    for path, loaded in list(version.LOADED.items()):
        if path not in paths or own_files(loaded.path) != loaded.files:
            _forget(path)


def _forget(path: str) -> None:
    """Remove the names that the extension at `path` added, and the modules that it imported from its own directory."""
    for registry in _registries:
        for name in [name for name, owner in registry.owners.items() if owner == path]:
            del registry[name], registry.owners[name]
    forgotten = version.LOADED.pop(path)
    own, directory = set(map(str, forgotten.files)), str(forgotten.path.parent)
    for name in [name for name, module in sys.modules.items() if getattr(module, "__file__", None) in own]:
        del sys.modules[name]
    if directory in _on_path and all(each.path.parent != forgotten.path.parent for each in version.LOADED.values()):
        _on_path.remove(directory)
        sys.path.remove(directory)


def own_files(path: pathlib.Path) -> dict[pathlib.Path, bytes]:
    """{path: content} of the file at `path` and of all files that it imports from its own directory, also within functions and
    through each other. Raises UsageError if one cannot be read, or has the name of a module elsewhere."""
    root, found, waiting = path.parent, dict[pathlib.Path, bytes](), [path]
    while waiting:
        file = waiting.pop()
        try:
            found[file] = file.read_bytes()
            tree = ast.parse(found[file], file)
        except OSError as error:
            raise UsageError(f"--extension: {str(file)!r} cannot be read: {error.strerror}") from error
        except (SyntaxError, ValueError) as error:
            raise UsageError(f"--extension {str(path)!r}: {error}") from error
        for base, name in _imports(tree, file, root):
            modules = _modules(base, name)
            if modules and base == root:
                _check_is_nowhere_else(name.partition(".")[0], modules[0], root)
            waiting += [each for each in modules if each not in found and each not in waiting and not _is_ours(each)]
    return found


def _imports(tree: ast.AST, file: pathlib.Path, root: pathlib.Path) -> Iterator[tuple[pathlib.Path, str]]:
    """(directory, dotted name) of each module that a file may import. The name is relative to the directory: `root`, or for a
    relative import that of the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((root, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = file.parents[node.level - 1] if 0 < node.level <= len(file.parents) else root
            if base.is_relative_to(root):
                yield from ((base, ".".join(filter(None, (node.module, alias.name)))) for alias in node.names)


def _modules(base: pathlib.Path, name: str) -> list[pathlib.Path]:
    """The files below the directory `base` that importing the dotted `name` loads, the packages first."""
    parts = name.split(".")
    prefixes = [base.joinpath(*parts[: end + 1]) for end in range(len(parts))]
    candidates = [each for prefix in prefixes for each in (prefix / "__init__.py", prefix.with_name(f"{prefix.name}.py"))]
    return [each for each in candidates if each.is_file()]


def _check_is_nowhere_else(name: str, file: pathlib.Path, root: pathlib.Path) -> None:
    """Raises UsageError if importing `name` would find another module than the `file` below `root`."""
    if name in sys.builtin_module_names or name in sys.stdlib_module_names:
        raise UsageError(f"--extension: {str(file)!r} has the name of Python's own module {name!r}: rename it")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return
    own = [os.path.realpath(each) for each in (root / name / "__init__.py", root / f"{name}.py")]
    if spec is not None and spec.has_location and spec.origin and os.path.realpath(spec.origin) not in own:
        raise UsageError(f"--extension: {str(file)!r} has the name of the module in {spec.origin!r}: rename it")


def _is_ours(file: pathlib.Path) -> bool:
    """Whether a file belongs to this project: an extension may lie in the project's own directory."""
    return file.is_relative_to(version.HERE / "federated") or (file.parent == version.HERE and file in _SCRIPTS)


_SCRIPTS = [path for path in version.files_of(version.HERE) if path.parent == version.HERE]


# Errors in extensions


def own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of an exception's traceback that are in extensions, the innermost last."""
    files = {str(file) for each in version.LOADED.values() for file in each.files}
    return [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]


def print_traceback(error: BaseException) -> None:
    """Print the traceback of an exception from its first frame in an extension on. The frames before it are this project's."""
    summary = traceback.TracebackException.from_exception(error)
    if own := own_frames(error):
        del summary.stack[: [(each.filename, each.lineno) for each in summary.stack].index((own[0].filename, own[0].lineno))]
    say("".join(summary.format()).rstrip("\n"))


def explain(error: BaseException) -> str:
    """An exception on one line, with the innermost frame in an extension."""
    text = " ".join(str(error).split())
    if not isinstance(error, UsageError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if own := own_frames(error):
        last = own[-1]
        text += f" ({pathlib.Path(last.filename).name}, line {last.lineno}, in {last.name}: {last.line})"
    return text
