"""sentence-transformers: its Trainer hands over the loss, which holds the model, and the model saves itself."""

import pytest
import torch

pytest.importorskip("sentence_transformers", minversion="5")

import datasets
from safetensors.torch import load_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from sentence_transformers.models import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from grass_hf import GrassConfig, convert_to_grass, restore_model
from grass_hf.convert.conversion import grass_slices, is_converted

WORDS = ["<pad>", "a", "b", "c"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("bert")
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", model_input_names=["input_ids", "attention_mask"]
    )
    tokenizer.save_pretrained(made)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(WORDS), hidden_dropout_prob=0.0, **shape)).save_pretrained(made)
    return str(made)


def model_of(folder):
    return SentenceTransformer(modules=[Transformer(folder), Pooling(32)], device="cpu")


def pairs():
    return datasets.Dataset.from_dict({"anchor": ["a b", "b c"] * 8, "positive": ["a", "c"] * 8})


def labelled():
    return datasets.Dataset.from_dict({"a": ["a b", "b c"] * 8, "b": ["a", "c"] * 8, "label": [0, 1] * 8})


def job(folder, output, loss, data, model=None, **options):
    defaults = {
        "output_dir": str(output),
        "optim": "grass",
        "optim_args": "density=0.25,update_interval=2,base=adamw_torch",
        "learning_rate": 1e-2,
        "max_steps": 6,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    made = SentenceTransformerTrainingArguments(**{**defaults, **options})
    model = model_of(folder) if model is None else model
    return SentenceTransformerTrainer(model=model, args=made, train_dataset=data, eval_dataset=data, loss=loss(model))


def softmax(model):
    return losses.SoftmaxLoss(model, sentence_embedding_dimension=32, num_labels=2)


def targets(model):
    """Weights that slices train; the pooler is BERT's own, and this loss has another."""
    return {f"{slice_.state.name}.weight" for slice_ in grass_slices(model) if "pooler" not in slice_.state.name}


def moved(folder, model):
    before = dict(model_of(folder).named_parameters())
    return {name for name, param in model.named_parameters() if name in before and not torch.equal(param, before[name])}


def test_trains_and_saves_plain(folder, tmp_path):
    made = job(folder, tmp_path, losses.MultipleNegativesRankingLoss, pairs())
    made.train()
    assert is_converted(made.model)
    assert len(targets(made.model)) == 12 and targets(made.model) <= moved(folder, made.model)
    made.model.save_pretrained(str(tmp_path / "final"))
    model_of(folder).save_pretrained(str(tmp_path / "plain"))
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("final", "plain"))
    assert ours.keys() == theirs.keys()
    sentences = ["a b", "c"]
    expected = made.model.encode(sentences)
    for again in (SentenceTransformer(str(tmp_path / "final"), device="cpu"), restore_model(made.model)):
        assert again.encode(sentences) == pytest.approx(expected, abs=1e-6)


def test_parameters_of_the_loss_are_trained_beside_the_slices(folder, tmp_path):
    made = job(folder, tmp_path, softmax, labelled())
    head = made.loss.classifier.weight.detach().clone()
    made.train()
    assert not torch.equal(made.loss.classifier.weight, head)
    assert targets(made.model) <= moved(folder, made.model)


def test_the_best_model_is_loaded_at_the_end(folder, tmp_path):
    """The best of these is the first, if a larger loss is better."""
    steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2, "logging_steps": 2}
    options = {**steps, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    made = job(folder, tmp_path, losses.MultipleNegativesRankingLoss, pairs(), **options)
    made.train()
    best = SentenceTransformer(made.state.best_model_checkpoint, device="cpu")
    ours, theirs = made.model.state_dict(), best.state_dict()
    assert ours.keys() == theirs.keys() and made.state.best_model_checkpoint.endswith("-2")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    for slice_ in grass_slices(made.model):
        assert slice_.rank_part(slice_, False).agrees()


def test_losses_by_data_set_and_converted_beforehand(folder, tmp_path):
    model = convert_to_grass(model_of(folder), GrassConfig(density=0.25, update_interval=2))
    data = datasets.DatasetDict({"pairs": pairs(), "labels": labelled()})
    kinds = {"pairs": losses.MultipleNegativesRankingLoss, "labels": softmax}
    made = job(folder, tmp_path, lambda model: {name: kind(model) for name, kind in kinds.items()}, data, model=model)
    made.train()
    assert targets(model) <= moved(folder, model)
