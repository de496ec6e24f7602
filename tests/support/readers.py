"""Small models that read weights without calling the modules that have them, each in a way that is met in practice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grass_hf import GrassConfig, convert_to_grass
from grass_hf.convert.conversion import grass_slices

WIDTH, WORDS = 16, 24
SETTINGS = {"density": 0.5, "update_interval": 2, "target_modules": "all-matrices", "exclude_modules": ["inner.c"]}


class Reader(nn.Module):
    """An embedding, two layers and a head over tokens; subclasses read `inner.b` (or what `behind` says) otherwise."""

    behind: tuple[str, ...] = ("inner.b",)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(WORDS, WIDTH)
        self.inner = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH, bias=False) for name in "abc"})
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def body(self, x: Tensor) -> Tensor:
        return self.norm(self.inner["c"](torch.tanh(self.read(self.inner["a"](x)))) + x)

    def read(self, x: Tensor) -> Tensor:
        return self.inner["b"](x)

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.body(self.table(ids)))[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Calls(Reader):
    """Reads nothing, but looks at shapes, at detached values, and at norms under no_grad."""

    behind = ()

    def read(self, x):
        weight = self.inner["b"].weight
        self.seen = (weight.shape, weight.dtype, weight.device, weight.detach().norm(), weight.data.t().sum())
        with torch.no_grad():
            self.norm_now = weight.norm()
        self.rows = weight.t()[:3].shape
        return self.inner["b"](x.to(weight.dtype)) if weight.to(weight.dtype) is weight else x


class Routers(Reader):
    """LongcatFlash's router, WavLM's attention."""

    def read(self, x):
        return F.linear(x.float(), self.inner["b"].weight.type(torch.float32))


class Matmul(Reader):
    """Mamba's dt_proj."""

    def read(self, x):
        return x @ self.inner["b"].weight.t()


class Both(Reader):
    """Called, and its norm is a term of the loss."""

    def forward(self, ids):
        return super().forward(ids) + 0.1 * self.inner["b"].weight.square().sum()


class Rows(Reader):
    """DeBERTa's table of relative positions."""

    behind = ("table",)

    def body(self, x):
        return super().body(x + self.table.weight[: x.shape[1]])


class TiedHead(Reader):
    """MobileBERT's head: the tied table and a matrix beside it, concatenated."""

    behind = ("table",)

    def __init__(self):
        super().__init__()
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.body(self.table(ids))
        logits = x @ torch.cat([self.head.weight.t(), torch.ones(WIDTH, 1)], dim=1)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels):
        logits = x @ weight.t()
        gradient = logits.softmax(-1)
        gradient[torch.arange(len(labels)), labels] -= 1.0
        ctx.save_for_backward(x, weight, gradient / len(labels))
        return F.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx, dy):
        x, weight, gradient = ctx.saved_tensors
        return dy * gradient @ weight, dy * gradient.t() @ x, None


class FusedLoss(Reader):
    """Liger's, TRL's."""

    behind = ("head",)

    def forward(self, ids):
        x = self.body(self.table(ids))
        return _FusedLoss.apply(x[:, :-1].flatten(0, 1), self.head.weight, ids[:, 1:].flatten())


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.rows = len(weight)
        return weight[ids]

    @staticmethod
    def backward(ctx, grad):
        return None, torch.ops.aten.embedding_dense_backward(grad, *ctx.saved_tensors, ctx.rows, -1, False)


class Lookup(Reader):
    """A function that is given a frozen weight, and nothing that requires a gradient."""

    behind = ("table",)

    def forward(self, ids):
        logits = self.head(self.body(_Lookup.apply(ids, self.table.weight)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Checkpointed(Routers):
    """The same inside a checkpoint that runs its forward without gradients."""

    use_reentrant = True

    def body(self, x):
        return checkpoint(super().body, x, use_reentrant=self.use_reentrant)


class CheckpointedAnew(Checkpointed):
    """The same inside the other kind of checkpoint."""

    use_reentrant = False


class Noisy(Routers):
    """Draws masks and keeps running means, which a second forward must not see."""

    def __init__(self):
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def read(self, x):
        self.calls = self.calls + 1
        self.calls.mul_(2)
        x = self.batch_norm(super().read(x).transpose(1, 2)).transpose(1, 2)
        return F.dropout(x, 0.3, self.training)


READERS = [Routers, Matmul, Both, Rows, TiedHead, FusedLoss, Lookup, Checkpointed, CheckpointedAnew, Noisy]


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(WORDS, (3, 7), generator=torch.Generator().manual_seed(seed))


def converted(kind: type[nn.Module], **settings) -> nn.Module:
    """A reader whose matrices but `inner.c` are compressed."""
    return convert_to_grass(kind(), GrassConfig(**{**SETTINGS, **settings}))


def names(model: nn.Module) -> set[str]:
    """Of its slices."""
    return {slice_.state.name for slice_ in grass_slices(model)}


def hooks(model: nn.Module) -> int:
    """How many hooks are left on it."""
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def modes() -> list:
    """The dispatch modes that are entered now."""
    return torch.utils._python_dispatch._get_current_dispatch_mode_stack()


class Product(torch.autograd.Function):
    """What fused losses are: an autograd function of their own, outside the model's forward."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(weight)
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0], None


class Kernel(Product):
    """A kernel that torch knows nothing of is given the memory's address."""

    @staticmethod
    def forward(ctx, hidden, weight):
        assert weight.data_ptr()
        ctx.save_for_backward(weight)
        return torch.ones(*hidden.shape[:-1], len(weight))
