"""Try every model of the matrix (tests/model_matrix.py) and write what was found to docs/support.md."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import transformers
from rich.progress import track

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import model_matrix as matrix  # noqa: E402

PAGE = ROOT / "docs" / "support.md"
HEAD = """# Supported models

Written by `make support-table`, which builds every model tiny, compresses all of its matrices
(`target_modules="all-matrices"`) and tries it:

* **trains**: the loss falls over three steps at a quarter of the rows;
* **= AdamW**: at rank = m, through the compressed path, three steps end within 1e-10 of AdamW's weights in float64;
* **plain**: the checkpoint loads in a process where importing grass_hf fails, with the same logits (to 1e-5 for
  mixtures, whose experts are multiplied in another order there).

`make test` tries the types in bold print, `make test-slow` the others. Any model whose weights sit in `nn.Linear`,
`Conv1D`, `nn.Embedding` or transformers' 3-D experts should work the same way; the start table of a run names
everything that is trained in full, with the reason. The language tower of a vision-language model (LLaVA) is tried in
`tests/test_models.py`.

Tried with transformers {transformers}, torch {torch}.

| model type | compressed weights of the tiny model | tied head | trains | = AdamW | plain | in full beside vectors |
|---|---|---|---|---|---|---|
"""
TAIL = """
## Not compressed, and why

* **Parameters that no product of a known kind uses**: routers' scores, convolutions of state-space mixers, the
  experts of Llama 4, DBRX and JetMoE, which have forwards of their own and no experts interface, XLNet's attention.
  They train in full.
* **Weights that the model reads without calling their module** get no gradient through a tap: Mamba's `dt_proj`
  (with fused kernels `x_proj` and `out_proj` too), and the output head under a fused loss. Training stops at the first
  step with a sentence that says which, and `exclude_modules` trains them in full.
* **Subclasses that compute something else** than the product with their weight, and embeddings with `max_norm`,
  `scale_grad_by_freq` or `sparse`: trained in full, named in the start table.
* **Experts under transformers 4.57** that are 3-D parameters (gpt-oss, Llama 4) have no experts interface there;
  mixtures made of `nn.Linear` (Mixtral, Qwen3-MoE) are compressed expert by expert.
* **Quantised weights** stay as they are.
"""


def row(result: matrix.Result, plain: bool) -> str:
    """One line of the table."""
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(result.kinds.items()))
    name = f"**{result.model_type}**" if result.model_type in {**matrix.CAUSAL, **matrix.OTHERS} else result.model_type
    excluded = matrix.EXCLUDED.get(result.model_type)
    falls = result.losses[2] < result.losses[1] < result.losses[0]
    in_full = sorted(parameter.removesuffix(".weight").rpartition("*.")[2] for parameter in result.in_full)
    cells = [
        name + (f" (without `{'`, `'.join(excluded)}`)" if excluded else ""),
        counts,
        _mark(result.tied, "–"),
        _mark(falls),
        _mark(result.apart < 1e-10 < result.moved),
        _mark(plain),
        ", ".join(f"`{parameter}`" for parameter in in_full) or "–",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Write the page; the exit code is 1 if something that should hold does not."""
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in track(sorted(matrix.ALL), description="models"):
            results[name], model = matrix.check(name)
            matrix.save(model, Path(folder) / name)
        reloaded = matrix.reload(Path(folder), list(results))
    plain = set(reloaded.stdout.split())
    if reloaded.returncode:
        print(reloaded.stderr[-2000:], file=sys.stderr)
    lines = [row(result, name in plain) for name, result in results.items()]
    head = HEAD.format(transformers=transformers.__version__, torch=torch.__version__.partition("+")[0])
    PAGE.write_text(head + "\n".join(lines) + "\n" + TAIL, encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(lines)} model types")
    return 1 if "**no**" in "".join(lines) else 0


def _mark(holds: bool, otherwise: str = "**no**") -> str:
    return "yes" if holds else otherwise


if __name__ == "__main__":
    sys.exit(main())
