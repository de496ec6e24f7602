"""What an evaluation measures: modules of `evaluate`, the plain perplexity, and the direction of what is kept."""

import json
import math

import numpy as np
import pytest
import recipe_files as files
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction

pytest.importorskip("evaluate")

import evaluate

from grass_hf.recipes import metrics
from grass_hf.recipes.metric_modules import FOLDER, NAMES
from grass_hf.recipes.parse import load_recipe
from grass_hf.recipes.runner import train


def load(name):
    return evaluate.load(str(FOLDER / f"{name}.py"), keep_in_memory=True)


def test_tokens_by_hand():
    assert metrics.perplexity(0.0) == 1.0 and metrics.perplexity(1e9) == float("inf")
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3, 0], [1, 1, 1, 1]]), 4).float()
    counts = metrics.count_tokens(logits, torch.tensor([[0, 1, 2, 0], [-100, -100, 1, 2]]))
    one = math.log(math.e + 3)  # loss of a wrong class of four, one of which has logit 1
    assert counts[:, :2].tolist() == [[2, 3], [1, 2]]
    assert counts[:, 2].tolist() == pytest.approx([3 * one - 2, 2 * one - 1])
    found = metrics.of_tokens(EvalPrediction(counts.numpy(), None))
    assert found["token_accuracy"] == 3 / 5
    assert found["perplexity"] == pytest.approx(math.exp((5 * one - 3) / 5))


def test_our_modules_are_those_of_scikit_learn():
    reference = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    predicted, true = generator.integers(0, 4, 50), generator.integers(0, 4, 50)
    given = {"predictions": predicted, "references": true}
    for name in ("f1", "precision", "recall"):
        score, module = getattr(reference, f"{name}_score"), load(name)
        for average in ("macro", "micro", "weighted"):
            assert module.compute(**given, average=average)[name] == pytest.approx(
                score(true, predicted, average=average)
            )
        two = {"predictions": predicted % 2, "references": true % 2}
        assert module.compute(**two)[name] == pytest.approx(score(true % 2, predicted % 2))
        assert module.compute(predictions=[0], references=[0])[name] == 0.0
        with pytest.raises(ValueError, match="macro"):
            module.compute(**given)
    assert load("accuracy").compute(**given)["accuracy"] == reference.accuracy_score(true, predicted)
    found = load("matthews_correlation").compute(**given)["matthews_correlation"]
    assert found == pytest.approx(reference.matthews_corrcoef(true, predicted))
    assert set(NAMES) == {"accuracy", "exact_match", "f1", "matthews_correlation", "precision", "recall", "rouge"}


def test_texts_by_hand():
    """The values are those of the package rouge_score 0.1.2, with which 300 random pairs were compared."""
    pairs = {"predictions": ["the cat sat", "a b\nc d e"], "references": ["the cat sat down", "c d\na b e"]}
    found = load("rouge").compute(**pairs)
    expected = {"rouge1": 13 / 14, "rouge2": 0.65, "rougeL": (6 / 7 + 0.6) / 2, "rougeLsum": 13 / 14}
    assert found == pytest.approx(expected)
    same = load("exact_match").compute
    assert same(predictions=["A.", "b"], references=["a", "b"])["exact_match"] == 0.5
    assert same(predictions=["A.", "b"], references=["a", "b"], ignore_case=True, ignore_punctuation=True) == {
        "exact_match": 1.0
    }


@pytest.mark.parametrize(
    "name, better", [("perplexity", False), ("eval_loss", False), ("accuracy", True), ("rougeL", True), ("wer", False)]
)
def test_the_direction_of_a_metric_is_known(name, better, tmp_path):
    said = files.pretraining(tmp_path)
    said["training"] |= {"metric_for_best_model": name, "eval_strategy": "steps", "eval_steps": 1}
    assert load_recipe(files.write(tmp_path, said)).training.greater_is_better is better
    with pytest.raises(ValueError, match="would keep the worst checkpoint"):
        load_recipe(files.write(tmp_path, said), ["--greater_is_better", str(not better)])
    said["training"]["metric_for_best_model"] = "cosiness"
    with pytest.raises(ValueError, match="cosiness: whether more of it is better is not known"):
        load_recipe(files.write(tmp_path, said))
    assert (
        load_recipe(files.write(tmp_path, said), ["--greater_is_better", "false"]).training.greater_is_better is False
    )


