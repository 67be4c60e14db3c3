"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from exegete.errors import InputError
from exegete.files import fault_point


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder beside ``out`` to write into, and rename it to ``out`` when the context ends well.

    An exception inside the context leaves nothing behind. Raises InputError when ``out`` holds anything already, or
    cannot be made.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out} is not a folder; give another one to export to")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; give a new folder to export to, or empty it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp"))
    except OSError as error:
        raise InputError(f"{out} cannot be made: {error.strerror}; give another folder to export to") from error
    try:
        yield work
        work.chmod(0o755)
        fault_point("before rename export")
        _rename(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _rename(work: Path, out: Path) -> None:
    try:
        os.replace(work, out)  # an empty folder may stand there; one that was filled meanwhile may not
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}; give another folder to export to") from error
