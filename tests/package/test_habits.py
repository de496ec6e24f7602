"""What CONTRIBUTING, SECURITY, CHANGELOG, CITATION.cff, the hooks and the Makefile say is so."""

import ast
import configparser
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z0-9-]+):.*## ", MAKEFILE, flags=re.M)
PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def version() -> str:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return setup["metadata"]["version"]


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_names_exists(name):
    text = page(name)
    for path in re.findall(
        r"`((?:grass_hf|tests|scripts|configs|recipes|studies|findings|docs|examples)/[a-z_./\d]*)`", text
    ):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\bmake ([a-z0-9-]+)", " ".join(re.findall(r"`([^`\n]+)`", text))):
        assert target in TARGETS, target
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / link).exists(), link


def test_the_map_of_the_house_has_every_room_in_order():
    rooms = re.findall(r"^\| `(\w+)` \|.*\| (`.*`) \|$", page("CONTRIBUTING.md"), flags=re.M)
    from test_layers import ROOMS

    assert [room for room, _ in rooms] == ROOMS
    for room, begin in rooms:
        for file in re.findall(r"`([\w/]+\.py)`", begin):
            assert (ROOT / "grass_hf" / room / file).exists(), file
    for file in re.findall(
        r"`((?:config|slices|convert|optim|integrations|measure)/[\w/.]+)`", page("CONTRIBUTING.md")
    ):
        assert (ROOT / "grass_hf" / file).exists(), file


def make(*words: str) -> subprocess.CompletedProcess:
    """As from a shell: without the variables of the `make test` that runs this."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "MFLAGS"}
    return subprocess.run(["make", *words], cwd=ROOT, env=env, capture_output=True, text=True)


def test_help_lists_the_commands_in_the_order_of_a_contributors_day():
    assert re.findall(r"^  make (\S+) ", make("help").stdout, flags=re.M) == TARGETS
    assert TARGETS[:4] == ["help", "venv", "test", "quality"]
    assert TARGETS.index("dist") < TARGETS.index("release-check") < TARGETS.index("clean")


def test_the_release_check_stops_at_the_first_failure():
    assert "RELEASE := test-wheel docs test-oldest test-newest\n" in MAKEFILE
    done = make("release-check", "RELEASE=help no-such-target help")
    assert done.returncode and "==== passed" not in done.stdout
    assert re.findall(r"^==== make (\S+)$", done.stdout, flags=re.M) == ["help", "no-such-target"]
    assert make("release-check", "RELEASE=help").stdout.endswith("==== passed: help\n")


def test_hooks_are_the_quality_gate_and_fetch_nothing():
    (local,) = yaml.safe_load(page(".pre-commit-config.yaml"))["repos"]
    assert local["repo"] == "local" and {hook["language"] for hook in local["hooks"]} == {"system"}
    block = re.search(r"^quality:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.M)[1]
    gate = [line.strip().replace("$(BIN)", ".venv/bin") for line in block.splitlines()]
    assert [hook["entry"] for hook in local["hooks"]] == gate


def test_the_citation_is_of_this_version_and_of_the_paper():
    cited = yaml.safe_load(page("CITATION.cff"))
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert cited["version"] == version() and cited["license"] == "Apache-2.0"
    assert cited["authors"] == [{"name": "grass-hf contributors"}]
    (paper,) = cited["references"]
    assert paper["url"] == "https://arxiv.org/abs/2406.17660" == cited["preferred-citation"]["url"]
    assert {**paper, **cited["preferred-citation"]} == cited["preferred-citation"]


def test_the_changelog_begins_with_what_is_not_released():
    versions = re.findall(r"^## \[(.+?)\]", page("CHANGELOG.md"), flags=re.M)
    assert versions[0] == "Unreleased" and len(versions) == len(set(versions))
    kinds = re.findall(r"^### (\w+)$", page("CHANGELOG.md"), flags=re.M)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_supported_versions_are_those_of_the_metadata():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    classifiers = re.findall(r"Python :: (3\.\d+)$", setup["metadata"]["classifiers"], flags=re.M)
    policy = page("CONTRIBUTING.md").partition("## Versions and support")[2]
    assert f"| Python | {classifiers[0]} to {classifiers[-1]} |" in policy
    required = dict(re.findall(r"^(torch|transformers)>=(\S+)$", setup["options"]["install_requires"], flags=re.M))
    assert f"| torch | {required['torch']} and newer |" in policy
    assert f"| transformers | {required['transformers']}, and every 5.x |" in policy
    assert f'target-version = "py{classifiers[0].replace(".", "")}"' in page("pyproject.toml")


# DeepSpeed's model states hold objects of DeepSpeed's; SECURITY.md says so.
PICKLED = {"grass_hf/integrations/zero_checkpoint.py"}


def calls() -> list[tuple[str, ast.Call]]:
    """Every call in the package, with its file."""
    found = []
    for path in sorted((ROOT / "grass_hf").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.relative_to(ROOT).as_posix()
        found += [(name, node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return found


def test_files_are_read_as_security_says():
    unsafe = set()
    for file, call in calls():
        function, words = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
        if function == "torch.load" and words.get("weights_only") != "True":
            unsafe.add(file)
        # no pickle is read, and YAML only by a safe loader
        assert function not in {"pickle.load", "pickle.loads", "yaml.unsafe_load", "yaml.full_load", "eval"}, file
        if function == "yaml.load":
            assert ast.unparse(call.args[1]) == "_Loader" and file == "grass_hf/recipes/parse.py"
    assert unsafe == PICKLED
    assert "class _Loader(yaml.SafeLoader)" in page("grass_hf/recipes/parse.py")
    assert "weights_only=False" in page("SECURITY.md")


def test_the_sdist_has_the_pages():
    listed = page("MANIFEST.in").split()
    assert {*PAGES, "CITATION.cff", ".pre-commit-config.yaml"} <= set(listed)
