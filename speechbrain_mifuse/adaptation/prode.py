"""ProDe (Tang et al. 2025): correct the teacher by how far adaptation has moved the classifier."""

from __future__ import annotations

import torch

from speechbrain_mifuse.adaptation.method import AdaptationMethod, Survey, Teachers


def denoised(
    teacher: torch.Tensor, current: torch.Tensor, source: torch.Tensor, omega: float, floor: float
) -> torch.Tensor:
    """`softmax(log p_teacher + omega (log p_current - log p_source))`.

    Parameters
    ----------
    teacher, current, source : torch.Tensor
        `[B, C]`, distributions.
    omega : float
        Strength of the correction.
    floor : float
        Least probability that counts: bounds what one zero can do.

    Returns
    -------
    torch.Tensor
        `[B, C]`.

    Example
    -------
    >>> teacher, flat = torch.tensor([[0.5, 0.5]]), torch.full((1, 2), 0.5)
    >>> print(denoised(teacher, torch.tensor([[0.8, 0.2]]), flat, omega=1.0, floor=0.001))
    tensor([[0.8000, 0.2000]])
    """
    teacher, current, source = (p.clamp(min=floor).log() for p in (teacher, current, source))
    return (teacher + omega * (current - source)).softmax(-1)


class Prode(AdaptationMethod):
    """ProDe: the language model's answer, shifted by what adaptation has taught the classifier so far.

    The paper's, in the line of DIFO (Tang et al. 2024): proxy denoising, `log p_teacher + omega (log p_current - log
    p_source)` with omega = 1, where the teacher is a vision-language model. Adapted to this harness: the teacher is the
    language model's mean distribution; `p_current` is the EMA classifier's (in the paper it is the student's own, which
    collapsed in our trials); probabilities are bounded below; cross-entropy to the corrected label and the diversity
    term, everyone's loss here, take the place of the paper's mutual information with the proxy; prompts cannot be tuned
    through an API. An utterance without answer is left to the EMA classifier.

    Parameters
    ----------
    diversity_weight : float
        lambda.
    omega : float
        Strength of the correction.
    floor : float
        Least probability that counts: about what five answers and sixteen passes can tell from none.

    Example
    -------
    >>> method = Prode()
    >>> method.state["source"] = torch.tensor([[0.5, 0.5]])
    >>> answers, moved = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.8, 0.2]]])
    >>> answered = torch.ones(1, 1, dtype=torch.bool)
    >>> print(method.targets(Teachers(answers, answered, lambda: moved, rows=torch.tensor([0]))))
    tensor([[0.8000, 0.2000]])
    """

    def __init__(self, diversity_weight: float = 1.0, omega: float = 1.0, floor: float = 0.01, **options: bool):
        super().__init__(diversity_weight, **options)
        self.omega, self.floor = omega, floor

    def start(self, survey: Survey) -> None:
        """Keep what the source classifier says of each utterance; see `AdaptationMethod.start`."""
        self.state = {"source": survey.classifier().mean(1)}

    def targets(self, teachers: Teachers) -> torch.Tensor:
        """Corrected answers of the language model; see `AdaptationMethod.targets`."""
        current, source = teachers.classifier().mean(1), self.state["source"][teachers.rows]
        corrected = denoised(teachers.lalm_mean, current, source, self.omega, self.floor)
        return torch.where(teachers.lalm_available.unsqueeze(1), corrected, current)
