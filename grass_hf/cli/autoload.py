"""``grass-hf autoload``: a start-up line in site-packages, so that scripts need not import grass_hf."""

from __future__ import annotations

import enum
import sysconfig
from pathlib import Path

FILE = "grass_hf_autoload.pth"
# site.py executes lines that start with "import"; the try keeps every Python start alive whatever happens to us.
LINE = 'import sys; exec("try:\\n    import grass_hf\\nexcept Exception:\\n    pass")\n'


class Switch(str, enum.Enum):
    """What to do with the start-up line."""

    ON = "on"
    OFF = "off"
    STATUS = "status"


class AutoloadError(Exception):
    """The start-up line cannot be written or removed."""


def path() -> Path:
    """Where the start-up line of this environment lives."""
    return Path(sysconfig.get_path("purelib")) / FILE


def switch(to: Switch) -> str:
    """Switch the start-up line on or off, or look; returns a sentence for the user.

    Raises:
        AutoloadError: site-packages is not writable.
    """
    file = path()
    try:
        if to is Switch.ON:
            file.write_text(LINE)
        elif to is Switch.OFF:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise AutoloadError(
            f"{file} cannot be changed ({error.strerror}): use an environment of your own (python -m venv), or "
            "`grass-hf run script.py`, which needs none of this."
        ) from error
    if file.exists():
        return f"autoload is on ({file}): python script.py --optim grass works; `grass-hf autoload off` removes it."
    return f"autoload is off ({file} does not exist): use `grass-hf run script.py`, or `grass-hf autoload on`."
