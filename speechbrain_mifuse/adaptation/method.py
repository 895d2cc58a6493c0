"""What every adaptation method is: targets from teachers, a loss, and hooks for what looks at the whole set."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from speechbrain_mifuse.adaptation.fusion import diversity, prior_corrected, soft_cross_entropy
from speechbrain_mifuse.adaptation.uncertainty import masked_mean

# Parameters that every method takes.
OPTIONS = ("target_statistics", "prior_correction", "test_mean")


@dataclass(frozen=True)
class Outputs:
    """What the student says of some utterances.

    Parameters
    ----------
    vectors : torch.Tensor
        `[N, 2 D]`, pooled and normalised.
    hidden : torch.Tensor
        `[N, H]`, hidden units before dropout.
    logits : torch.Tensor
        `[N, C]`; of a training step with dropout, of a whole set without.
    head : callable, optional
        From vectors to logits, dropout as in `logits`.
    templates : torch.Tensor, optional
        `[C, H]`, weights of the output layer: what each class is compared with.

    Example
    -------
    >>> Outputs(torch.zeros(2, 8), torch.zeros(2, 3), torch.zeros(2, 4)).probs[0].tolist()
    [0.25, 0.25, 0.25, 0.25]
    """

    vectors: torch.Tensor
    hidden: torch.Tensor
    logits: torch.Tensor
    head: Callable[[torch.Tensor], torch.Tensor] | None = None
    templates: torch.Tensor | None = None

    @property
    def probs(self) -> torch.Tensor:
        """`[N, C]`, softmax of the logits."""
        return self.logits.softmax(-1)


@dataclass(frozen=True)
class Teachers:
    """What the teachers say of one batch.

    Parameters
    ----------
    lalm : torch.Tensor
        `[B, K_L, C]`, stored answers of the audio language model.
    lalm_mask : torch.Tensor
        `[B, K_L]`, bool: which answers are samples.
    classifier : callable
        Gives `[B, K_S, C]`, Monte-Carlo dropout predictions of the EMA classifier. A function, so that a method that
        does not use them does not pay for them.
    reference : torch.Tensor, optional
        `[B]`, class indices; only given to a method with `uses_labels`.
    rows : torch.Tensor, optional
        `[B]`, place of each utterance in the adaptation set: where a method that remembers something finds it.
    lalm_prior : torch.Tensor, optional
        `[C]`, average of the language model's means over the adaptation set; given to a method with `prior_correction`.

    Example
    -------
    >>> answers, answered = torch.ones(2, 5, 4) / 4, torch.ones(2, 5, dtype=torch.bool)
    >>> teachers = Teachers(answers, answered, classifier=lambda: torch.ones(2, 16, 4) / 4)
    >>> teachers.lalm_mean.shape, teachers.lalm_available.tolist()
    (torch.Size([2, 4]), [True, True])
    """

    lalm: torch.Tensor
    lalm_mask: torch.Tensor
    classifier: Callable[[], torch.Tensor]
    reference: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    lalm_prior: torch.Tensor | None = None

    @property
    def lalm_mean(self) -> torch.Tensor:
        """`[B, C]`, mean of the answers that are samples, divided by its prior if there is one."""
        mean = masked_mean(self.lalm, self.lalm_mask)
        return mean if self.lalm_prior is None else prior_corrected(mean, self.lalm_prior)

    def lalm_smoothed(self, pseudo: torch.Tensor) -> torch.Tensor:
        """`[B, C]`, the same with some answers that say nothing; see `masked_mean`."""
        return masked_mean(self.lalm, self.lalm_mask, pseudo)

    def lalm_average(self, pseudo: torch.Tensor) -> torch.Tensor:
        """`[C]`, average of `lalm_smoothed` over the utterances with an answer: what the language model prefers."""
        return masked_mean(self.lalm_smoothed(pseudo).unsqueeze(0), self.lalm_available.unsqueeze(0))[0]

    @property
    def lalm_available(self) -> torch.Tensor:
        """`[B]`, bool: whether there is any."""
        return self.lalm_mask.any(1)


@dataclass(frozen=True)
class Survey(Teachers):
    """What teachers and student say of a whole set, `rows` being 0 to N - 1.

    Only an upper bound, which declares `uses_labels`, finds a `reference`, and only that of the adaptation set.

    Parameters
    ----------
    lalm, lalm_mask, classifier, reference, rows, lalm_prior
        As for `Teachers`, with N in the place of B.
    student : callable
        Gives the `Outputs` of the student as it is now, in evaluation mode and without gradient. Each call goes through
        the whole set.

    Example
    -------
    >>> silent, outputs = torch.zeros(2, 5, 4), Outputs(torch.zeros(2, 8), torch.zeros(2, 3), torch.zeros(2, 4))
    >>> survey = Survey(silent, silent.bool().any(2), lambda: silent, student=lambda: outputs)
    >>> survey.student().logits.shape
    torch.Size([2, 4])
    """

    student: Callable[[], Outputs] = field(kw_only=True)


class AdaptationMethod:
    """Base of the methods: a student trained towards soft targets, kept from collapse by the diversity term.

    A new method is a subclass, most often with `targets` alone, and one line in the recipe's YAML. A method keeps the
    parameters of its constructor under their own names: `describe` tells a finished run from one of other settings by
    them.

    Parameters
    ----------
    diversity_weight : float
        lambda.
    target_statistics : bool
        Take the batch-normalization statistics of the adaptation set before anything else (AdaBN, Li et al. 2017).
        Otherwise the classifier starts with those of its own corpus, and training replaces them little by little.
    prior_correction : bool
        Divide the language model's means by their average over the adaptation set; in a method that does not ask the
        language model, divide the method's own answers by theirs. Both assume classes of comparable size.
    test_mean : bool
        Move the mean of the test set's pooled vectors onto that of the adaptation set before the method answers. Makes
        the method transductive, and assumes that the test set holds the classes in similar shares.

    Attributes
    ----------
    trains : bool
        Whether there is anything to train; otherwise the method is the starting point or the teacher itself.
    uses_labels : bool
        Whether it is given the target's labels: true for the upper bound alone.
    transductive : bool
        Whether the answer to one test recording depends on the others.
    answers_for : tuple of str
        Which sets the language model is asked about: `adapt`, `test`, both or none.
    frozen : tuple of str
        Parts of the student that stay as they came, such as `output`.
    refreshes : int
        How often in a run `refresh` is called, at even distances, the first time before the first step. Where epochs
        are short it is called before whole ones, so their number rounds it (30 becomes 19 to 34 on the open corpora).
    state : dict of str to torch.Tensor
        All that the method remembers from one step to the next. It is saved with each checkpoint, and emptied before
        `start`.
    statistics : dict of str to float
        What the log shows of the last batch.

    Example
    -------
    >>> method = AdaptationMethod(diversity_weight=1.0)
    >>> student = Outputs(torch.zeros(2, 8), torch.zeros(2, 3), torch.zeros(2, 4))
    >>> round(float(method.loss(student, torch.ones(2, 4) / 4)), 4)
    0.0
    """

    trains = True
    uses_labels = False
    transductive = False
    answers_for: tuple[str, ...] = ("adapt",)
    frozen: tuple[str, ...] = ()
    refreshes = 0

    def __init__(
        self,
        diversity_weight: float = 1.0,
        *,
        target_statistics: bool = False,
        prior_correction: bool = False,
        test_mean: bool = False,
    ):
        self.diversity_weight = diversity_weight
        self.target_statistics, self.prior_correction = target_statistics, prior_correction
        self.test_mean = test_mean
        self.state: dict[str, torch.Tensor] = {}
        self.statistics: dict[str, float] = {}

    def start(self, survey: Survey) -> None:
        """Look at the adaptation set once, before the first step: the student still is the source.

        Parameters
        ----------
        survey : Survey
            Of the adaptation set.
        """

    def refresh(self, survey: Survey) -> None:
        """Look at the adaptation set anew, `refreshes` times per run.

        Parameters
        ----------
        survey : Survey
            Of the adaptation set.
        """

    # What `consensus` is, for the model card.
    consensus_told = "the mean of what both teachers say"

    def consensus(self, survey: Survey, source: torch.Tensor) -> torch.Tensor:
        """Put together what the two teachers say: the exported student's temperature makes it as certain as that.

        A student learns to be as certain as its targets, which are often more certain than right. Two teachers that
        were trained apart disagree where they are wrong, so their mean is less certain; no label is needed for it.

        Parameters
        ----------
        survey : Survey
            Of the adaptation set, after training.
        source : torch.Tensor
            `[N, C]`, the student's probabilities before training: the source classifier's.

        Returns
        -------
        torch.Tensor
            `[N, C]`.
        """
        return (survey.lalm_mean + source) / 2

    def targets(self, teachers: Teachers) -> torch.Tensor:
        """Soft labels of a batch, found before the student's own pass.

        Parameters
        ----------
        teachers : Teachers
            What the teachers say.

        Returns
        -------
        torch.Tensor
            `[B, C]`; all-zero rows carry no loss. A method with a loss of its own may hand that something else.
        """
        raise NotImplementedError

    def loss(self, student: Outputs, targets: torch.Tensor) -> torch.Tensor:
        """`CE(q, p) + lambda sum_c pbar_c log pbar_c`.

        Parameters
        ----------
        student : Outputs
            Of the batch.
        targets : torch.Tensor
            What `targets` gave.

        Returns
        -------
        torch.Tensor
            Scalar.
        """
        return soft_cross_entropy(student.logits, targets) + self.diversity_weight * diversity(student.logits)

    def predict(self, test: Survey) -> torch.Tensor:
        """Answer for the test set; by default the student does.

        Parameters
        ----------
        test : Survey
            Of the test set.

        Returns
        -------
        torch.Tensor
            `[N, C]`; an all-zero row is no answer.
        """
        return test.student().probs

    def describe(self) -> dict:
        """Class and constructor parameters: what, beside data and schedule, decides the outcome.

        Returns
        -------
        dict
            Of JSON's types; `method` is the class, `method.<parameter>` each parameter, and functions are named with
            the keywords they are bound to.

        Example
        -------
        >>> AdaptationMethod(0.5).describe()
        {'method': 'speechbrain_mifuse.adaptation.method.AdaptationMethod', 'method.diversity_weight': 0.5}
        """
        default = {name: False for name in OPTIONS}
        always = set()
        for each in inspect.signature(type(self)).parameters.values():
            if each.kind is each.KEYWORD_ONLY:
                # Counts only where it was chosen: results from before it was added stay valid.
                default[each.name] = each.default
            elif each.kind is not each.VAR_KEYWORD:
                always.add(each.name)
        names = sorted(always | {name for name, value in default.items() if getattr(self, name) != value})
        chosen = [described(f"method.{name}", getattr(self, name)) for name in names]
        return {"method": qualified(type(self))} | {key: value for part in chosen for key, value in part.items()}

    def traits(self) -> dict[str, str]:
        """Say what a table of methods must say of this one.

        Returns
        -------
        dict of str to str
            `training`; which sets the language model is `asked` about; whose `statistics` normalize the vectors;
            what has a `prior_correction`; whether it is `transductive`, seeing the test recordings together.

        Example
        -------
        >>> AdaptationMethod(target_statistics=True).traits()["statistics"]
        'target'
        """
        return {
            "training": ("labels" if self.uses_labels else "yes") if self.trains else "no",
            "asked": " and ".join(self.answers_for) or "no",
            "statistics": "target" if self.target_statistics else "source to target" if self.trains else "source",
            "prior_correction": self.corrected if self.prior_correction else "no",
            "transductive": "yes" if self.transductive or self.test_mean else "no",
        }

    @property
    def uses_adaptation_set(self) -> bool:
        """Whether anything depends on the adaptation set: training, answers about it, or its statistics."""
        return self.trains or "adapt" in self.answers_for or self.target_statistics or self.prior_correction

    @property
    def corrects_answers(self) -> bool:
        """Whether `prior_correction` concerns the method's own answers."""
        return self.prior_correction and "adapt" not in self.answers_for

    @property
    def corrected(self) -> str:
        """What `prior_correction` divides by its average, in words."""
        return "answers" if self.corrects_answers else "language model"