@pytest.mark.parametrize("make", [files.pretraining, files.finetuning], ids=lambda make: make.__name__)
def test_perplexity_is_of_the_plain_loss_and_the_lowest_is_kept(make, tmp_path):
    if make is files.finetuning:
        pytest.importorskip("trl")
    said = make(tmp_path)
    said["training"] |= {"label_smoothing_factor": 0.2, "save_strategy": "best", "metric_for_best_model": "perplexity"}
    said["training"] |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    results = train(load_recipe(files.write(tmp_path, said)))
    model, pieces = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    lines = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    seen = [line["eval_perplexity"] for line in lines if "eval_perplexity" in line]
    assert results["perplexity after"] == pytest.approx(min(seen))
    smoothed = math.exp(results["loss after"])
    assert smoothed > 1.2 * results["perplexity after"] > 1.2
    if make is files.pretraining:
        return
    # an independent reading of the held-out chats
    loss = count = 0
    held_out = train_rows(tmp_path)
    for row in held_out:
        text = pieces.apply_chat_template(row["messages"], tokenize=False)
        ids = torch.tensor([pieces(text)["input_ids"]])
        marked = learnt(pieces, row["messages"], ids[0].tolist())
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        for place in range(1, ids.shape[1]):
            if marked[place]:
                loss, count = loss - logs[place - 1, ids[0, place]].item(), count + 1
    assert math.exp(loss / count) == pytest.approx(results["perplexity after"], rel=1e-4)


def train_rows(folder):
    """The held-out rows: of the file's distinct chats every one is among them in the same share."""
    from grass_hf.recipes.sources import hold_out, load_rows

    recipe = load_recipe(folder / "recipe.yaml")
    ((rows, _),) = load_rows(recipe.data)
    _, held_out = hold_out(rows, recipe.data, recipe.training.seed)
    return list(held_out.dataset)


def learnt(pieces, turns, ids):
    """Which tokens belong to replies: from behind the words `### Assistant:` to the end of the turn."""
    marks, inside = [], False
    for place in range(len(ids)):
        before = pieces.decode(ids[:place])
        if before.endswith("### Assistant:\n"):
            inside = True
        elif before.endswith("### User:\n") or (inside and pieces.decode(ids[place:]).startswith("### User:\n")):
            inside = False
        marks.append(inside)
    return marks


def test_metrics_of_replies_compare_what_the_model_generates(tmp_path):
    pytest.importorskip("trl")
    said = files.finetuning(tmp_path)
    said["training"] |= {"max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 2e-2}
    said["evaluation"] = {"metrics": ["exact_match", "rouge", "perplexity"], "generated_rows": 2}
    results = train(load_recipe(files.write(tmp_path, said)))
    assert results["exact_match before"] == 0.0 < results["exact_match after"] == 1.0
    assert results["rougeL after"] == 1.0 and results["perplexity after"] < 2


def test_a_local_module_measures_classes(tmp_path):
    said = files.classification(tmp_path)
    (tmp_path / "misses.py").write_text(
        "import datasets\nimport evaluate\n"
        "class Misses(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        kinds = {n: datasets.Value('int64') for n in ('predictions', 'references')}\n"
        "        return evaluate.MetricInfo('', '', features=datasets.Features(kinds))\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'misses': sum(p != r for p, r in zip(predictions, references)), 'table': [1]}\n"
    )
    said["evaluation"] = {"metrics": [str(tmp_path / "misses.py"), "f1"]}
    results = train(load_recipe(files.write(tmp_path, said)))
    assert results["misses before"] >= 0 and "f1 after" in results and "accuracy after" not in results


@pytest.mark.parametrize(
    "make, named, mention",
    [
        (files.classification, "acuracy", "did you mean accuracy?"),
        (files.classification, "rouge", "which is classes"),
        (files.pretraining, "rouge", "token_accuracy are measured anyway"),
        (files.preferences, "rouge", "leave it out"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused(make, named, mention, tmp_path, monkeypatch, capsys):
    if make is files.preferences:
        pytest.importorskip("trl")
    said = make(tmp_path)
    said["evaluation"] = {"metrics": [named]}
    for command in ("validate", "train"):
        assert files.grass(monkeypatch, command, files.write(tmp_path, said)) == 2
        assert mention in capsys.readouterr().err and not (tmp_path / "out").exists()
