"""Letters are the same for everybody's builds."""

from __future__ import annotations

import locale
from contextlib import suppress


def use_plain_letters() -> None:
    """Have this process's C functions know letters as in no language in particular, for as long as it lives.

    Native libraries compare names of theirs by tolower. Under tr_TR.UTF-8 that leaves I as it is, whose small letter is
    ı there, and OpenVINO then does not know its own BIDIRECTIONAL. Text stays UTF-8.
    """
    for name in ("C.UTF-8", "en_US.UTF-8"):  # glibc and musl have the first, macOS the second
        with suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, name)
            return
