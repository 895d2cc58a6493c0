"""What can be said of an adaptation without a label: agreement, spread over the classes, certainty, and warnings.

All of it is weak evidence. None of these scores is known to agree with the accuracy on the target; they can show that
something went wrong, and never that it went right. Ours, no paper's: the thresholds are round numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from speechbrain_mifuse.adaptation.selection import criteria
from speechbrain_mifuse.adaptation.uncertainty import entropy
from speechbrain_mifuse.evaluation.aggregate import Table
from speechbrain_mifuse.evaluation.metrics import kappa
from speechbrain_mifuse.utils.texts import markdown

# Recordings below which shares say little.
FEW = 50
# Share of recordings that the teacher should have answered.
ANSWERED = 0.8
# Cohen's kappa of two teachers that hardly share anything.
UNRELATED = 0.1
# Share of answers that changed: more than most, and next to none.
MOST, NONE = 0.65, 0.01
# A class is lost when the student gives it to fewer than the first, though a teacher gives it to more than the second.
LOST, HEARD = 0.01, 0.05
# One class for nearly everything.
ONE_CLASS = 0.8
# Mean entropy, of the greatest possible, from which answers mean next to nothing.
UNDECIDED = 0.9

CAVEAT = (
    "Scores without labels are weak signs: they can show that something went wrong, never that the adaptation helped. "
    "To know, label some of the recordings in a labels.csv and run again: those speakers are then scored."
)

SCORED = "Some recordings have labels, and results.md says how each did on them; what is said without labels is weak."
# What follows where one is better than the student.
INSTEAD = {"source": "keep the source", "teacher": "asking the teacher is better"}


def scored(verdict: Mapping, accuracy: Mapping[str, float]) -> dict:
    """Add to a verdict what labels say, where there are some."""
    worse = [
        f"On the labelled recordings the student has UA {100 * accuracy['student']:.1f} %, the {name} "
        f"{100 * accuracy[name]:.1f} %: {instead}."
        for name, instead in INSTEAD.items()
        if accuracy[name] > accuracy["student"]
    ]
    return {**verdict, "warnings": [*worse, *verdict["warnings"]], "caveat": SCORED}


def judge(student: torch.Tensor, source: torch.Tensor, teacher: torch.Tensor, labels: Sequence[str]) -> dict:
    """Compare a student with both of its teachers on recordings without labels.

    Parameters
    ----------
    student, source, teacher : torch.Tensor
        `[N, C]`, probabilities after adaptation, before it, and of the language model (mean of its answers; an all-zero
        row is no answer).
    labels : sequence of str
        The C classes.

    Returns
    -------
    dict
        `figures` (shares in [0, 1], agreement as Cohen's kappa), `warnings` (sentences) and `caveat`.

    Example
    -------
    >>> source = torch.tensor([[0.9, 0.1], [0.1, 0.9]] * 30)
    >>> judge(student=source, source=source, teacher=source, labels=["angry", "sad"])["warnings"]
    ['0 % of the answers changed: adaptation did next to nothing.']
    """
    said = teacher.sum(1) > 0
    chosen = {"student": student.argmax(1), "source": source.argmax(1), "teacher": teacher.argmax(1)}
    figures = {
        "recordings": len(student),
        "answered_by_teacher": float(said.double().mean()),
        "changed": float((chosen["student"] != chosen["source"]).double().mean()),
        "agreement": {
            "student_source": _agreement(chosen["student"], chosen["source"], len(labels)),
            "student_teacher": _agreement(chosen["student"][said], chosen["teacher"][said], len(labels)),
            "source_teacher": _agreement(chosen["source"][said], chosen["teacher"][said], len(labels)),
        },
        "class_shares": {
            "student": shares(chosen["student"], labels),
            "source": shares(chosen["source"], labels),
            "teacher": shares(chosen["teacher"][said], labels),
        },
        "certainty": 1 - float(entropy(student).mean()) / float(torch.tensor(len(labels)).log()),
    }
    if len(student) > 1:
        figures["criteria"] = {"student": criteria(student), "source": criteria(source)}
    return {"figures": figures, "warnings": warnings(figures), "caveat": CAVEAT}


def warnings(figures: Mapping) -> list[str]:
    """Say what may have gone wrong."""
    agreement, changed = figures["agreement"], figures["changed"]
    found = [
        (
            figures["recordings"] < FEW,
            f"Only {figures['recordings']} recordings: shares and agreement below say little.",
        ),
        (
            figures["answered_by_teacher"] < ANSWERED,
            f"The teacher answered {100 * figures['answered_by_teacher']:.0f} % of the recordings; the others were "
            "adapted to without it.",
        ),
        (
            agreement["source_teacher"] < UNRELATED,
            f"Source and teacher hardly agree more than by chance (kappa {agreement['source_teacher']:.2f}): one of "
            "them may be of no use on these recordings.",
        ),
        *[
            (
                agreement[f"student_{who}"] < agreement["source_teacher"],
                f"The student agrees with the {who} (kappa {agreement[f'student_{who}']:.2f}) less than its two "
                f"teachers do with each other ({agreement['source_teacher']:.2f}): it may have gone astray.",
            )
            for who in ("source", "teacher")
        ],
        (
            changed > MOST,
            f"{100 * changed:.0f} % of the answers changed, and nothing here tells whether for the better.",
        ),
        (changed < NONE, f"{100 * changed:.0f} % of the answers changed: adaptation did next to nothing."),
        (figures["certainty"] < 1 - UNDECIDED, "The student is nearly undecided about everything."),
    ]
    return [message for applies, message in found if applies] + collapse(figures["class_shares"])


def collapse(class_shares: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Say which classes the student lost, and whether one took nearly everything."""
    found = []
    student, teachers = class_shares["student"], (class_shares["source"], class_shares["teacher"])
    for label, share in student.items():
        heard = max(teacher[label] for teacher in teachers)
        if share < LOST and heard > HEARD:
            seldom = "never" if share == 0 else "hardly ever"
            found.append(f"The student {seldom} says '{label}', which a teacher gives to {100 * heard:.0f} % of them.")
    largest = max(student, key=student.get)
    if student[largest] > ONE_CLASS and student[largest] > max(max(teacher.values()) for teacher in teachers):
        share = 100 * student[largest]
        found.append(
            f"{share:.0f} % of the recordings are '{largest}' for the student: it may have collapsed to one class."
        )
    return found


def _agreement(one: torch.Tensor, other: torch.Tensor, n_classes: int) -> float:
    found = kappa(one, other, n_classes) if len(one) else 0.0
    return 1.0 if found is None else found


def shares(chosen: torch.Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Share of each class."""
    counts = torch.bincount(chosen, minlength=len(labels)).double() / max(len(chosen), 1)
    return dict(zip(labels, counts.tolist(), strict=True))


def verdict_text(verdict: Mapping) -> str:
    """Put a verdict into words."""
    figures, found = verdict["figures"], verdict["warnings"]
    agreement, by = figures["agreement"], figures["class_shares"]
    rows = [[who, *(f"{100 * share:.0f} %" for share in row.values())] for who, row in by.items()]
    lines = [
        "# Signs without labels",
        "",
        f"{figures['recordings']} recordings; the teacher answered {100 * figures['answered_by_teacher']:.0f} %; "
        f"{100 * figures['changed']:.0f} % of the source's answers changed.",
        f"Agreement beyond chance (kappa): student with source {agreement['student_source']:.2f}, student with teacher "
        f"{agreement['student_teacher']:.2f}, source with teacher {agreement['source_teacher']:.2f}.",
        "",
        Table(["share of", *by["student"]], rows).markdown(),
        "Signs that something went wrong:" if found else "No warning sign. That is no proof that it helped.",
        *(f"- {markdown(line)}" for line in found),
        "",
        verdict["caveat"],
    ]
    return "\n".join(lines) + "\n"
