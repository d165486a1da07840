"""Metrics of word overlap with references, or with the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from textgym.metrics import MissingRequirement
from textgym.metrics.base import TextMetric
from textgym.rewards import overlap


class Rouge(TextMetric):
    """ROUGE-1, ROUGE-2 and ROUGE-L: means of F1 by the `rouge-score` package, with Porter stems, best over references.

    Returns:
        ``rouge_1``, ``rouge_2``, ``rouge_l`` in [0, 1].
    """

    inputs = ("predictions", "references")
    paper = "Lin. ROUGE: A Package for Automatic Evaluation of Summaries. Text Summarization Branches Out, 2004."
    signature = f"rouge-score {version('rouge-score')}, F1, Porter stems, best over references"

    def _scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        kinds = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
        scores = overlap.rouge(tuple(kinds.values()), predictions, references)
        return {name: scores[kind].mean() for name, kind in kinds.items()}


class Bleu(TextMetric):
    """Corpus BLEU-4 by sacrebleu, with its default tokenisation (13a) and smoothing, case-sensitive.

    Returns:
        ``bleu`` in [0, 100]. (CommonGen's papers use coco-caption's BLEU: lower case, other tokens, no smoothing.)
    """

    inputs = ("predictions", "references")
    paper = "Post. A Call for Clarity in Reporting BLEU Scores. WMT 2018."

    def __init__(self) -> None:
        if find_spec("sacrebleu") is None:
            raise MissingRequirement('bleu needs sacrebleu: pip install "textgym[metrics]"')
        from sacrebleu.metrics import BLEU

        super().__init__()
        self.bleu = BLEU(tokenize="13a", smooth_method="exp")
        self.signature = f"sacrebleu case:mixed|eff:no|tok:13a|smooth:exp|version:{version('sacrebleu')}"

    def _scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        # sacrebleu needs the same number of references for every text; missing ones are None.
        streams: Any = [
            [texts[k] if k < len(texts) else None for texts in references] for k in range(max(map(len, references)))
        ]
        return {"bleu": self.bleu.corpus_score([text.strip() for text in predictions], streams).score}


class CiderD(TextMetric):
    """CIDEr-D with the document frequencies of the references themselves, as in the evaluation of captions.

    The computation is that of `pycocoevalcap` (see `textgym.rewards.overlap.CiderDScorer`). Words are found by a
    regular expression, lower case, without punctuation; coco-caption runs the Penn Treebank tokenizer in Java, which
    differs in clitics ("don't" is two words there), numbers with points and the like. CommonGen's reward has the
    document frequencies of the training references instead, so that it does not depend on the batch.

    Returns:
        ``cider_d``, the mean, in [0, 10].
    """

    inputs = ("predictions", "references")
    paper = "Vedantam, Zitnick, Parikh. CIDEr: Consensus-based Image Description Evaluation. CVPR 2015."
    signature = "document frequencies of the judged references, words by regular expression"

    def _scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        return {"cider_d": overlap.CiderDScorer(references)(predictions, references).mean()}


class Coverage(TextMetric):
    """Concept coverage: the fraction of a prompt's concepts that its text uses, in any inflected form.

    See `textgym.rewards.overlap.coverage`.

    Returns:
        ``coverage``, the mean, in [0, 1].
    """

    inputs = ("prompts", "predictions")
    paper = "Lin et al. CommonGen: A Constrained Text Generation Challenge. Findings of EMNLP 2020."
    signature = "Snowball stems and irregular forms"

    def _scores(self, prompts: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        return {"coverage": overlap.coverage(prompts, predictions).mean()}
