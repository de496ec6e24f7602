"""Which errors are sentences of ours, and which are other people's and keep their traceback."""

from __future__ import annotations

import dis
from types import TracebackType

_PACKAGE = __package__.partition(".")[0]


def is_ours(error: BaseException) -> bool:
    """Whether a line of this package has raised the error, with ``raise``.

    One that comes from a function that our line calls, of another package or of Python itself (``int("x")``), is not
    ours: its words were not written for the user of this package.
    """
    where = error.__traceback__
    if where is None:
        return False
    while where.tb_next is not None:
        where = where.tb_next
    name = where.tb_frame.f_globals.get("__name__") or ""
    return name.partition(".")[0] == _PACKAGE and _raises(where)


def _raises(where: TracebackType) -> bool:
    code = where.tb_frame.f_code.co_code
    return dis.opname[code[where.tb_lasti]] == "RAISE_VARARGS"
