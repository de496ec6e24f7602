"""Products with matrices inside a forward that is not ours: experts that write their own.

[Note: products by storage] Mixtures without transformers' experts interface multiply as they like: one `bmm` over all
experts (Llama 4), `F.linear(x[e], weight[e])` in a loop (JetMoE), views of one flat matrix that another module takes
(DBRX). What a slice needs is the same for all of them, x and dY of each product. So while such a forward runs, a torch
function mode sees every call, and knows the weight by its storage. A view has the weight's storage too, and its offset
and strides say which matrix it is, and whether turned. Three cases:

* a product of a kind that is known, with one or all of the matrices: it is made as it is, and tapped;
* a call that gives a view, or no tensor at all: it passes;
* anything else would use the weight behind the slice's back: `NotUnderstood`.

The gradient is exact because there is no third use: the loss depends on the weight through tapped products alone. A
trial on a few made-up tokens (`layouts`) tells before the conversion whether a forward is understood. A compiled graph
breaks here, as it does at the loops and the counts of tokens of most of these forwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.overrides import TorchFunctionMode

from .sharding import gathered, shape_of

# Of y = x N: the positions of x and of N among the arguments.
_RIGHT: dict[Callable, tuple[int, int]] = {
    torch.matmul: (0, 1),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),
    torch.mm: (0, 1),
    Tensor.mm: (0, 1),
    torch.bmm: (0, 1),
    Tensor.bmm: (0, 1),
    torch.baddbmm: (1, 2),
    Tensor.baddbmm: (1, 2),
    torch.addmm: (1, 2),
    Tensor.addmm: (1, 2),
}


class NotUnderstood(RuntimeError):
    """A forward uses a weight otherwise than in a product that can be tapped."""


@dataclass(frozen=True)
class Layout:
    """How a forward uses a parameter.

    Attributes:
        matrices: how many there are in it, one after the other.
        rows: of each, as it is stored.
        transposed: they are stored (input, output).
    """

    matrices: int
    rows: int
    transposed: bool


@dataclass(frozen=True)
class Matrix:
    """What a tensor with a weight's storage is: matrix number `first`, or all of them; perhaps turned."""

    layout: Layout
    first: int
    whole: bool


