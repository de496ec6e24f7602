"""The page that an example run leaves behind: loss curves (PNG), and one report as Markdown and as HTML."""

import base64
import html
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot as plt

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a }
body { max-width: 52rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; margin-bottom: 1rem }
td { border-top: 1px solid #ddd; padding: .3rem .6rem; vertical-align: top; overflow-wrap: anywhere }
td:first-child { color: #555; width: 40% }
img { max-width: 100% }
blockquote { border-left: 3px solid #888; margin: 1rem 0; padding: .2rem 1rem; font-style: italic }
"""


@dataclass
class Run:
    """What a report says. The three dicts become tables, in the order given; None values are left out."""

    title: str
    results: dict[str, object]
    settings: dict[str, object]
    versions: dict[str, str]
    sentence: str

    def tables(self) -> dict[str, dict[str, object]]:
        """Heading -> rows."""
        return {"Results": self.results, "Settings": self.settings, "Versions": self.versions}

    def as_json(self) -> dict:
        """The report as plain JSON types."""
        return asdict(self)


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of `packages` ("not installed" where one is missing), Python's and the machine's."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "python": platform.python_version(), "machine": platform.platform()}


def plot_curves(history: list[dict], untrained: float, path: Path, title: str) -> Path:
    """Draw training and held-out loss over the steps.

    Numbers that a plugin logs under a name of its own ("plugin/quantity") get a second panel.

    Args:
        history: `TrainerState.log_history`.
        untrained: held-out loss before the first step (nats), drawn at step 0.
        path: where the PNG goes.
    """

    def series(key: str) -> tuple[list[int], list[float]]:
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        return [step for step, _ in points], [value for _, value in points]

    numeric = {key for entry in history for key, value in entry.items() if isinstance(value, int | float)}
    extra = sorted(key for key in numeric if "/" in key)
    figure, panels = plt.subplots(
        1 + bool(extra),
        1,
        figsize=(8, 4 + 2.5 * bool(extra)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    loss = panels[0, 0]
    loss.plot(*series("loss"), color="#8aa4c8", linewidth=1.2, label="training")
    steps, values = series("eval_loss")
    loss.plot([0, *steps], [untrained, *values], color="#c2410c", marker="o", markersize=4, label="held-out")
    loss.set(ylabel="loss (nats per token)", title=title)
    for panel, key in ((panels[-1, 0], key) for key in extra):
        panel.plot(*series(key), linewidth=1.2, label=key)
    for panel in panels[:, 0]:
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("optimizer step")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def write_reports(run: Run, figure: Path, folder: Path) -> None:
    """Write `report.md` (links the figure) and `report.html` (holds it, so the one file can be sent on)."""
    (folder / "report.md").write_text(render_markdown(run, figure), encoding="utf-8")
    (folder / "report.html").write_text(render_html(run, figure), encoding="utf-8")


def cell(value: object) -> str:
    """A number in a form to read, anything else as it is."""
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def render_markdown(run: Run, figure: Path) -> str:
    """The report as Markdown, the figure linked by its file name."""
    lines = [f"# {run.title}", "", f"![loss curves]({figure.name})", "", f"> {run.sentence}", ""]
    for heading, rows in run.tables().items():
        lines += [f"## {heading}", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {cell(value)} |".replace("\n", " ") for key, value in rows.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def render_html(run: Run, figure: Path) -> str:
    """The report as one HTML file, with the figure inside."""
    picture = base64.b64encode(figure.read_bytes()).decode()
    body = [
        f"<h1>{html.escape(run.title)}</h1>",
        f'<img alt="loss curves" src="data:image/png;base64,{picture}">',
        f"<blockquote>{html.escape(run.sentence)}</blockquote>",
    ]
    for heading, rows in run.tables().items():
        body += [f"<h2>{heading}</h2>", "<table>"]
        body += [
            f"<tr><td>{html.escape(key)}</td><td>{html.escape(cell(value))}</td></tr>"
            for key, value in rows.items()
            if value is not None
        ]
        body.append("</table>")
    head = f'<meta charset="utf-8"><title>{html.escape(run.title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'
