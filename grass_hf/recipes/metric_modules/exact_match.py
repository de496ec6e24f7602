"""Share of texts that equal their reference."""

import re
import string

import evaluate

from grass_hf.recipes.metric_modules import info


class ExactMatch(evaluate.Metric):
    def _info(self):
        return info(__doc__, "string")

    def _compute(self, predictions, references, ignore_case=False, ignore_punctuation=False, ignore_numbers=False):
        left_out = (string.punctuation if ignore_punctuation else "") + (string.digits if ignore_numbers else "")

        def plain(text):
            text = re.sub(f"[{re.escape(left_out)}]", "", text) if left_out else text
            return text.lower() if ignore_case else text

        same = [plain(one) == plain(other) for one, other in zip(predictions, references, strict=True)]
        return {"exact_match": sum(same) / len(same)}
