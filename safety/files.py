"""Files that appear whole: written beside their place, locked meanwhile, synced, renamed."""
from __future__ import annotations

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safety.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[Any]:
    """Opens a file that gets its name only once it is written to the end and safely on the disk."""
    path = Path(path)
    if path.parent == Path("/dev") or (path.exists() and not path.is_file() and not path.is_dir()):  # a device or pipe
        with open(path, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        return
    path = path.resolve() if path.is_symlink() else path  # the link stays, and leads to the new file
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path)
        try:
            with open_locked(temporary, mode) as file:
                yield file
                file.flush()
                sync(file)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def sync(file: IO[Any]) -> None:
    """Waits until what was written is on the disk, where the file system can tell."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside the path, for a while; if its process is killed, the next `remove_stale` removes it."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming_write_errors(folder):
        folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY) if os.name == "posix" else None  # elsewhere folders cannot be opened
    try:
        if descriptor is not None:
            lock(descriptor)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def naming_write_errors(path: str | Path) -> Iterator[None]:
    """Turns a full disk or a read-only folder into an error that names the file."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save and h5py hide it
        if not isinstance(cause, OSError):
            raise
        why = os.strerror(cause.errno) if cause.errno else cause
        raise InputError(f"{path} could not be written ({why}); what stood there before is as it was") from error


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written into a folder, which need not exist yet; None if it can."""
    try:
        with tempfile.TemporaryFile(dir=next(parent for parent in (folder, *folder.parents) if parent.exists())):
            return None
    except OSError as error:
        return f"{folder}: nothing can be written there ({error.strerror}); name another folder"


def lock(file: Any, wait: bool = True) -> bool:
    """Locks a file or folder until it is closed, or its process ends in whatever way. False if another process has
    the lock and we do not wait."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def open_locked(path: Path, mode: str) -> IO[Any]:
    """Opens a file anew and locks it."""
    while True:
        file = open(path, mode, encoding=None if "b" in mode else "utf-8")
        lock(file)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another process's `remove_stale` deleted it before it was locked


def replace_open(file: IO[Any], path: Path) -> None:
    """Gives an open file its name while its lock is held; on Windows, which renames no open file, once it is closed."""
    if not fcntl:
        file.close()
    Path(file.name).replace(path)


def remove_stale(path: Path) -> None:
    """Removes the temporary files and folders of this name that killed processes left: those that nobody has locked."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):
            descriptor = os.open(stale, os.O_RDONLY)
            try:
                if fcntl:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where somebody has it
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            finally:
                os.close(descriptor)
