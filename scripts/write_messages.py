"""Write the lists of messages in docs/troubleshooting.md from the code; `make docs` does it, `make quality` checks it.

Every error that the package raises and every warning that it logs is read off the syntax tree. What a message says of
the user's run stands as an ellipsis: ``f"rank={rank} is not positive"`` is listed as "rank=… is not positive". Text
that a message takes from a function, a constant or a loop over a constant of the same package is followed, so that
"update_interval=0 is not a positive number of steps" can be found by its words.

On the page a list stands between the comments ``<!-- messages: THEME -->`` and ``<!-- end -->``. The rest of the
page is written by hand; its headings in backticks quote messages, and `wrong_quotes` finds those that no message has
any more.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "grass_hf"
PAGE = ROOT / "docs" / "troubleshooting.md"

GAP = "…"
# How many sentences one line of code may stand for.
_MOST = 40
_LISTS = re.compile(r"(<!-- messages: (\w+) -->\n).*?(<!-- end -->)", re.S)

# The theme of a module is that of the longest of these beginnings; a room's own stands for what is new in it.
THEMES = {
    "settings": ("config",),
    "conversion": ("convert", "slices/checks.py", "slices/ops/int8.py", "optim/factory.py"),
    "training": ("slices", "optim", "integrations/first_loss.py"),
    "resume": (
        "optim/base_record.py",
        "optim/parameter_groups.py",
        "optim/resume.py",
        "optim/state_remap.py",
        "integrations/checkpoints.py",
        "integrations/other_engine.py",
        "integrations/zero_checkpoint.py",
    ),
    "engines": ("integrations", "slices/ops/sharding.py", "_import_hook.py", "__init__.py"),
    "recipes": ("recipes",),
    "estimate": ("measure/estimate", "cli/estimate.py", "cli/traffic.py", "integrations/model_configs.py"),
    "export": ("integrations/adapters", "cli/adapters.py", "integrations/saving.py"),
    "rollouts": ("integrations/rollouts", "optim/delta_", "optim/weight_delta.py"),
    "benchmarks": (
        "measure/bench",
        "recipes/study",
        "recipes/two_rates.py",
        "cli/bench",
        "cli/comm.py",
        "cli/net",
        "cli/quality.py",
        "cli/rollout.py",
    ),
    "commands": ("cli", "__main__.py"),
}
# About a row of the user's data; the sentence around it names file and row.
_ROWS = "BadRow"
# They never reach a user: Python's own protocol, and what a caller in the package answers.
_INNER = {"AttributeError", "LookupError", "KeyError", "Script", "ArgumentTypeError", "NotUnderstood"}
_WARNINGS = {"warning", "warning_once", "warn"}

Names = dict[str, ast.expr]


@dataclass(frozen=True)
class Message:
    """One message of the package.

    Attributes:
        text: its fixed part, with an ellipsis for each value.
        kind: the class of the error, or "warning".
        where: the module, from the package's folder on.
        line: where it is raised.
    """

    text: str
    kind: str
    where: str
    line: int

    @property
    def theme(self) -> str:
        """The list that it stands in."""
        if self.kind == _ROWS:
            return "rows"
        fitting = [(len(start), theme) for theme, starts in THEMES.items() for start in starts if _under(self, start)]
        return max(fitting)[1]

    @property
    def has_words(self) -> bool:
        """False where it only puts a name before a sentence that stands elsewhere."""
        return _has_words(self.text)


def _under(message: Message, start: str) -> bool:
    return message.where.startswith(start)


class Package:
    """The functions and the constants of all modules, by which the text of a message is followed."""

    def __init__(self, folder: Path):
        self.folder = folder
        paths = sorted(folder.rglob("*.py"))
        self.modules = [Module(path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")) for path in paths]

    def messages(self) -> list[Message]:
        """All of them, each text once a theme, as they stand in the files."""
        found: dict[tuple[str, str], Message] = {}
        for module in self.modules:
            for node, scope, loops in module.spoken():
                for names in _rows_of(loops, module.constants):
                    for text in Reader(self, module, scope, names).texts(_words(node)):
                        message = Message(_tidy(text), _kind(node), module.name, node.lineno)
                        if message.has_words:
                            found.setdefault((message.theme, message.text), message)
        return list(found.values())


class Module:
    """One file of the package: its name from the package's folder on, and what its text holds."""

    def __init__(self, name: str, text: str):
        self.name, self.tree = name, ast.parse(text)
        self.constants: dict[str, ast.expr] = {}
        for node in self.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Name) and isinstance(value := getattr(node, "value", None), ast.expr):
                    self.constants[target.id] = value
        functions = (node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef))
        self.functions = {node.name: node for node in functions}

    def spoken(self) -> Iterator[tuple[ast.Call, ast.AST, tuple[ast.For, ...]]]:
        """Every error that is made and every warning, with its function and the loops that it stands in."""
        yield from self._spoken(self.tree, self.tree, ())

    def _spoken(self, node: ast.AST, scope: ast.AST, loops: tuple[ast.For, ...]) -> Iterator:
        if isinstance(node, ast.FunctionDef):
            scope, loops = node, ()
        elif isinstance(node, ast.For):
            loops = (*loops, node)
        elif isinstance(node, ast.Call) and node.args and (_is_error(node.func) or _is_warning(node.func)):
            yield node, scope, loops
        for child in ast.iter_child_nodes(node):
            yield from self._spoken(child, scope, loops)


