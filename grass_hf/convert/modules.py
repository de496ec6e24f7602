"""Modules that train a slice of their weight.

A module is converted by swapping its class, as `torch.nn.utils.parametrize` does: no weight is copied, hooks and
references to the module stay valid, and the class's own forward still runs.

[Note: where the tap goes] The gradient of a weight is known where the product with it is made. A subclass may do more
in its forward (Gemma's embedding multiplies by a constant), so the tap is put right around the base class's forward:
the converted class has the order ``subclass, tap, base``, and the subclass's ``super().forward(...)`` reaches the tap.
A subclass that never calls its base (Falcon's linear layer writes the product out) is tapped from outside, but only
after a trial on two tokens has shown that it computes the base class's function. Anything else is left alone.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn

from ..slices.evaluated import warn_of_parting
from ..slices.frozen_weight import keep_frozen
from ..slices.ops import int8, products
from ..slices.ops.sharding import gathered, shape_of
from ..slices.slice import Slice
from . import experts
from .kind import Kind
from .trials import agree, computes_product, reaches

logger = logging.getLogger(__name__)


class GrassModule(nn.Module):
    """Mixin of every converted module."""

    def __reduce_ex__(self, protocol):
        # the classes are made as they are needed, so pickle is told how to make them
        found = [key for key, converted in _CONVERTED.items() if converted is type(self)]
        return (_new, found[0], self.__dict__) if found else super().__reduce_ex__(protocol)

    def own_slices(self) -> dict[str, Slice]:
        """The slices of this module's weights by attribute, also one that it shares with the module that holds it."""
        members = {**self._modules, **self.__dict__}
        return {name: member for name, member in members.items() if isinstance(member, Slice)}

    def _save_to_state_dict(self, *args, **kwargs):
        for slice_ in self.own_slices().values():
            warn_of_parting(slice_)
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for slice_ in self.own_slices().values():
            if prefix + slice_.parameter in state_dict:
                slice_.take_new_weight()


def _keep_frozen(weight: nn.Parameter | None) -> None:
    """Freeze a weight again that was made trainable with all others, as PEFT does when it turns adapters on: its full
    gradient would be formed and thrown away."""
    if weight is not None and weight.requires_grad:
        keep_frozen(weight)
        _warn_of_unfreezing()


@functools.cache
def _warn_of_unfreezing() -> None:
    logger.warning(
        "weights that have slices were made trainable after the conversion (by model.requires_grad_(True), or by PEFT "
        "turning adapters on): they are frozen again, because their slices train them. exclude_modules names what is "
        "to be trained in full."
    )


class TappedLinear(GrassModule):
    """Gives `nn.Linear` an active slice; weight (m, n)."""

    transposed = False
    # whether the forward that follows is `nn.Linear`'s own, so that product and tap can be one
    is_plain = False
    weight_slice: Slice

    def forward(self, input: Tensor) -> Tensor:
        weight = self._parameters.get("weight")
        if weight is not None and weight.requires_grad:
            _keep_frozen(weight)
        # past the look-up of attributes, which takes a module longer
        slice_: Any = self._modules.get("weight_slice") or self.weight_slice
        if self.is_plain and (y := slice_.linear(input, weight, self._parameters["bias"])) is not None:
            return y
        return slice_.tap(super().forward(input), input, transposed=self.transposed)


class TappedConv1D(TappedLinear):
    """The same for transformers' `Conv1D`; weight (n, m)."""

    transposed = True


class TappedInt8Linear(GrassModule):
    """Gives an `nn.Linear` whose weight is int8 an active slice; in a state dict the weight is a plain one."""

    weight: Any  # a Parameter with the attributes of torchao's int8 tensor
    bias: nn.Parameter | None
    weight_slice: Slice

    def forward(self, input: Tensor) -> Tensor:
        return self.weight_slice.tap(int8.linear(input, self.weight, self.bias), input)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = int8.dequantize(self.weight)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args):
        # the tensor's own copy_ would round at random
        plain = state_dict.get(prefix + "weight")
        fits = getattr(plain, "shape", None) == self.weight.shape  # else torch says how they differ
        if fits:
            del state_dict[prefix + "weight"]
            found: Any = int8.quantize(plain.to(self.weight.dtype))
            self.weight.int_data.copy_(found.int_data)
            self.weight.scale.copy_(found.scale)
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        finally:
            if fits:
                state_dict[prefix + "weight"] = plain
                missing_keys.remove(prefix + "weight")
                self.weight_slice.take_new_weight()


class TappedEmbedding(GrassModule):
    """Gives `nn.Embedding` a slice of feature columns; weight (V, d)."""

    padding_idx: int | None
    weight_slice: Slice

    def forward(self, input: Tensor) -> Tensor:
        _keep_frozen(self._parameters.get("weight"))
        return self.weight_slice.embedding_tap(super().forward(input), input, self.padding_idx)


