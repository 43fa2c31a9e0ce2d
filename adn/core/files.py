"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; on success it becomes `path`, on failure it is removed.

    The data are on the disk before the name changes, so after a crash or a full disk `path` holds the former file
    or the new one, never a part.

    Raises:
        OSError: of the kind that occurred; the message names `path` and the reason.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            # Made here for the access rights of an ordinary file: some writers would make a private one.
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode & 0o777
            yield temporary
            temporary.chmod(mode)
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(error.errno, f"cannot write {path}: {reason}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
