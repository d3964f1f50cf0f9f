"""Small files written whole or not at all: under a temporary name, to the disk, then renamed. An older file stays until
then; of a link, what it leads to is replaced."""

import os
import secrets
from pathlib import Path

from library.errors import UserError


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, and the folders that it is in.

    Raises:
        UserError: it can't be written.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError.single(str(path), f"can't be written ({error.strerror or error})") from error
