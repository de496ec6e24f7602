"""What must hold of every model that Grass trains, each against the plain model: the oracles of the support matrix.

* gradients: at density 1 the gradient of every slice is the plain weight's, and so is every ordinary parameter's;
  squared norms that are observed are those of its rows (columns);
* trajectory: at density 1 two steps of AdamW end at the plain run's weights;
* movement: at density 1/4 a step moves the rows (columns) of the slices to where the plain step moves them, ordinary
  parameters likewise, and nothing else by a single bit; a second step moves nothing but its own selection;
* files: the checkpoint has the plain one's keys, shapes and dtypes, and loads to the trained weights.

Everything in float64, or in float32 where the model knows no float64.
"""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import matrix_cases
import numpy as np
import tiny_inputs
import torch
from matrix_cases import Case
from matrix_tools import (
    Found,
    NotBuilt,
    contents,
    counted,
    fixed_function,
    mask,
    parameter,
    plain_parameters,
    short,
    tensors,
)
from torch import Tensor, nn

from grass_hf import GrassConfig, convert_to_grass, grass_optimizer, restore_model
from grass_hf.convert.conversion import grass_slices
from grass_hf.convert.modules import kind_of
from grass_hf.convert.patterns import uses
from grass_hf.integrations.start_table import pattern_of, start_report
from grass_hf.slices.ops.rows import take_rows

RATE = 1e-2
# Above this share of a model's matrices no reason is asked for.
ENOUGH = 0.95
# Largest model that is worth its time; the rules of tiny_configs.py missed a width of a larger one.
MOST_PARAMETERS = 5_000_000


def check(case: Case) -> Found:
    """Try one class."""
    found = Found(case.name, case.kind, case.cls, case.model_type)
    start = time.perf_counter()
    try:
        trial = Trial(case)
    except NotBuilt as reason:
        found.why = str(reason)
        return found
    found.dtype, found.inputs, found.idle = str(trial.dtype).removeprefix("torch."), trial.label, trial.idle
    for oracle in (trial.check_gradients, trial.check_trajectory, trial.check_movement_and_files):
        try:
            found.wrong += oracle(found)
        except NotBuilt as reason:
            found.why = str(reason)
            return found
        except Exception as error:
            found.wrong.append(f"{oracle.__name__}: {type(error).__name__}: {str(error)[:300]}")
    found.status = "wrong" if found.wrong else "ok"
    found.seconds = round(time.perf_counter() - start, 2)
    return found


