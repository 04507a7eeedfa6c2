"""A directory that is written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator


def check(target: pathlib.Path, refusal: type[ValueError]) -> None:
    """Raises `refusal` if the directory can't be made."""
    if target.exists():
        raise refusal(
            f"expected an output directory that does not exist, received '{target}', which does. "
            "Remove it, or name another one."
        )
    if not (target.parent.is_dir() and os.access(target.parent, os.W_OK | os.X_OK)):
        raise refusal(
            f"expected an output directory in a folder that can be written to, received '{target}'. "
            "Make the folder, or name another one."
        )


@contextlib.contextmanager
def made(target: pathlib.Path, refusal: type[ValueError]) -> Iterator[pathlib.Path]:
    """A directory beside the target to write to, which takes its name at the end. Nothing is left if that fails.

    Args:
        target: A directory that does not exist yet.
        refusal: What is raised if it exists or can't be written.
    """
    check(target, refusal)
    temporary = None
    try:
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        yield temporary
        temporary.chmod(0o755)
        os.rename(temporary, target)
    except OSError as error:
        raise refusal(
            f"writing '{target}' failed: {error.strerror or error}. Nothing was left there. "
            "Free space, or name another place."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