class TappedExperts(GrassModule):
    """Gives the 3-D parameters of a module behind transformers' experts interface a slice each."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        for slice_ in self.own_slices().values():
            _keep_frozen(slice_.weight)
        return experts.forward(self, hidden_states, top_k_index, top_k_weights)


class TappedProducts(GrassModule):
    """Gives parameters that a forward of its own multiplies with a slice each; see [Note: products by storage]."""

    @torch.compiler.disable
    def forward(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        layouts = products.layouts(self)
        parts = {slice_.parameter: slice_ for slice_ in self.own_slices().values()}
        for slice_ in parts.values():
            _keep_frozen(slice_.weight)
        views = {name: slice_.matrices(layouts[name]) for name, slice_ in parts.items()}
        weights: dict[str, Tensor] = {name: slice_.weight for name, slice_ in parts.items()}
        try:
            with products.Products(weights, lambda name, y, x, matrix: views[name].tap(y, x, matrix)):
                return super().forward(*args, **kwargs)
        except products.NotUnderstood as use:
            names = [slice_.state.name for slice_ in parts.values()]
            raise RuntimeError(
                f"{type(self).__name__} uses a weight in another way than the trial before its conversion showed "
                f"({use}), which no slice can follow: train it in full with exclude_modules={names}."
            ) from use


def kind_of(module: nn.Module) -> Kind | None:
    """What a module is to Grass, or None if its weights cannot be compressed."""
    if isinstance(module, nn.Linear):
        is_int8 = int8.is_int8(module.weight)
        return Kind("linear", nn.Linear, TappedInt8Linear if is_int8 else TappedLinear, False)
    if isinstance(module, nn.Embedding):
        return Kind("embedding", nn.Embedding, TappedEmbedding, True)
    if experts.is_experts(module):
        return Kind("experts", None, TappedExperts, bool(module.is_transposed))
    conv1d = next((cls for cls in type(module).__mro__ if cls.__name__ == "Conv1D"), None)
    if conv1d is not None and conv1d.__module__ == "transformers.pytorch_utils":
        return Kind("Conv1D", conv1d, TappedConv1D, True)
    return _OF_PRODUCTS if products.layouts(module) else None


_OF_PRODUCTS = Kind("experts", None, TappedProducts, False)


def layout_of(module: nn.Module, parameter: str) -> products.Layout:
    """How many matrices a weight of a known kind is, and whether they are stored (input, output)."""
    found = products.layouts(module).get(parameter) if converts_products(module) else None
    weight, kind = shape_of(getattr(module, parameter)), kind_of(module)
    return found or products.Layout(1, weight[-2], kind is not None and kind.transposed)


def converts_products(module: nn.Module) -> bool:
    """Whether a module's products are found by their storage."""
    if experts.is_experts(module) or not products.layouts(module):
        return False
    cls = type(module) if isinstance(module, GrassModule) else converted_class(module)
    return cls is not None and issubclass(cls, TappedProducts)


_CONVERTED: dict[tuple[type[nn.Module], Kind, bool], type[GrassModule]] = {}


def classes_made() -> int:
    """How many classes this process has made for converted modules so far."""
    return len(_CONVERTED)


def converted_class(module: nn.Module) -> type[GrassModule] | None:
    """The class that a module of a known kind is to have, None if its forward is not understood.

    See [Note: where the tap goes]. A forward that overrides its base's is tried on two tokens.
    """
    cls, kind = type(module), kind_of(module)
    if kind is None:
        return None
    if cls is kind.base:
        return _class(cls, kind, True)
    if kind.base is not None and cls.forward is kind.base.forward:
        return _class(cls, kind, False)
    with gathered(module.parameters()):
        if kind is _OF_PRODUCTS:
            return _class(cls, kind, True)
        if kind.base is None:
            converted = _class(cls, kind, True)
            return converted if agree(module, converted, *experts.trial_input(module)) else None
        if reaches(module, kind):
            return _class(cls, kind, False)
        if computes_product(module, kind):
            return _class(cls, kind, True)
        return _class(cls, _OF_PRODUCTS, True) if products.layouts(module) else None


def _class(cls: type[nn.Module], kind: Kind, outside: bool) -> type[GrassModule]:
    key = (cls, kind, outside)
    if key not in _CONVERTED:
        plain = {"is_plain": kind.base is nn.Linear and (not outside or cls is nn.Linear)}
        order: tuple[type, ...] = (kind.mixin, cls)
        if not outside and kind.base is not None:
            order = cls, type("Tapped", (kind.mixin, kind.base), {})
        _CONVERTED[key] = type(f"Grass{cls.__name__}", order, plain)
    return _CONVERTED[key]


def _new(cls: type[nn.Module], kind: Kind, outside: bool) -> GrassModule:
    converted = _class(cls, kind, outside)
    return converted.__new__(converted)


def plain_class(module: GrassModule) -> type[nn.Module]:
    """The class that a converted module had before."""
    return next(plain for (plain, *_), converted in _CONVERTED.items() if converted is type(module))
