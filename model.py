"""The motion autoencoder, and what the three scripts share: one-line errors, whole files, safe loading."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FEATURE_SUFFIXES = (".pt", ".pth", ".npy")


# ---------------------------------------------------------------------------------------------------------------------
# What the scripts share
# ---------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can mend. Its text is the one line they read: what is wrong, and what to do about it."""


def run_script(main: Callable[[], int]) -> None:
    """Run a script's `main` and exit with its status; a `UserError` becomes one line on standard error and status 2."""
    try:
        status = main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: stopped by the user; finished files are whole", file=sys.stderr)
        status = 130
    sys.exit(status)


def save_atomically(data: dict[str, Any], path: Path) -> None:
    """`torch.save` that leaves the whole new file or the old state: written beside `path`, then renamed onto it.

    Raises `OSError` when the disk is full or the folder cannot be written; the half-written file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.stem[:50]}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the bytes do
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
