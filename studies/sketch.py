"""Random mixtures of columns instead of columns: LoRA whose `A` is frozen, and drawn anew every so many steps.

    python studies/sketch.py --study studies/peers_tokens.yaml --learning_rate 0.02 --multiplier 0.3 --interval 200
    python studies/sketch.py --mixture dense --rank 48 --multiplier 0.06

A column of `A` has one entry, 1 or -1, in a row of chance (a count sketch): each of its n/4 rows stands for four
columns of the weight, which get one change with their signs. It would cost what a quarter of the columns does, and
needs no scores; but where Grass gathers columns, a mixture reads them all. When `A` is drawn anew the change so far
goes into the weight, the first moment starts at zero and the second at its mean, as fresh columns' do. `--mixture
dense` draws normal numbers. What came of it stands in docs/quality.md.
"""

from __future__ import annotations

import functools
import math

import torch
from ideas import file_row, point, point_parser
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback

from grass_hf.recipes.study import grid, run


class Mixtures(TrainerCallback):
    """Makes models ready and draws their mixtures.

    Args:
        kind: "sketch" or "dense".
        interval: steps after which they are drawn anew; 0: never.
        rank: rows of A; None for a quarter of its columns.
    """

    def __init__(self, kind: str, interval: int, rank: int | None):
        self.kind, self.interval, self.rank = kind, interval, rank
        self.draws = torch.Generator().manual_seed(1)

    def arrange(self) -> None:
        """Have runs of a study train mixtures."""
        trainer = run._trainer

        @functools.wraps(trainer)
        def drawing(run, text, callbacks, *others, **more):
            return trainer(run, text, [self, *callbacks], *others, **more)

        run.make_ready, run._trainer = self.ready, drawing

    @torch.no_grad()
    def draw(self, mixture: Tensor) -> None:
        rank, size = mixture.shape
        if self.kind == "dense":
            mixture.copy_(torch.randn(rank, size, generator=self.draws) / math.sqrt(size))
            return
        order = torch.randperm(size, generator=self.draws)
        signs = torch.randint(0, 2, (size,), generator=self.draws).float() * 2 - 1
        mixture.zero_()[torch.arange(size) % rank, order] = signs

    def ready(self, kind: str, model: nn.Module, settings: dict, names: list[str]) -> tuple[nn.Module, set[int]]:
        """In place of `measure.bench.methods.make_ready`."""
        ranks = {name: self.rank or max(1, model.get_submodule(name).in_features // 4) for name in names}
        targets = [model.get_submodule(name).weight for name in names]
        model = get_peft_model(model, LoraConfig(target_modules=names, rank_pattern=ranks, alpha_pattern=ranks))
        model.requires_grad_(True)
        for weight in targets:
            weight.requires_grad_(False)
        for layer in _layers(model):
            mixture = layer.lora_A["default"].weight.requires_grad_(False)
            self.draw(mixture)
        return model, {id(layer.lora_B["default"].weight) for layer in _layers(model)}

    @torch.no_grad()
    def on_step_end(self, args, state, control, model, optimizer, **others):
        if not self.interval or state.global_step % self.interval or state.global_step == state.max_steps:
            return
        for layer in _layers(model):
            mixture, change = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            layer.base_layer.weight.add_(change @ mixture)
            change.zero_()
            self.draw(mixture)
            moments = getattr(optimizer, "optimizer", optimizer).state[change]  # accelerate wraps it
            moments["exp_avg"].zero_()
            moments["exp_avg_sq"].copy_(moments["exp_avg_sq"].mean(1, keepdim=True).expand_as(change))


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def main() -> None:
    parser = point_parser(__doc__, "runs/sketch.jsonl", learning_rate=0.03, multiplier=0.08)
    parser.add_argument("--mixture", choices=("sketch", "dense"), default="sketch")
    parser.add_argument("--interval", type=int, default=0, help="steps after which it is drawn anew; 0: never")
    parser.add_argument("--rank", type=int, help="rows of A; a quarter of its columns if not given")
    args = parser.parse_args()
    settings = {"mixture": args.mixture, "interval": args.interval, "rank": args.rank}
    run = point(grid.load_study(args.study), args.mixture, "lora", settings, args)
    file_row(run, args.json, Mixtures(*settings.values()).arrange)


if __name__ == "__main__":
    main()
