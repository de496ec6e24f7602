"""ROUGE (Lin 2004): F1 of shared words (1), pairs (2), and of the longest common subsequence (L; Lsum by lines)."""

import re
from collections import Counter

import evaluate

from grass_hf.recipes.metric_modules import info


def _f1(shared, ours, theirs):
    return 2 * shared / (ours + theirs) if shared else 0.0


def _words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def _grams(ours, theirs, n):
    one, other = (Counter(zip(*(words[at:] for at in range(n)), strict=False)) for words in (ours, theirs))
    return _f1((one & other).total(), one.total(), other.total())


def _table(ours, theirs):
    """Lengths of the longest common subsequences of all beginnings."""
    table = [[0] * (len(theirs) + 1)]
    for word in ours:
        row = [0]
        for at, other in enumerate(theirs):
            row.append(table[-1][at] + 1 if word == other else max(table[-1][at + 1], row[-1]))
        table.append(row)
    return table


def _common(true, predicted):
    """Places in `true` of one longest common subsequence."""
    table, i, j, places = _table(true, predicted), len(true), len(predicted), set()
    while i and j:
        if true[i - 1] == predicted[j - 1]:
            i, j = i - 1, j - 1
            places.add(i)
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places


def _by_lines(predicted, true):
    """Every line of the reference is matched with all predicted ones; a word counts as often as both sides have it."""
    ours, theirs = ([w for w in map(_words, text.split("\n")) if w] for text in (predicted, true))
    left, right = Counter(w for line in ours for w in line), Counter(w for line in theirs for w in line)
    ours_count, theirs_count, shared = left.total(), right.total(), 0
    for line in theirs:
        for place in sorted(set().union(*(_common(line, other) for other in ours))):
            if left[line[place]] > 0 and right[line[place]] > 0:
                shared += 1
                left[line[place]] -= 1
                right[line[place]] -= 1
    return _f1(shared, ours_count, theirs_count)


class Rouge(evaluate.Metric):
    def _info(self):
        return info(__doc__, "string")

    def _compute(self, predictions, references):
        scores: dict[str, list[float]] = {"rouge1": [], "rouge2": [], "rougeL": [], "rougeLsum": []}
        for predicted, true in zip(predictions, references, strict=True):
            ours, theirs = _words(predicted), _words(true)
            for n in (1, 2):
                scores[f"rouge{n}"].append(_grams(ours, theirs, n))
            scores["rougeL"].append(_f1(_table(ours, theirs)[-1][-1], len(ours), len(theirs)))
            scores["rougeLsum"].append(_by_lines(predicted, true))
        return {name: sum(values) / len(values) for name, values in scores.items()}