class Trial:
    """A plain model, inputs that it takes, and what one plain step makes of it."""

    def __init__(self, case: Case):
        self.case = case
        skip = matrix_cases.settings(case)["skip"]
        if skip:
            raise NotBuilt(skip)
        try:
            self.plain = matrix_cases.build(case).train()
        except Exception as error:
            raise NotBuilt(short(error)) from error
        count = sum(p.numel() for p in self.plain.parameters())
        if count > MOST_PARAMETERS:
            raise NotBuilt(f"its smallest configuration that we know has {count:,} parameters")
        self._find_inputs(case)
        self._reference()
        self.idle = [
            use.name for use in uses(self.plain) if use.weight.requires_grad and self.grads.get(parameter(use)) is None
        ]

    def _find_inputs(self, case: Case) -> None:
        extra = matrix_cases.settings(case)["inputs"]
        errors = []
        single = self.plain
        for dtype in (torch.float64, torch.float32):
            for label, inputs in tiny_inputs.candidates(case.kind, copy.deepcopy(single).to(dtype), extra):
                self.dtype, self.label, self.inputs = dtype, label, inputs
                self.plain = copy.deepcopy(single).to(dtype)
                # a copy runs, for models that keep something of what they saw
                model = copy.deepcopy(self.plain)
                try:
                    with counted(model) as self.calls:
                        self.loss(model).backward()
                    if not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
                        raise NotBuilt("the plain model's gradients are not finite")
                    return
                except Exception as error:
                    errors.append(short(error))
        raise NotBuilt(errors[0] if errors else "no inputs of its kind")

    def _reference(self) -> None:
        """The plain gradients, twice: a model that draws seeds of its own is tried without dropout."""
        for training in (True, False):
            self.plain.train(training)
            try:
                first, second = self._gradients(), self._gradients()
            except Exception as error:
                raise NotBuilt(short(error)) from error
            agree = all(g is None or torch.equal(g, second[name]) for name, g in first.items())
            if agree:
                break
        else:
            raise NotBuilt("two runs of the plain model give different gradients")
        if not training:
            self.label += ", without dropout"
        if not any(g.any() for g in first.values() if g is not None):
            raise NotBuilt("no parameter gets a gradient")
        self.grads = first

    def _gradients(self) -> dict[str, Tensor | None]:
        model = copy.deepcopy(self.plain)
        self.loss(model).backward()
        return {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}

    def loss(self, model: nn.Module) -> Tensor:
        """The model's own loss, or a fixed function of what it returns; with the same random draws at every call."""
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        out = model(**copy.deepcopy(self.inputs))
        loss = out.get("loss") if hasattr(out, "get") else None
        if loss is not None and loss.requires_grad:
            return loss.sum()
        parts = [fixed_function(t) for t in tensors(out) if t.is_floating_point() and t.requires_grad]
        if not parts:
            raise NotBuilt("nothing that it returns has a gradient")
        return sum(parts)

    def convert(self, density: float, targets: str = "all-matrices", every: int = 2) -> nn.Module:
        """A converted copy; weights without a gradient in plain training are left alone."""
        config = GrassConfig(
            density=density, target_modules=targets, exclude_modules=self.idle or None, update_interval=every
        )
        return convert_to_grass(copy.deepcopy(self.plain), config)

    @property
    def tolerance(self) -> float:
        # some compute parts in float32 whatever they are in, and a last bit of float64 moves a last bit of those
        return 1e-6 if self.dtype == torch.float64 else 2e-4

    def adamw(self, model: nn.Module, make=None, decay: float = 0.0):
        # so that what differs in a last bit is not blown up where a gradient is nearly zero
        eps = 1e-3 if self.dtype == torch.float64 else 1e-2
        settings = {"lr": RATE, "eps": eps, "weight_decay": decay}
        return make(model, torch.optim.AdamW, **settings) if make else torch.optim.AdamW(model.parameters(), **settings)

    # the oracles, each a list of sentences

    def check_gradients(self, found: Found) -> list[str]:
        wrong = []
        for targets in ("all-matrices", "all-linear"):
            try:
                ours = self.convert(1.0, targets)
            except ValueError as error:
                if targets == "all-linear" and "matches no module" in str(error):
                    continue
                if "matches no module" in str(error):
                    raise NotBuilt("nothing to compress: its parameters are convolutions") from error
                raise
            optimizer = self.adamw(ours, grass_optimizer)
            if targets == "all-matrices":
                self._describe(ours, optimizer, found)
            loss = self.loss(ours)
            loss.backward()
            wrong += [f"{targets}: {sentence}" for sentence in self._compare_gradients(ours)]
        return wrong

    def _compare_gradients(self, ours: nn.Module) -> list[str]:
        wrong = []
        largest = max(g.abs().max().item() for g in self.grads.values() if g is not None)
        names = {id(p): name for name, p in ours.named_parameters()}
        pairs = [(names[id(p.weight)], p.active.grad, p) for p in grass_slices(ours)]
        slices = {id(slice_.active) for *_, slice_ in pairs}
        pairs += [(n, p.grad, None) for n, p in ours.named_parameters() if p.requires_grad and id(p) not in slices]
        for name, grad, slice_ in pairs:
            expected = self.grads[name]
            if expected is None and (grad is None or not grad.any()):
                continue
            if expected is None or grad is None:
                wrong.append(f"{name} has {'a' if expected is None else 'no'} gradient, unlike the plain weight")
                continue
            whole, norms = expected, None
            if slice_ is not None:
                expected = take_rows(expected, slice_.index, slice_.dim)
                norms = slice_.norms.grad if slice_.norms is not None else None
            apart = (grad - expected).abs().max().item()
            if not apart <= self.tolerance * max(largest, 1e-3):
                wrong.append(
                    f"gradient of {name} is {apart:.1e} from the plain one of {expected.abs().max().item():.1e}"
                )
            elif norms is not None and self._called_once(slice_, ours) and not self._norms_agree(norms, whole, slice_):
                wrong.append(f"squared norms of {name} are not those of its gradient")
        return wrong

    def _called_once(self, slice_, ours: nn.Module) -> bool:
        # a weight that is used several times in a step gets the sum of its uses' own norms: see slices/ops/tap.py
        users = [name for name, m in ours.named_modules() if slice_ in getattr(m, "own_slices", dict)().values()]
        return len(users) == 1 and self.calls[users[0]] == 1

    def _norms_agree(self, norms: Tensor, grad: Tensor, slice_) -> bool:
        squares = grad.to(norms.dtype).square().sum(-1 if slice_.dim == -2 else -2)
        precision = 1e-6 if self.dtype == torch.float64 else 1e-2
        return (norms - squares).abs().max() <= precision * squares.max() + self.tolerance**2

    def _describe(self, ours: nn.Module, optimizer, found: Found) -> None:
        found.targets = dict(Counter(kind_of(slice_.owner).name for slice_ in grass_slices(ours)))
        trained = {n: p.numel() for n, p in self.plain.named_parameters() if p.dim() > 1 and self.grads[n] is not None}
        matrices = sum(trained.values()) or 1
        names = {id(p): name for name, p in ours.named_parameters()}
        compressed = {names[id(slice_.weight)] for slice_ in grass_slices(ours)}
        found.coverage = sum(trained.get(name, 0) for name in compressed) / matrices
        if found.coverage < ENOUGH:
            found.full_size = self._at_default_size({pattern_of(name) for name in compressed})
        shares: Counter = Counter()
        for _, pattern, elements, reason in start_report(ours, optimizer).ordinary:
            if reason.startswith("a vector"):
                continue
            if reason == "not in target_modules":  # it gets no gradient, and was excluded
                continue
            shares[f"{pattern}: {reason}"] += elements
        found.left_out = {reason: count / matrices for reason, count in shares.most_common()}

    def _at_default_size(self, taken: set[str]) -> float | None:
        """The coverage of the class's default configuration, by the names of what is compressed of the tiny one."""
        trained = {pattern_of(name) for name, grad in self.grads.items() if grad is not None}
        try:
            large = matrix_cases.build_at_default_size(self.case)
        except Exception:  # some defaults fit no class
            return None
        sizes = [(pattern_of(name), p.numel()) for name, p in large.named_parameters() if p.dim() > 1]
        whole = sum(size for name, size in sizes if name in trained)
        return sum(size for name, size in sizes if name in taken) / whole if whole else None

    def check_trajectory(self, found: Found) -> list[str]:
        theirs, ours = copy.deepcopy(self.plain), self.convert(1.0)
        pairs = [(theirs, self.adamw(theirs, decay=0.1)), (ours, self.adamw(ours, grass_optimizer, decay=0.1))]
        for model, optimizer in pairs:
            for _ in range(2):
                self.loss(model).backward()
                optimizer.step()
                optimizer.zero_grad()
        final = dict(restore_model(ours).named_parameters())
        wrong = []
        for name, param in theirs.named_parameters():
            apart = (final[name] - param).abs().max().item() if param.numel() else 0.0
            if not apart <= self.tolerance:
                wrong.append(f"after two steps at density 1 {name} is {apart:.1e} from plain AdamW's")
        return wrong

    def check_movement_and_files(self, found: Found) -> list[str]:
        theirs, ours = copy.deepcopy(self.plain), self.convert(0.25)
        start = {name: p.detach().clone() for name, p in theirs.named_parameters()}
        wrong: list[str] = []
        optimizer = self.adamw(ours, grass_optimizer)
        selected = {id(slice_.weight): slice_.index.clone() for slice_ in grass_slices(ours)}
        for model, steps in ((theirs, self.adamw(theirs)), (ours, optimizer)):
            self.loss(model).backward()
            steps.step()
            steps.zero_grad()
        full, dims = dict(theirs.named_parameters()), {id(p.weight): p.dim for p in grass_slices(ours)}
        moved = False
        for name, param in plain_parameters(ours):
            expected = full[name].detach()
            if id(param) in dims:  # slices of weights that the model reads itself are gone by now
                inside = mask(param, selected[id(param)], dims[id(param)])
                expected = torch.where(inside, expected, start[name])
            moved |= not torch.equal(param, start[name])
            if not (param - expected).abs().max().item() <= self.tolerance:
                wrong.append(f"a step at density 1/4 does not move {name} as the plain step moves the same rows")
            elif id(param) in dims and not torch.equal(param[~inside], start[name][~inside]):
                wrong.append(f"a step at density 1/4 moves {name} outside of its slice")
        if not moved:
            wrong.append("nothing moved")
        return wrong + self._second_step(ours, optimizer) + self._files(ours, theirs)

    def _second_step(self, ours: nn.Module, optimizer) -> list[str]:
        before = {name: p.detach().clone() for name, p in plain_parameters(ours)}
        selected = {id(slice_.weight): (slice_.index.clone(), slice_.dim) for slice_ in grass_slices(ours)}
        self.loss(ours).backward()
        optimizer.step()
        optimizer.zero_grad()
        wrong = []
        for name, param in plain_parameters(ours):
            if id(param) in selected:
                inside = mask(param, *selected[id(param)])
                if not torch.equal(param[~inside], before[name][~inside]):
                    wrong.append(f"the second step at density 1/4 moves {name} outside of its slice")
        return wrong

    def _files(self, ours: nn.Module, plain: nn.Module) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            theirs, mine = Path(folder) / "plain", Path(folder) / "grass"
            for model, place in ((plain, theirs), (ours, mine)):
                if getattr(model, "generation_config", None) is not None:
                    # a tiny model's special tokens are not its defaults', and saving checks them
                    model.generation_config = type(model.generation_config)()
                model.save_pretrained(place)
            expected, got = contents(theirs), contents(mine)
            if expected != got:
                odd = sorted({*expected.items()} ^ {*got.items()})
                return [f"the checkpoint differs from the plain one in {odd[:4]}"]
            trained = restore_model(ours)
            odd = self._not_loaded(trained, mine)
            # what a plain model does not load back either is none of ours
            odd = [key for key in odd if key not in self._not_loaded(plain, theirs)] if odd else []
        return [f"loading the checkpoint gives other values of {key}" for key in odd[:4]]

    def _not_loaded(self, model: nn.Module, folder: Path) -> list[str]:
        """Keys whose values are not in a checkpoint of the model; a part of some is loaded in float32 always."""
        loaded = type(model).from_pretrained(folder, dtype=self.dtype).state_dict()
        values = model.state_dict()
        return [k for k, v in values.items() if k not in loaded or not torch.equal(v.to(loaded[k].dtype), loaded[k])]