def qualified(thing: Callable) -> str:
    """Name a function or class by its module and place in it.

    Parameters
    ----------
    thing : callable
        With `__qualname__`.

    Returns
    -------
    str
        Its full name.

    Example
    -------
    >>> qualified(AdaptationMethod)
    'speechbrain_mifuse.adaptation.method.AdaptationMethod'
    """
    return f"{thing.__module__}.{thing.__qualname__}"


def described(name: str, value) -> dict:
    """Say what a parameter is in JSON's types.

    Parameters
    ----------
    name : str
        Key.
    value
        A value of JSON's types, a function, or a `functools.partial` of one with keywords.

    Returns
    -------
    dict
        One entry, and one more for each keyword of a partial.

    Example
    -------
    >>> described("weight", functools.partial(soft_cross_entropy, targets=1.0))
    {'weight': 'speechbrain_mifuse.adaptation.fusion.soft_cross_entropy', 'weight.targets': 1.0}
    """
    if isinstance(value, functools.partial):
        bound: Mapping = {**dict(enumerate(value.args)), **value.keywords}
        inner = [described(f"{name}.{key}", part) for key, part in bound.items()]
        return described(name, value.func) | {key: part for found in inner for key, part in found.items()}
    return {name: qualified(value) if callable(value) else value}
