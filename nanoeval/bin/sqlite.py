"""Opens a run set's database in litecli, else in sqlite3.

    python -m nanoeval.bin.sqlite run_set_id=ID

  run_set_id  which run set; `python -m nanoeval.bin.ls` lists them

Reading never holds up a run; an open transaction that writes does. The view `try` shows every try
of every task with its error; docs/architecture.md describes the tables.
"""

from __future__ import annotations

import os
import shutil
import sys

from nanoeval._inspect import find_run_set
from nanoeval.bin._command import CommandError, run_command
from nanoeval.fs_paths import check_private

SHELLS = ("litecli", "sqlite3")


def main(run_set_id: str) -> None:
    """Become an SQLite shell on a run set's database."""
    path = find_run_set(run_set_id).path
    check_private(path)
    shell = next(filter(None, map(shutil.which, SHELLS)), None)
    if shell is None:
        raise CommandError(
            "neither litecli nor sqlite3 is installed; `pip install litecli` brings the first."
            f" The database is {path}"
        )
    print(f"{path} in {os.path.basename(shell)}", file=sys.stderr, flush=True)
    os.execv(shell, [shell, str(path)])


if __name__ == "__main__":
    run_command(main, __doc__)