class Products(TorchFunctionMode):
    """While it is on, every known product with one of `weights` goes through `found(name, y, x, matrix)`.

    Args:
        weights: by name; dense in memory, (E, m, n) or (E m, n).
        found: gives what stands for y.

    Raises:
        NotUnderstood: within, at any other use of a weight than a view of it.
    """

    def __init__(self, weights: dict[str, Tensor], found: Callable[[str, Tensor, Tensor, Matrix], Tensor]):
        super().__init__()
        self.weights = {weight.untyped_storage()._cdata: (name, weight) for name, weight in weights.items()}
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        used = [arg for arg in _leaves((args, kwargs)) if self._known(arg)]
        if not used:
            return func(*args, **kwargs)
        product = _product(func, args, kwargs)
        if product is not None and len(used) == 1 and product[1] is used[0]:
            x, view, linear = product
            name, weight = self.weights[view.untyped_storage()._cdata]
            matrix = _matrix(weight, view, linear)
            if matrix is not None and (not matrix.whole or (x.dim() == 3 and x.shape[0] == view.shape[0])):
                return self.found(name, func(*args, **kwargs), x, matrix)
        else:
            out = func(*args, **kwargs)
            if all(self._known(t) for t in _leaves(out)):  # views of it, or no tensors
                return out
        name = self.weights[used[0].untyped_storage()._cdata][0]
        raise NotUnderstood(f"{getattr(func, '__name__', func)} with {name}, of shape {tuple(used[0].shape)} here")

    def _known(self, tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self.weights


def layouts(module: nn.Module) -> dict[str, Layout]:
    """The layout of every parameter of a module whose forward uses it in nothing but products, as a trial shows.

    Only parameters of several matrices are looked for: (E, m, n), or (E m, n) that is used as E matrices.
    """
    cls = plain_class(module)
    if not _may_hold_matrices(module, cls):
        return {}
    # what fake tensors tell, or tensors without values, says nothing about real ones
    shapes = [(name, tuple(shape_of(p)), p.is_meta, type(p)) for name, p in module._parameters.items() if p is not None]
    key = (cls, *shapes)
    if key not in _KNOWN:
        with gathered(module.parameters()):
            _KNOWN[key] = _try(module, cls)
    return _KNOWN[key]


_KNOWN: dict[tuple, dict[str, Layout]] = {}


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was converted."""
    return next(cls for cls in type(module).__mro__ if cls.__module__.partition(".")[0] != "grass_hf")


def _may_hold_matrices(module: nn.Module, cls: type[nn.Module]) -> bool:
    if cls.__module__.startswith("torch.") or getattr(module, "_is_expert_parallel", False):
        return False
    return bool(_candidates(module, cls))


def _candidates(module: nn.Module, cls: type[nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters that may be several matrices each: all that are 3-D, or flat ones of as many rows as fit."""
    params = {name: p for name, p in module._parameters.items() if p is not None and p.is_floating_point()}
    several = {name: p for name, p in params.items() if len(shape_of(p)) == 3 and min(shape_of(p)) > 1}
    if several:
        return several
    numbers = vars(module).items()
    if isinstance(module, nn.Linear):
        counts = [value for _, value in numbers if type(value) is int] if cls.forward is not nn.Linear.forward else []
    else:
        counts = [value for name, value in numbers if "experts" in name and type(value) is int]
    flat = {name: p for name, p in params.items() if len(shape_of(p)) == 2}
    fits = {n: p for n, p in flat.items() if any(1 < c < shape_of(p)[0] and shape_of(p)[0] % c == 0 for c in counts)}
    return fits if len(fits) == len(flat) else {}


def _try(module: nn.Module, cls: type[nn.Module]) -> dict[str, Layout]:
    """What a trial of the plain forward finds, {} if no made-up input suits it or one of its uses is not understood."""
    weights: dict[str, Tensor] = {**_candidates(module, cls)}
    if not all(w.is_contiguous() for w in weights.values()):
        return {}
    devices = {w.device for w in weights.values() if w.is_cuda}
    for inputs in _guesses(module, cls, weights):
        seen: dict[str, set[Layout]] = {}

        def note(name: str, y: Tensor, x: Tensor, matrix: Matrix) -> Tensor:
            seen.setdefault(name, set()).add(matrix.layout)  # noqa: B023
            return y

        try:
            with torch.no_grad(), torch.random.fork_rng(devices), Products(weights, note):
                cls.forward(module, *inputs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise  # the estimator's fake tensors have no values: that says nothing about the module
        except NotUnderstood:
            return {}
        except Exception:  # it wants other inputs
            continue
        found = {name: next(iter(kinds)) for name, kinds in seen.items() if len(kinds) == 1}
        found = {name: layout for name, layout in found.items() if layout.matrices > 1}
        if found:
            return found
    return {}


def _guesses(module: nn.Module, cls: type[nn.Module], weights: dict[str, Tensor]) -> Iterator[list[Any]]:
    """Inputs that a forward may want, made up from its signature and the shapes of its weights."""
    arguments = list(inspect.signature(cls.forward).parameters.values())[1:]
    wanted = [p.name for p in arguments if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    numbers = sorted({v for v in vars(module).values() if type(v) is int and v > 1})
    first = next(iter(weights.values()))
    counts = [first.shape[0]] if first.dim() == 3 else [n for n in numbers if first.shape[0] % n == 0]
    for count in counts:
        for width in dict.fromkeys((first.shape[-1], first.shape[-2] if first.dim() == 3 else first.shape[-1])):
            x = torch.linspace(-1.0, 1.0, 2 * count * width, device=first.device).to(first.dtype).view(2 * count, width)
            if len(wanted) == 1:
                yield [x]
                yield [x.view(2, count, width)]
            elif len(wanted) == 2:
                yield [x, [2] * count]
                yield [x, torch.ones_like(x[:, :1]).expand(-1, count)]
                yield [x.view(1, 2, count * width), torch.zeros(1, 2, dtype=torch.int64, device=first.device)]
            elif len(wanted) == 3:
                tokens = torch.arange(2 * count, device=first.device)
                index = torch.stack([tokens, tokens + 1], dim=1) % count
                yield [x, index, torch.ones_like(index, dtype=first.dtype)]
            views = [_matrix_for(name, weights, count) for name in wanted[1:]]
            if views and all(view is not None for view in views):
                yield [x, *views]


def _matrix_for(argument: str, weights: dict[str, Tensor], count: int) -> Tensor | None:
    """The first matrix of the weight that an argument is named after (DBRX: ``expert_w1`` after ``w1``)."""
    for name, weight in weights.items():
        if argument.endswith(name):
            return weight.view(count, -1, weight.shape[-1])[0]
    return None


def _product(func: Callable, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor, bool] | None:
    """x, the matrix and whether it is stored (output, input), of a call that is a product with a matrix."""
    if func is F.linear:
        values = [*args, *(kwargs[name] for name in ("input", "weight")[len(args) :] if name in kwargs)]
        return (values[0], values[1], True) if len(values) > 1 else None
    if func in _RIGHT and not set(kwargs) - {"beta", "alpha"}:
        x, matrix = _RIGHT[func]
        if kwargs.get("alpha", 1) == 1 and len(args) > matrix and all(isinstance(args[i], Tensor) for i in (x, matrix)):
            return args[x], args[matrix], False
    return None


def _matrix(weight: Tensor, view: Tensor, linear: bool) -> Matrix | None:
    """Which matrix of a weight a view of it is; None if it is only a part, or another arrangement."""
    columns = weight.shape[-1]
    if view.dim() not in (2, 3) or 1 in view.shape:
        return None
    turned = view.stride()[-2:] == (1, columns)
    if not turned and view.stride()[-2:] != (columns, 1):
        return None
    rows, width = view.shape[-2:][::-1] if turned else view.shape[-2:]
    if width != columns or (weight.dim() == 3 and rows != weight.shape[1]):
        return None
    size, offset = rows * columns, view.storage_offset() - weight.storage_offset()
    if weight.numel() % size or offset % size:
        return None
    whole = view.dim() == 3
    if whole and (offset or view.numel() != weight.numel() or view.stride(0) != size):
        return None
    # y = x N: N has inputs as its rows, F.linear's matrix has outputs
    layout = Layout(weight.numel() // size, rows, transposed=linear == turned)
    return Matrix(layout, offset // size, whole)


def _leaves(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _leaves(value)
    elif isinstance(values, dict):
        yield from _leaves(tuple(values.values()))
