"""From what two models did on the same samples to figures with error bars: pure functions.

Every figure stands for the model and, where there is one, for the reference; its change is taken
sample by sample, so it is surer than the difference of the two. Errors are those of the bootstrap
over samples (`Estimate`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from quantlib.evaluation.estimate import Estimate
from quantlib.evaluation.judge import Verdict
from quantlib.evaluation.pictures import Matrix, cosines, frechet_distance, psnr, relative_errors
from quantlib.evaluation.words import plain_words, same_answer, word_errors


@dataclass(frozen=True)
class Figure:
    """One row of the result.

    task:      the stream it is about: "text", "answer", "speech", "image", "decoder", "vectors".
    name:      what it is, with its unit: "NLL per token (nats)".
    model:     of the model; reference: of the reference, None where there is none or it is what the
               figure compares with.
    change:    model - reference, paired.
    higher:    whether more of it is better.
    """

    task: str
    name: str
    model: Estimate
    reference: Estimate | None = None
    change: Estimate | None = None
    higher: bool = False

    def to_json(self) -> dict[str, Any]:
        """All of it; estimates as `Estimate.to_json`."""
        return {
            "task": self.task,
            "name": self.name,
            "better": "higher" if self.higher else "lower",
            "model": self.model.to_json(),
            "reference": None if self.reference is None else self.reference.to_json(),
            "change": None if self.change is None else self.change.to_json(),
        }


@dataclass
class TokenScores:
    """Sums over the positions that count of each sample: one entry a sample.

    terms: positions. nll: of the true tokens, nats. hits: true tokens found likeliest.
    kl, same_top: against the reference; empty without one.
    """

    terms: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    same_top: list[float] = field(default_factory=list)


def token_figures(
    task: str, what: str, ours: TokenScores, theirs: TokenScores | None, seed: int = 0
) -> list[Figure]:
    """What is predicted as a distribution: words, or image codes. what: "token", "image code"."""
    figures = []
    for name, of, higher in (
        (f"NLL per {what} (nats)", "nll", False),
        (f"true {what} likeliest", "hits", True),
    ):
        reference = None if theirs is None else getattr(theirs, of)
        figures.append(
            _ratio(task, name, getattr(ours, of), reference, ours.terms, seed, higher=higher)
        )
    if ours.kl:
        divergence, sameness = agreement(what)
        kl = Estimate.ratio(ours.kl, ours.terms, seed=seed)
        same = Estimate.ratio(ours.same_top, ours.terms, seed=seed)
        figures.append(Figure(task, divergence, kl))
        figures.append(Figure(task, sameness, same, higher=True))
    return figures


def agreement(what: str) -> tuple[str, str]:
    """Names of the figures that need no truth: KL, and how often both find the same likeliest."""
    return f"KL per {what} (nats)", f"same likeliest {what}"


def answer_figures(
    answers: Sequence[str],
    expected: Sequence[str],
    theirs: Sequence[str] | None,
    seed: int = 0,
) -> list[Figure]:
    """Answers that were written: how many are right, and how many changed sides.

    A flip is an answer that is right of one model and wrong of the other (Dutta et al. 2024):
    accuracy can stay while many answers change.
    """
    right = _right(answers, expected)
    known = None if theirs is None else _right(theirs, expected)
    ones = [1.0] * len(right)
    figures = [_ratio("answer", "answers right", right, known, ones, seed, higher=True)]
    if known is not None and theirs is not None:
        flips = [abs(ours - other) for ours, other in zip(right, known)]
        words = [float(plain_words(a) != plain_words(b)) for a, b in zip(answers, theirs)]
        figures.append(Figure("answer", "answers flipped", Estimate.ratio(flips, ones, seed=seed)))
        changed = Estimate.ratio(words, ones, seed=seed)
        figures.append(Figure("answer", "answers in other words", changed))
    return figures


def speech_figures(
    heard: Sequence[str], spoken: Sequence[str], theirs: Sequence[str] | None, seed: int = 0
) -> list[Figure]:
    """Word error rate, of all words together; and of the model against the reference's words."""
    errors, words = _errors(heard, spoken)
    known = None if theirs is None else _errors(theirs, spoken)[0]
    figures = [_ratio("speech", "word error rate", errors, known, words, seed)]
    if theirs is not None and any(map(plain_words, theirs)):
        apart, counted = _errors(heard, theirs)
        rate = Estimate.ratio(apart, counted, seed=seed)
        figures.append(Figure("speech", "words changed", rate))
    return figures


def judged_figures(
    task: str,
    asked: Sequence[Mapping[str, str]],
    ours: Verdict,
    theirs: Verdict | None,
    seed: int = 0,
) -> list[Figure]:
    """Shares of pictures in which a judge sees what was asked for, by question, and all of it."""
    figures = []
    questions = [name for name in ours.answers if any(name in wanted for wanted in asked)]
    for question in questions:
        rows = [index for index, wanted in enumerate(asked) if question in wanted]
        right = _seen(rows, question, asked, ours)
        known = None if theirs is None else _seen(rows, question, asked, theirs)
        ones = [1.0] * len(rows)
        figures.append(_ratio(task, f"{question} right", right, known, ones, seed, higher=True))
    if len(questions) > 1:
        ours_all = _all_seen(asked, ours)
        known = None if theirs is None else _all_seen(asked, theirs)
        ones = [1.0] * len(ours_all)
        figures.append(_ratio(task, "all of it right", ours_all, known, ones, seed, higher=True))
    return figures


