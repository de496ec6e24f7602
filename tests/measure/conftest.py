"""What tests of the commands share."""

import pytest

from grass_hf.cli import main


@pytest.fixture
def command(monkeypatch, capsys):
    """`grass-hf ...` in this process: exit code, what it printed, its error."""

    def run(*words):
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr("sys.argv", ["grass-hf", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    return run
