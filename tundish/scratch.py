"""A place for what is measured where no build has one of its own, in the folder for temporary files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tundish.disk import disk_errors
from tundish.publish import reclaim, staging

_MEND = "Free space there, or set TMPDIR to a folder on another disk."


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is gone at the end; what killed processes left of theirs is removed first.

    An OSError in the body is told as one of the folder for temporary files.
    """
    errors = partial(disk_errors, mend=_MEND)
    with errors(Path("the folder for temporary files")):
        place = Path(tempfile.gettempdir()) / "tundish"
        reclaim(place, lambda text: None)  # which says much of other users' folders and of living processes'
        with staging(place, errors) as folder:
            folder.chmod(0o700)  # nobody else's to read, as little as a private model is
            yield folder