class Reader:
    """The texts that an expression may have in one function of one module.

    Args:
        names: what names of the function stand for, as far as it is known before the run.
        depth: how many functions of the package have called this one.
    """

    def __init__(self, package: Package, module: Module, scope: ast.AST, names: Names, depth: int = 0):
        self.package, self.module, self.scope, self.names, self.depth = package, module, scope, names, depth

    def texts(self, node: ast.AST) -> list[str]:
        """Of an expression; an ellipsis where it is not known before the run."""
        if isinstance(node, ast.Constant):
            return [node.value if isinstance(node.value, str) else GAP]
        if isinstance(node, ast.JoinedStr):
            return self._joined(node.values)
        if isinstance(node, ast.FormattedValue):
            return self.texts(node.value) if node.conversion == -1 and node.format_spec is None else [GAP]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._joined([node.left, node.right])
        if isinstance(node, ast.IfExp):
            return [*self.texts(node.body), *self.texts(node.orelse)]
        if isinstance(node, ast.Name):
            return self._named(node.id)
        if isinstance(node, ast.Call):
            return self._called(node)
        return [GAP]

    def _joined(self, parts: list[ast.expr]) -> list[str]:
        combined = itertools.product(*(self.texts(part) for part in parts))
        return ["".join(texts) for texts in itertools.islice(combined, _MOST)]

    def _named(self, name: str) -> list[str]:
        if name in self.names:
            values = [self.names[name]]
        elif name in self.module.constants:
            values = [self.module.constants[name]]
        else:
            values = list(_assigned(self.scope, name))
        return [text for value in values if _is_text(value) for text in self.texts(value)] or [GAP]

    def _called(self, call: ast.Call) -> list[str]:
        """What a function of the package returns, where most of it are sentences or parts of one."""
        name = _last(call.func)
        if name == "format" and isinstance(call.func, ast.Attribute):
            return self.texts(call.func.value)
        of_text = isinstance(call.func, ast.Attribute) and not (isinstance(call.func.value, ast.Name))
        here = [self.module] if name in self.module.functions else self.package.modules
        found = []
        for module in () if of_text or self.depth > 2 else here:
            if (function := module.functions.get(name)) is not None:
                reader = Reader(self.package, module, function, self._arguments(function, call), self.depth + 1)
                found += [text for made in _returned(function) for text in reader.texts(made)]
        sentences = [text for text in found if _has_words(text)]
        return sentences if 2 * len(sentences) > len(found) else [GAP]

    def _arguments(self, function: ast.FunctionDef, call: ast.Call) -> Names:
        """The text that is passed to a function as it stands in the call, or in a name of the caller's."""
        given = [*zip((argument.arg for argument in function.args.args), call.args, strict=False)]
        given += [(keyword.arg or "", keyword.value) for keyword in call.keywords]
        found: Names = {}
        for name, value in given:
            held = self.names.get(value.id) if isinstance(value, ast.Name) else value
            if held is None and isinstance(value, ast.Name):
                held = next(_assigned(self.scope, value.id), None)
            if isinstance(held, ast.Constant) and isinstance(held.value, str):
                found[name] = held
        return found


def _rows_of(loops: tuple[ast.For, ...], constants: Mapping[str, ast.expr]) -> list[Names]:
    """What the names stand for that run over a constant of the module, of each combination of the loops' turns."""
    combined: list[Names] = [{}]
    for loop in loops:
        rows = list(_turns(loop, constants))
        combined = [names | row for names in combined for row in rows] if rows else combined
    return combined


