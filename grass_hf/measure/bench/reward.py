"""What training a part of the columns costs in reward: GRPO with Grass beside AdamW, on a task whose optimum is known.

A small LLaMA that knows nothing is given two letters and is to answer with the first one, three times. A reply's reward
is the share of its tokens that are right: 1 at best, and 1/9 by guessing. TRL's GRPOTrainer does the rest, on the CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import torch

_LETTERS = "abcdef"
_WORDS = ["<pad>", "<s>", "</s>", *_LETTERS]
_REPLY = 3
# of a run's last steps the rewards are averaged
LAST = 10
METHODS = {"adamw": {"optim": "adamw_torch"}, "grass": {"optim": "grass"}}


def compare(
    *,
    steps: int,
    lr: float,
    density: float,
    interval: int,
    seeds: Sequence[int],
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Train both with every seed.

    Args:
        steps: of each run, with 32 replies.
        lr: of both.
        density: of Grass, on all linear layers.
        interval: steps between selections.
        seeds: of the first weights, the batches and the draws.
        progress: told what goes on.

    Returns:
        A row for each run: ``method``, ``seed``, ``reward``, the mean over the last `LAST` steps, and ``greedy``, that
        of the likeliest replies to all prompts after training.
    """
    rows = []
    for seed in seeds:
        for method, options in METHODS.items():
            own = {"optim_args": f"density={density},update_interval={interval}"} if method == "grass" else {}
            rows.append({"method": method, "seed": seed, **_run(seed, steps=steps, lr=lr, **options, **own)})
            progress(f"{method}, seed {seed}: reward {rows[-1]['reward']:.3f}, greedy {rows[-1]['greedy']:.3f}")
    return rows


def _run(seed: int, *, steps: int, lr: float, **options: Any) -> dict[str, float]:
    import datasets
    import trl
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(seed)
    tokenizer = _tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=len(_WORDS),
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            use_cache=True,
        )
    )
    prompts = [" ".join(pair) for pair in permutations(_LETTERS, 2)]
    with tempfile.TemporaryDirectory() as folder:
        args = trl.GRPOConfig(
            folder,
            learning_rate=lr,
            lr_scheduler_type="constant",
            max_steps=steps,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=_REPLY,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            seed=seed,
            gradient_checkpointing=False,
            **options,
        )
        trainer = trl.GRPOTrainer(
            model,
            args=args,
            reward_funcs=_right,
            train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=tokenizer,
        )
        trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    return {"reward": sum(rewards[-LAST:]) / len(rewards[-LAST:]), "greedy": _greedy(trainer.model, tokenizer, prompts)}


def _right(prompts: list[str], completions: list[str], **_: Any) -> Any:
    pairs = zip(prompts, completions, strict=True)
    return [sum(word == prompt[0] for word in reply.split()) / _REPLY for prompt, reply in pairs]


@torch.no_grad()
def _greedy(model: Any, tokenizer: Any, prompts: list[str]) -> float:
    given = tokenizer(prompts, return_tensors="pt")
    model.eval()
    ids = model.generate(
        input_ids=given["input_ids"], attention_mask=given["attention_mask"], do_sample=False, max_new_tokens=_REPLY
    )
    replies = tokenizer.batch_decode(ids[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(_right(prompts, replies)) / len(prompts)


def _tokenizer() -> Any:
    """Words, one a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(_WORDS)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
