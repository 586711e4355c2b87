"""Where nanoeval keeps its files, and that those places are private. Knows not what they hold."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

ENV_DATABASE_DIR = "NANOEVAL_DATABASE_DIR"
ENV_ROOT_DIR = "NANOEVAL_ROOT_DIR"
# Below this much free space /dev/shm is no place for databases (containers often give it 64 MiB).
MIN_FREE_BYTES = 64 * 1024**2

_SHARED_MEMORY = Path("/dev/shm")
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH

logger = logging.getLogger(__name__)


def get_package_root() -> Path:
    """The folder of the installed `nanoeval` package."""
    return Path(__file__).resolve().parent


def writable_root_dir() -> str:
    """Where backups go, as `library_config` says; a str, because a hook may name a remote store."""
    from nanoeval.library_config import get_library_config

    return get_library_config().writable_root_dir()


def stacktrace_root_dir() -> Path:
    """The private folder for stack traces of executors; created when missing."""
    return private_dir(default_root_dir() / "stack_traces")


def database_dir() -> Path:
    """The private folder that new run databases go into; created when missing.

    `$NANOEVAL_DATABASE_DIR`, else `/dev/shm/nanoeval-<uid>`, else, where that cannot serve, a
    folder of the same name in the temp folder, with one log line that says why. Raises
    PermissionError for a folder that others own or may write to: they could plant code there that
    runs as you.
    """
    if chosen := os.environ.get(ENV_DATABASE_DIR):
        return private_dir(Path(chosen).absolute(), tighten=False)
    reason = _unfit_shared_memory()
    if reason is None:
        return private_dir(_SHARED_MEMORY / _user_folder())
    fallback = Path(tempfile.gettempdir()) / _user_folder()
    _log_fallback(f"run databases go to {fallback}: {reason}")
    return private_dir(fallback)


def database_dirs() -> list[Path]:
    """The existing folders where databases of earlier runs may lie, `database_dir()` first."""
    places = [database_dir()]
    if not os.environ.get(ENV_DATABASE_DIR):
        places += [_SHARED_MEMORY / _user_folder(), Path(tempfile.gettempdir()) / _user_folder()]
    return [place for place in dict.fromkeys(places) if place.is_dir()]


def default_root_dir() -> Path:
    """The private folder for what should outlive a reboot; created when missing.

    `$NANOEVAL_ROOT_DIR`, else `$XDG_STATE_HOME/nanoeval`, else `~/.local/state/nanoeval`, else,
    where the home folder cannot be written, `nanoeval-<uid>-state` in the temp folder, with one log
    line.
    """
    if chosen := os.environ.get(ENV_ROOT_DIR):
        return private_dir(Path(chosen).absolute(), tighten=False)
    state_home = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    try:
        return private_dir(Path(state_home).absolute() / "nanoeval")
    except OSError as error:
        fallback = Path(tempfile.gettempdir()) / f"{_user_folder()}-state"
        _log_fallback(
            f"backups go to {fallback}, which may not outlive a reboot: {error};"
            f" set {ENV_ROOT_DIR} to choose another folder"
        )
        return private_dir(fallback)


def private_dir(path: Path, *, tighten: bool = True) -> Path:
    """Create folder `path` with mode 0700, or check that it is this user's own, and return it.

    With `tighten`, an existing own folder is set to 0700 too. Raises PermissionError when others
    own it or may write to it, NotADirectoryError when it is something else.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(
            f"{path} is no folder, but one is needed there; remove it or choose another place"
        ) from error
    except OSError as error:
        raise type(error)(
            error.errno,
            f"a folder cannot be made ({error.strerror}); set {ENV_DATABASE_DIR}, or for backups"
            f" {ENV_ROOT_DIR}, to one that this user can write to",
            str(path),
        ) from error
    if tighten:
        _check_owner(path)
        path.chmod(0o700)
    check_private(path)
    return path


def check_private(path: Path) -> None:
    """Raise PermissionError unless the file or folder `path` is this user's own.

    Own means: this user owns it (and the link, where it is one), and nobody else may write to it. A
    missing file raises FileNotFoundError.
    """
    _check_owner(path)
    mode = path.stat().st_mode
    if mode & _OTHERS_MAY_WRITE:
        raise PermissionError(
            f"{path} may be written by other users (mode {stat.S_IMODE(mode):04o}), who could plant"
            f" code there that runs as you; look at what it holds, then `chmod go-w {path}`"
        )


def _check_owner(path: Path) -> None:
    for status in (path.lstat(), path.stat()):
        if status.st_uid != os.geteuid():
            kind = "the link " if stat.S_ISLNK(status.st_mode) else ""
            raise PermissionError(
                f"{kind}{path} belongs to {_user_name(status.st_uid)}, not to"
                f" {_user_name(os.geteuid())}; nothing in it is read, since it could run code as"
                f" you. Have its owner remove it, or set {ENV_DATABASE_DIR} to a folder of your own"
            )


def _unfit_shared_memory() -> str | None:
    """Why /dev/shm cannot hold databases; None when it can."""
    if not _SHARED_MEMORY.is_dir():
        return f"there is no {_SHARED_MEMORY}"
    own = _SHARED_MEMORY / _user_folder()
    if not os.access(own if own.exists() else _SHARED_MEMORY, os.W_OK | os.X_OK):
        return f"{_SHARED_MEMORY} is not writable"
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if free < MIN_FREE_BYTES:
        return f"{_SHARED_MEMORY} has {free >> 20} MiB free, under {MIN_FREE_BYTES >> 20} MiB"
    return None


@functools.cache
def _log_fallback(message: str) -> None:
    # Cached, so that a process says it once.
    logger.warning(message)


def _user_folder() -> str:
    return f"nanoeval-{os.geteuid()}"


def _user_name(uid: int) -> str:
    import pwd

    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"
