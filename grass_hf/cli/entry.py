"""Where ``grass-hf`` begins, and how it ends after a mistake."""

from __future__ import annotations

import sys

from ..config.quiet import quiet
from . import autoload as autoload_module
from .app import app
from .errors import is_ours


def main() -> None:
    """Entry point of ``grass-hf``: our own sentences about what the user asked for are one line and exit code 2.

    They are the `ValueError`s that this package raises (`errors.is_ours`). Errors of other packages and of the user's
    script, and ours about what happened while training (not finite, ranks that part), keep their traceback.
    """
    from .run import Script, run_script

    quiet()
    try:
        try:
            app(prog_name="grass-hf")
        except Script as asked:
            script, words = asked.script, asked.words
        else:
            return
        run_script(script, words)
    except (autoload_module.AutoloadError, ValueError) as error:
        if not is_ours(error):
            raise
        print(f"grass-hf: {error}", file=sys.stderr)
        sys.exit(2)