def _turns(loop: ast.For, constants: Mapping[str, ast.expr]) -> Iterator[Names]:
    over, pairs = loop.iter, False
    if isinstance(over, ast.Call) and isinstance(over.func, ast.Attribute) and over.func.attr == "items":
        over, pairs = over.func.value, True
    value = constants.get(over.id) if isinstance(over, ast.Name) else over
    if isinstance(value, ast.Dict):
        keys = [key for key in value.keys if key is not None]
        rows = zip(keys, value.values, strict=False)
        elements = [ast.Tuple([key, held]) for key, held in rows] if pairs else keys
    else:
        elements = list(getattr(value, "elts", ()))
    yield from (_bound(loop.target, element) for element in elements)


def _bound(target: ast.AST, value: ast.expr) -> Names:
    """Names of a loop's target, and what they stand for."""
    if isinstance(target, ast.Name):
        return {target.id: value}
    names: Names = {}
    for element, part in zip(getattr(target, "elts", ()), getattr(value, "elts", ()), strict=False):
        names |= _bound(element, part)
    return names


def _words(call: ast.Call) -> ast.expr:
    """The expression that makes the text of an error or of a warning."""
    if _last(call.func) == "ConstructorError":  # PyYAML's: its third argument is the problem
        return call.args[2]
    first = call.args[0]
    if len(call.args) > 1 and (_last(call.func) == "OSError" or getattr(first, "value", "") == "%s"):
        return call.args[1]
    return first


def _kind(call: ast.Call) -> str:
    return "warning" if _is_warning(call.func) else _last(call.func)


def _is_error(function: ast.expr) -> bool:
    name = _last(function)
    return (name.endswith("Error") or name == _ROWS) and name not in _INNER


def _is_warning(function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and function.attr in _WARNINGS


def _is_text(node: ast.AST) -> bool:
    """Whether it may be text that is known before the run."""
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    return isinstance(node, ast.JoinedStr | ast.Call)


def _returned(function: ast.FunctionDef) -> list[ast.expr]:
    found = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    return [value for value in found if value is not None and getattr(value, "value", "") is not None]


def _assigned(scope: ast.AST, name: str) -> Iterator[ast.expr]:
    for node in ast.walk(scope):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
        if named and isinstance(node, ast.Assign | ast.NamedExpr):
            yield node.value


def _has_words(text: str) -> bool:
    return len(re.findall(r"[a-z]{2,}", text)) > 1


def _last(node: ast.expr) -> str:
    return getattr(node, "attr", None) or getattr(node, "id", "")


def _tidy(text: str) -> str:
    """On one line, with one ellipsis for values that stand side by side."""
    text = re.sub(r"%[sd]|\{\}", GAP, text)
    return re.sub(rf"{GAP}[\s{GAP}]*{GAP}", GAP, " ".join(text.split()))


def collect(folder: Path = PACKAGE) -> list[Message]:
    """Every message of the package."""
    return Package(folder).messages()


def listing(messages: list[Message], theme: str) -> str:
    """The Markdown of one theme's list."""
    lines = sorted({_bullet(message) for message in messages if message.theme == theme}, key=str.casefold)
    return "\n".join(["", *lines, ""]) + "\n"


def _bullet(message: Message) -> str:
    ticks = "`" * (1 + max(map(len, re.findall("`+", message.text)), default=0))
    space = " " if len(ticks) > 1 else ""
    return f"* {ticks}{space}{message.text}{space}{ticks}" + (" (a warning)" if message.kind == "warning" else "")


def written(page: str, messages: list[Message]) -> str:
    """The page with its lists as the code has them."""
    there = [theme for _, theme, _ in _LISTS.findall(page)]
    lacking = {message.theme for message in messages} - set(there)
    if lacking:
        raise SystemExit(f"{PAGE.name} has no list `<!-- messages: {min(lacking)} -->`: add it")
    return _LISTS.sub(lambda found: found[1] + listing(messages, found[2]) + found[3], page)


def wrong_quotes(page: str, messages: list[Message]) -> list[str]:
    """Headings that quote what no message says."""
    quoted = re.findall(r"^###+ `+ ?(.+?) ?`+$", page, flags=re.M)
    return [quote for quote in quoted if not any(quote in message.text for message in messages)]


def main() -> int:
    """Write the page; with --check only say whether it is as the code has it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the page is out of date")
    check = parser.parse_args().check
    messages, page = collect(), PAGE.read_text(encoding="utf-8")
    new = written(page, messages)
    for quote in (wrong := wrong_quotes(page, messages)):
        print(f"docs/{PAGE.name} explains `{quote}`, which no message says: quote what one says")
    if check and new != page:
        print(f"docs/{PAGE.name} is out of date: python scripts/write_messages.py")
    elif not check:
        PAGE.write_text(new, encoding="utf-8")
    print(f"messages: {len(messages)}")
    return 1 if wrong or (check and new != page) else 0


if __name__ == "__main__":
    sys.exit(main())