def distance_figures(
    task: str, ours: Verdict, theirs: Verdict | None, true: Verdict, seed: int = 0
) -> list[Figure]:
    """Frechet distances on a judge's features: to the true pictures, and to the reference's."""
    name = "Frechet distance to true pictures"
    own = _distance(ours, true, seed)
    figures = [Figure(task, name, own)]
    if theirs is not None:
        known = _distance(theirs, true, seed)
        figures = [Figure(task, name, own, known, _farther(ours, theirs, true, seed))]
        apart = _distance(ours, theirs, seed)
        figures.append(Figure(task, "Frechet distance to the reference's", apart))
    return figures


def decoder_figures(
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor] | None,
    true: Sequence[Tensor] | None,
    seed: int = 0,
) -> list[Figure]:
    """PSNR of pictures decoded from given codes, each [..., 3, rows, columns] in 0..1: to the true
    ones, and to the reference's."""
    figures = []
    ones = [1.0] * len(ours)
    if true is not None:
        name = "PSNR to true pictures (dB)"
        known = None if theirs is None else _psnrs(theirs, true)
        rows = _psnrs(ours, true)
        figures.append(_ratio("decoder", name, rows, known, ones, seed, higher=True))
    if theirs is not None:
        same = Estimate.ratio(_psnrs(ours, theirs), ones, seed=seed)
        name = "PSNR to the reference's pictures (dB)"
        figures.append(Figure("decoder", name, same, higher=True))
    return figures


def vector_figures(
    task: str,
    of: str,
    ours: Sequence[Tensor],
    expected: Sequence[Tensor],
    theirs: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> list[Figure]:
    """Vectors, one tensor [..., D] a sample: relative squared error, and cosine, to what is
    expected (true vectors, or the reference's). of: "true vectors", "the reference's vectors"."""
    figures = []
    ones = [1.0] * len(ours)
    for name, function, higher in (
        (f"relative error to {of}", relative_errors, False),
        (f"cosine to {of}", cosines, True),
    ):
        values = [function(a[None], b[None])[0] for a, b in zip(ours, expected)]
        known = (
            None
            if theirs is None
            else [function(a[None], b[None])[0] for a, b in zip(theirs, expected)]
        )
        figures.append(_ratio(task, name, values, known, ones, seed, higher=higher))
    return figures


def share_figure(
    task: str, name: str, equal: Sequence[float], counted: Sequence[float], seed: int = 0
) -> Figure:
    """How much agrees with the reference, of how much: one entry a sample of each."""
    return Figure(task, name, Estimate.ratio(equal, counted, seed=seed), higher=True)


# -- parts -----------------------------------------------------------------------------------------


def _ratio(
    task: str,
    name: str,
    ours: Sequence[float],
    theirs: Sequence[float] | None,
    counted: Sequence[float],
    seed: int,
    higher: bool = False,
) -> Figure:
    model = Estimate.ratio(ours, counted, seed=seed)
    if theirs is None:
        return Figure(task, name, model, higher=higher)
    reference = Estimate.ratio(theirs, counted, seed=seed)
    change = Estimate.ratio_change(ours, theirs, counted, seed=seed)
    return Figure(task, name, model, reference, change, higher)


def _psnrs(pictures: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    return [psnr(a[None], b[None])[0] for a, b in zip(pictures, expected, strict=True)]


def _right(answers: Sequence[str], expected: Sequence[str]) -> list[float]:
    pairs = zip(answers, expected, strict=True)
    return [float(same_answer(given, wanted)) for given, wanted in pairs]


def _errors(heard: Sequence[str], spoken: Sequence[str]) -> tuple[list[float], list[float]]:
    """(errors, words) of each text."""
    counts = [word_errors(given, wanted) for given, wanted in zip(heard, spoken, strict=True)]
    return [float(errors) for errors, _ in counts], [float(words) for _, words in counts]


def _seen(
    rows: Sequence[int], question: str, asked: Sequence[Mapping[str, str]], verdict: Verdict
) -> list[float]:
    return [float(verdict.answers[question][row] == asked[row][question]) for row in rows]


def _all_seen(asked: Sequence[Mapping[str, str]], verdict: Verdict) -> list[float]:
    """Of each picture that something is asked of, whether all of it is seen."""
    return [
        float(all(verdict.answers[question][row] == word for question, word in wanted.items()))
        for row, wanted in enumerate(asked)
        if wanted
    ]


def _distance(first: Verdict, second: Verdict, seed: int) -> Estimate:
    """The same samples are drawn of both: pictures of one prompt belong together."""
    one, two = _features(first), _features(second)
    return Estimate.bootstrap(
        lambda drawn: frechet_distance(one[drawn], two[drawn]), len(one), seed=seed, draws=100
    )


def _farther(ours: Verdict, theirs: Verdict, true: Verdict, seed: int) -> Estimate:
    """How much farther from the truth ours are than theirs, on the same samples."""
    one, two, three = _features(ours), _features(theirs), _features(true)
    return Estimate.bootstrap(
        lambda drawn: (
            frechet_distance(one[drawn], three[drawn]) - frechet_distance(two[drawn], three[drawn])
        ),
        len(one),
        seed=seed,
        draws=100,
    )


def _features(verdict: Verdict) -> Matrix:
    found: Matrix = verdict.features.double().numpy()
    return found
