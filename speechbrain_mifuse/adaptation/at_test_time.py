"""Test-time adaptation: TENT, T3A, LAME. They ask no language model and train no student.

TENT and T3A adapt on the adaptation set here, as every method does, and the test recordings are answered one by one;
LAME has nothing to keep and looks at all test recordings together.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from speechbrain_mifuse.adaptation.fusion import FLOOR
from speechbrain_mifuse.adaptation.method import AdaptationMethod, Survey
from speechbrain_mifuse.adaptation.nrc import nearest
from speechbrain_mifuse.adaptation.uncertainty import entropy


class Tent(AdaptationMethod):
    """TENT (Wang et al. 2021): scale and shift of the normalization learned by minimizing the entropy.

    The paper's: target statistics (pass `target_statistics=True`), entropy of the predictions, Adam at 0.001, all
    other weights fixed. Adapted to this harness: the statistics are those of the whole adaptation set and not of each
    batch; batches are drawn from it in a fixed order. `steps` is the number of updates that the paper takes on
    CIFAR-10-C (10,000 images, 200 at a time); more of them collapse.

    Parameters
    ----------
    learning_rate : float
        Of Adam.
    steps : int
        Updates.
    batch_size : int
        Recordings per update.

    Example
    -------
    >>> from speechbrain_mifuse.adaptation.method import Outputs
    >>> vectors, silent = torch.tensor([[0.2, 0.0], [0.0, 0.2]]), torch.zeros(2, 1, 2)
    >>> outputs = Outputs(vectors, vectors, vectors, head=lambda vectors: vectors)
    >>> survey = Survey(silent, silent.bool().any(2), classifier=lambda: None, student=lambda: outputs)
    >>> method = Tent()
    >>> method.start(survey)
    >>> bool((entropy(method.predict(survey)) < entropy(outputs.probs)).all())
    True
    """

    trains = False
    answers_for = ()

    def __init__(self, learning_rate: float = 0.001, steps: int = 50, batch_size: int = 64, **options: bool):
        super().__init__(**options)
        self.learning_rate, self.steps, self.batch_size = learning_rate, steps, batch_size

    def start(self, survey: Survey) -> None:
        """Learn scale and shift; see `AdaptationMethod.start`."""
        student = survey.student()
        scale = torch.ones_like(student.vectors[0], requires_grad=True)
        shift = torch.zeros_like(scale, requires_grad=True)
        optimizer, order = torch.optim.Adam([scale, shift], self.learning_rate), torch.Generator().manual_seed(0)
        for _ in range(self.steps):
            batch = student.vectors[torch.randperm(len(student.vectors), generator=order)[: self.batch_size]]
            loss = entropy(student.head(batch * scale + shift).softmax(-1)).mean()
            # Not `backward`, which would leave gradients in the classifier's own weights.
            scale.grad, shift.grad = torch.autograd.grad(loss, (scale, shift))
            optimizer.step()
        self.state = {"scale": scale.detach(), "shift": shift.detach()}

    def predict(self, test: Survey) -> torch.Tensor:
        """Classify normalized vectors after scale and shift; see `AdaptationMethod.predict`."""
        student = test.student()
        return student.head(student.vectors * self.state["scale"] + self.state["shift"]).softmax(-1).detach()


class T3a(AdaptationMethod):
    """T3A (Iwasawa & Matsuo 2021): each class's output weights replaced by a mean of confident recordings.

    The paper's: hidden units of recordings, by predicted class, support the class's own output weights; of each class
    the least uncertain M count; all are normalized, and the class is that of the largest product with the mean.
    Adapted to this harness: the supports are those of the adaptation set and no longer change at test; the output
    weights always count; M is one of the values that the paper tries, fixed in advance.

    Parameters
    ----------
    supports : int
        M.

    Example
    -------
    >>> from speechbrain_mifuse.adaptation.method import Outputs
    >>> hidden, silent = torch.tensor([[3.0, 1.0], [1.0, 3.0]]), torch.zeros(2, 1, 2)
    >>> outputs = Outputs(hidden, hidden, hidden, templates=torch.eye(2))
    >>> survey = Survey(silent, silent.bool().any(2), classifier=lambda: None, student=lambda: outputs)
    >>> method = T3a()
    >>> method.start(survey)
    >>> method.predict(survey).argmax(1).tolist()
    [0, 1]
    """

    trains = False
    answers_for = ()

    def __init__(self, supports: int = 20, **options: bool):
        super().__init__(**options)
        self.supports = supports

    def start(self, survey: Survey) -> None:
        """Find each class's mean; see `AdaptationMethod.start`."""
        student = survey.student()
        predicted, unsure = student.probs.argmax(1), entropy(student.probs)
        means = []
        for label, template in enumerate(student.templates):
            rows = torch.nonzero(predicted == label).flatten()
            rows = rows[unsure[rows].argsort()[: self.supports]]
            means.append(F.normalize(torch.cat([template.unsqueeze(0), student.hidden[rows]]), dim=1).mean(0))
        self.state = {"means": F.normalize(torch.stack(means), dim=1)}

    def predict(self, test: Survey) -> torch.Tensor:
        """Softmax of the products of hidden units and means; see `AdaptationMethod.predict`."""
        return (test.student().hidden @ self.state["means"].T).softmax(-1)


class Lame(AdaptationMethod):
    """LAME (Boudiaf et al. 2022): predictions of all test recordings drawn towards those of their neighbours.

    The paper's: `z_n` proportional to `p_n * exp(sum_k w_nk z_k)` until nothing changes, with w = 1 for the nearest
    neighbours in the space of hidden units and 0 otherwise. It changes no weight and uses no adaptation set.
    Transductive: an answer depends on the other test recordings.

    Parameters
    ----------
    neighbours : int
        K.
    rounds : int
        Iterations, at most.

    Example
    -------
    >>> from speechbrain_mifuse.adaptation.method import Outputs
    >>> hidden, silent = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2]]), torch.zeros(3, 1, 2)
    >>> outputs = Outputs(hidden, hidden, torch.tensor([[2.0, 0.0], [0.0, 0.5], [2.0, 0.0]]))
    >>> survey = Survey(silent, silent.bool().any(2), classifier=lambda: None, student=lambda: outputs)
    >>> Lame(neighbours=2).predict(survey).argmax(1).tolist()
    [0, 0, 0]
    """

    trains = False
    transductive = True
    answers_for = ()

    def __init__(self, neighbours: int = 5, rounds: int = 100, **options: bool):
        super().__init__(**options)
        self.neighbours, self.rounds = neighbours, rounds

    def predict(self, test: Survey) -> torch.Tensor:
        """Iterate over the whole set; see `AdaptationMethod.predict`."""
        student = test.student()
        rows = torch.arange(len(student.hidden), device=student.hidden.device)
        near = nearest(F.normalize(student.hidden, dim=1), rows, self.neighbours)
        own, agreed = student.probs.clamp(min=FLOOR).log(), student.probs
        for _ in range(self.rounds):
            before, agreed = agreed, (own + agreed[near].sum(1)).softmax(-1)
            if torch.allclose(before, agreed, atol=1e-6):
                break
        return agreed
