"""Where fastmem, and libraries that it uses, keep files between runs."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from fastmem.errors import UsageError


def home() -> Path:
    """Folder of weights and caches: the environment variable ``FASTMEM_HOME``, else ``~/.cache/fastmem``.

    The folder may not exist yet.

    Raises: UsageError where the user has no home folder, or something that is no folder or cannot be read is there.
    """
    named = os.environ.get("FASTMEM_HOME")
    try:
        folder = Path(named).expanduser() if named else Path.home() / ".cache" / "fastmem"
    except RuntimeError as error:
        raise UsageError(
            f"expected a home folder for weights and caches, got none for {named or 'this user'}: set "
            "FASTMEM_HOME to a folder"
        ) from error
    try:
        # the dot tells a folder from a file
        os.stat(os.path.join(folder, "."))
        problem = None if os.access(folder, os.R_OK | os.X_OK) else "one that cannot be read"
    except FileNotFoundError:
        problem = None
    except NotADirectoryError:
        problem = "a file"
    except (OSError, ValueError) as error:
        problem = f"none ({getattr(error, 'strerror', None) or error})"
    if problem is not None:
        raise UsageError(
            f"expected a folder for weights and caches at {folder}, got {problem}: set FASTMEM_HOME to a folder"
        )
    return folder


def find_weights(name: str) -> tuple[Path | None, str]:
    """A weight file in the folder ``weights`` of ``home``, or None where it is missing, and words on its place."""
    try:
        path = home() / "weights" / name
    except UsageError as error:
        return None, str(error)
    return (path, str(path)) if os.path.isfile(path) else (None, f"no {path}")


def can_keep(folder: Path) -> bool:
    """Whether files can be written into a folder, or it can be made."""
    place = folder.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def settle_matplotlib() -> None:
    """Give matplotlib a folder for its list of fonts where it has none, or it would print a warning.

    It would use a folder in the user's home, so without one it gets one in ``home``, or one that is removed at the end.
    """
    if "MPLCONFIGDIR" in os.environ:
        return
    try:
        usual = [
            Path(os.environ.get(variable) or Path.home() / below) / "matplotlib"
            for variable, below in (("XDG_CONFIG_HOME", ".config"), ("XDG_CACHE_HOME", ".cache"))
        ]
        if all(map(can_keep, usual)):
            return
    except RuntimeError:
        # without a home folder there is no usual place
        pass
    os.environ["MPLCONFIGDIR"] = str(_own_folder("matplotlib"))


def _own_folder(name: str) -> Path:
    try:
        folder = home() / name
        if can_keep(folder):
            return folder
    except UsageError:
        # it gets a passing one
        pass
    passing = tempfile.mkdtemp(prefix=f"fastmem-{name}-")
    atexit.register(shutil.rmtree, passing, ignore_errors=True)
    return Path(passing)
