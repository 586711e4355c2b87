"""Folders: where they are, and that nobody else can plant something in them."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanoeval import fs_paths
from nanoeval.library_config import LibraryConfig, set_library_config

UID = os.geteuid()
STRANGER = 65534

needs_root = pytest.mark.skipif(UID != 0, reason="only root can make files of another user")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A shared memory, a temp and a state folder of the test's own."""
    for name in ("shm", "tmp", "state"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(fs_paths, "_SHARED_MEMORY", tmp_path / "shm")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("NANOEVAL_DATABASE_DIR", "NANOEVAL_ROOT_DIR"):
        monkeypatch.delenv(name, raising=False)
    fs_paths._log_fallback.cache_clear()
    yield
    fs_paths._log_fallback.cache_clear()


def test_databases_lie_in_shared_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every commit of a run would wait for a disk, or other users could read the results."""
    assert fs_paths.database_dir() == tmp_path / "shm" / f"nanoeval-{UID}"
    assert mode_of(fs_paths.database_dir()) == 0o700
    assert caplog.records == []


def test_the_environment_chooses_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who wants databases on a disk could not have them there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOEVAL_DATABASE_DIR", "deep/databases")
    assert fs_paths.database_dir() == tmp_path / "deep" / "databases"
    assert mode_of(fs_paths.database_dir()) == 0o700


def test_a_chosen_folder_that_others_may_read_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that somebody shares for reading on purpose would be closed behind their back."""
    tmp_path.chmod(0o755)
    monkeypatch.setenv("NANOEVAL_DATABASE_DIR", str(tmp_path))
    assert fs_paths.database_dir() == tmp_path
    assert mode_of(tmp_path) == 0o755


def test_our_default_folder_is_closed_to_others(tmp_path: Path) -> None:
    """A default folder made with a lax umask would show the results to every user."""
    folder = tmp_path / "shm" / f"nanoeval-{UID}"
    folder.mkdir(mode=0o755)
    assert mode_of(fs_paths.database_dir()) == 0o700


def _no_shared_memory(shm: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    shm.rmdir()
    return "there is no"


def _unwritable_shared_memory(shm: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    # Root may write anywhere, so that the answer of the system has to be given here.
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(shm))
    return "is not writable"


def _full_shared_memory(shm: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    usage = namedtuple("usage", "total used free")(64 << 20, 1 << 20, 63 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    return "has 63 MiB free, under 64 MiB"


@pytest.mark.parametrize(
    "spoil", [_no_shared_memory, _unwritable_shared_memory, _full_shared_memory]
)
def test_without_shared_memory_the_temp_folder_serves_and_one_line_says_why(
    spoil: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In a container with 64 MiB of /dev/shm a run would die in mid-way, or be slow unexplained."""
    reason = spoil(tmp_path / "shm", monkeypatch)  # type: ignore[operator]
    for _ in range(3):
        assert fs_paths.database_dir() == tmp_path / "tmp" / f"nanoeval-{UID}"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage()
    assert str(fs_paths.database_dir()) in record.getMessage()


def test_databases_made_before_the_fallback_are_still_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that filled /dev/shm could not be resumed, because resume would look elsewhere."""
    before = fs_paths.database_dir()
    _full_shared_memory(tmp_path / "shm", monkeypatch)
    assert fs_paths.database_dirs() == [tmp_path / "tmp" / f"nanoeval-{UID}", before]


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_may_write_is_refused(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user could put a database there, whose pickles would run as you."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    monkeypatch.setenv("NANOEVAL_DATABASE_DIR", str(folder))
    with pytest.raises(PermissionError, match=f"mode {mode:04o}.*chmod go-w {folder}"):
        fs_paths.database_dir()


@needs_root
@pytest.mark.parametrize("place", ["shm", "chosen"])
def test_a_folder_of_another_user_is_refused(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user could make the folder first, and own whatever comes into it."""
    folder = tmp_path / place / f"nanoeval-{UID}"
    folder.mkdir(mode=0o700, parents=True)
    os.chown(folder, STRANGER, STRANGER)
    if place == "chosen":
        monkeypatch.setenv("NANOEVAL_DATABASE_DIR", str(folder))
    with pytest.raises(PermissionError, match=f"belongs to .*uid {STRANGER}.* not to .*uid 0"):
        fs_paths.database_dir()


@needs_root
def test_a_link_planted_by_another_user_is_refused(tmp_path: Path) -> None:
    """Another user could lead our databases into any folder of ours, or fill it."""
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o700)
    link = tmp_path / "shm" / f"nanoeval-{UID}"
    link.symlink_to(mine)
    os.chown(link, STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(PermissionError, match=f"the link {link} belongs to .*uid {STRANGER}"):
        fs_paths.database_dir()
    assert list(mine.iterdir()) == []


def test_my_own_link_is_followed(tmp_path: Path) -> None:
    """Somebody who linked the folder to a larger disk could no longer run."""
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o700)
    (tmp_path / "shm" / f"nanoeval-{UID}").symlink_to(mine)
    assert fs_paths.database_dir().resolve() == mine


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_something_else_in_the_folders_place_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error would come from SQLite, far from its cause."""
    place = tmp_path / "occupied"
    place.touch() if kind == "file" else place.symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv("NANOEVAL_DATABASE_DIR", str(place))
    with pytest.raises(NotADirectoryError, match=f"{place} is no folder"):
        fs_paths.database_dir()


def test_a_private_file_passes(tmp_path: Path) -> None:
    """No database could be opened at all."""
    (tmp_path / "x.db").touch(mode=0o600)
    fs_paths.check_private(tmp_path / "x.db")


@needs_root
def test_a_planted_file_is_refused(tmp_path: Path) -> None:
    """A database that another user copied into a shared folder would be unpickled."""
    planted = tmp_path / "x.db"
    planted.touch(mode=0o600)
    os.chown(planted, STRANGER, STRANGER)
    with pytest.raises(PermissionError, match="it could run code as you"):
        fs_paths.check_private(planted)


def test_a_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    """Another user could change a stored pickle."""
    open_to_all = tmp_path / "x.db"
    open_to_all.touch()
    open_to_all.chmod(0o666)
    with pytest.raises(PermissionError, match="mode 0666"):
        fs_paths.check_private(open_to_all)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    """A wrong run set id would look like a matter of permissions."""
    with pytest.raises(FileNotFoundError):
        fs_paths.check_private(tmp_path / "x.db")


def test_backups_outlive_a_reboot_and_are_private(tmp_path: Path) -> None:
    """Backups in the temp folder would go with the reboot that they are made for."""
    root = Path(fs_paths.writable_root_dir())
    assert root == tmp_path / "state" / "nanoeval"
    assert mode_of(root) == 0o700


def test_the_environment_chooses_the_place_of_backups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without a home folder could keep no backups."""
    monkeypatch.setenv("NANOEVAL_ROOT_DIR", str(tmp_path / "backups"))
    assert fs_paths.writable_root_dir() == str(tmp_path / "backups")


def test_backups_go_home_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backups would land in the working folder, or nowhere."""
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    expected = tmp_path / "home" / ".local" / "state" / "nanoeval"
    assert fs_paths.writable_root_dir() == str(expected)


def test_a_home_that_cannot_be_written_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a container with a read-only home every run would fail for its backup's sake."""
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/no-such-home")
    assert fs_paths.writable_root_dir() == str(tmp_path / "tmp" / f"nanoeval-{UID}-state")
    assert "set NANOEVAL_ROOT_DIR" in caplog.records[0].getMessage()


def test_a_hook_chooses_the_place_of_backups() -> None:
    """An organization could not send its backups to its own store."""

    class Hooks(LibraryConfig):
        def writable_root_dir(self) -> str:
            return "az://bucket/nanoeval"

    set_library_config(Hooks())
    try:
        assert fs_paths.writable_root_dir() == "az://bucket/nanoeval"
    finally:
        set_library_config(LibraryConfig())


def test_stack_traces_have_a_private_folder(tmp_path: Path) -> None:
    """Stacks show prompts and keys; other users could read them."""
    folder = fs_paths.stacktrace_root_dir()
    assert folder == tmp_path / "state" / "nanoeval" / "stack_traces"
    assert mode_of(folder) == 0o700


def test_the_package_root_holds_the_package() -> None:
    """Files that come with the package would not be found when it is installed from a wheel."""
    assert (fs_paths.get_package_root() / "eval.py").is_file()
