"""How the target's own recordings lie: a class expert fitted on soft labels in the space of pooled frames.

All of it is ours. None of it needs a label: soft labels come from the teachers.
"""

from __future__ import annotations

import torch

# Groups that utterances are dealt to folds in: more would take long on large sets, and separate no better.
MOST_GROUPS = 128


def principal_components(vectors: torch.Tensor, size: int) -> torch.Tensor:
    """Project vectors on the directions in which they differ most.

    Parameters
    ----------
    vectors : torch.Tensor
        `[N, D]`.
    size : int
        Directions kept; never more than `min(N, D)`.

    Returns
    -------
    torch.Tensor
        `[N, size]`, centred.

    Example
    -------
    >>> vectors = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.0, 1.0], [4.0, 0.0, 1.0]])
    >>> principal_components(vectors, 1).abs().round(decimals=4).flatten().tolist()
    [2.0, 0.0, 2.0]
    """
    centred = vectors - vectors.mean(0)
    return centred @ principal_directions(vectors, size).T


def principal_directions(vectors: torch.Tensor, size: int) -> torch.Tensor:
    """Give the orthonormal directions in which vectors differ most.

    Parameters
    ----------
    vectors : torch.Tensor
        `[N, D]`.
    size : int
        Directions, at most.

    Returns
    -------
    torch.Tensor
        `[size, D]`.

    Example
    -------
    >>> vectors = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.0, 1.0], [4.0, 0.0, 1.0]])
    >>> principal_directions(vectors, 1).abs().round(decimals=4).tolist()
    [[1.0, 0.0, 0.0]]
    """
    return torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False).Vh[:size]


def neighbourhoods(vectors: torch.Tensor, count: int, rounds: int = 30) -> torch.Tensor:
    """Group vectors that lie together: k-means, always the same for the same vectors.

    Made for many groups of large sets, on any device, in which no group matters; `features.speakers.cluster` looks for
    the tightest few.

    Parameters
    ----------
    vectors : torch.Tensor
        `[N, D]`.
    count : int
        Groups, at most.
    rounds : int
        Iterations.

    Returns
    -------
    torch.Tensor
        `[N]`, number of each one's group.

    Example
    -------
    >>> found = neighbourhoods(torch.tensor([[0.0], [9.0], [0.1], [9.1]]), 2)
    >>> [int(found[0] == other) for other in found]
    [1, 0, 1, 0]
    """
    drawn = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:count]
    centres = vectors[drawn.to(vectors.device)]
    for _ in range(rounds):
        found = torch.cdist(vectors, centres).argmin(1)
        sizes = found.bincount(minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, found, vectors)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return found


def dealt_folds(vectors: torch.Tensor, folds: int, together: int) -> torch.Tensor:
    """Deal utterances to folds, those that lie together to the same one.

    Takes of one sentence lie together whatever their emotion. In different folds they would judge each other, and
    confirm each other's mistakes.

    Parameters
    ----------
    vectors : torch.Tensor
        `[N, D]`.
    folds : int
        Folds, at most.
    together : int
        How many utterances a group holds on average; 1 deals each by itself, at random.

    Returns
    -------
    torch.Tensor
        `[N]`, fold of each; always the same for the same vectors.

    Example
    -------
    >>> dealt_folds(torch.tensor([[0.0], [9.0], [0.1], [9.1]]), folds=2, together=2).bincount().tolist()
    [2, 2]
    """
    if together == 1:
        groups = torch.arange(len(vectors))
    else:
        groups = neighbourhoods(vectors, min(max(len(vectors) // together, folds), MOST_GROUPS)).cpu()
    # Neighbours in the manifest, too, are often takes of one sentence: dealt at random, but always alike.
    order = torch.randperm(int(groups.max()) + 1, generator=torch.Generator().manual_seed(0))
    return (order[groups] % folds).to(vectors.device)


def trusted_shares(estimated: torch.Tensor, trust: float) -> torch.Tensor:
    """Draw estimated class shares towards equal ones.

    Parameters
    ----------
    estimated : torch.Tensor
        `[C]`, of sum 1.
    trust : float
        How far the estimate counts, from 0 (equal shares) to 1.

    Returns
    -------
    torch.Tensor
        `[C]`, of sum 1.

    Example
    -------
    >>> trusted_shares(torch.tensor([0.75, 0.25]), 0.5).tolist()
    [0.625, 0.375]
    """
    return trust * estimated + (1 - trust) / len(estimated)


def with_class_shares(labels: torch.Tensor, shares: torch.Tensor, rounds: int = 20) -> torch.Tensor:
    """Scale soft labels until each class has a given share of the whole set (Sinkhorn's iteration).

    Parameters
    ----------
    labels : torch.Tensor
        `[N, C]`, distributions.
    shares : torch.Tensor
        `[C]`, adding up to 1.
    rounds : int
        Iterations.

    Returns
    -------
    torch.Tensor
        `[N, C]`, distributions whose mean is `shares`, nearly.

    Example
    -------
    >>> labels = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
    >>> with_class_shares(labels, torch.tensor([0.5, 0.5])).mean(0).round(decimals=3).tolist()
    [0.5, 0.5]
    """
    scaled = labels.clamp(min=1e-8)
    for _ in range(rounds):
        scaled = scaled * (shares / scaled.mean(0))
        scaled = scaled / scaled.sum(1, keepdim=True)
    return scaled


def discriminant_scores(
    vectors: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, shrinkage: float = 0.3
) -> torch.Tensor:
    """Score vectors by the linear discriminant of others: `s_c(x) = x' S^-1 mu_c - mu_c' S^-1 mu_c / 2`.

    Parameters
    ----------
    vectors, labels, shrinkage
        As for `discriminant`.
    queries : torch.Tensor
        `[M, D]`, to score.

    Returns
    -------
    torch.Tensor
        `[M, C]`, log-probabilities up to a constant per row, if the classes were normal with equal covariance.

    Example
    -------
    >>> vectors = torch.tensor([[0.0, 1.0], [0.0, 2.0], [4.0, 1.0], [4.0, 2.0]])
    >>> labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> discriminant_scores(vectors, labels, torch.tensor([[0.5, 9.0], [3.5, -9.0]])).argmax(1).tolist()
    [0, 1]
    """
    directions, offsets = discriminant(vectors, labels, shrinkage)
    return queries @ directions - offsets


def discriminant(
    vectors: torch.Tensor, labels: torch.Tensor, shrinkage: float = 0.3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit linear discriminant analysis on soft labels: directions `S^-1 mu_c` and offsets `mu_c' S^-1 mu_c / 2`.

    `mu_c` is the mean weighted by the labels, S the within-class covariance, drawn towards a multiple of the identity:
    `S <- (1 - shrinkage) S + shrinkage tr(S) / D I`. Classes count alike, whatever their size.

    Parameters
    ----------
    vectors : torch.Tensor
        `[N, D]`, to fit on.
    labels : torch.Tensor
        `[N, C]`, soft labels; an all-zero row counts for nothing.
    shrinkage : float
        In (0, 1].

    Returns
    -------
    directions : torch.Tensor
        `[D, C]`.
    offsets : torch.Tensor
        `[C]`; the score of `x` is `x @ directions - offsets`.

    Example
    -------
    >>> vectors = torch.tensor([[-1.0], [1.0], [3.0], [5.0]])
    >>> directions, offsets = discriminant(vectors, torch.eye(2).repeat_interleave(2, 0), shrinkage=1.0)
    >>> directions.tolist(), offsets.tolist()
    ([[0.0, 4.0]], [0.0, 8.0])
    """
    sizes = labels.sum(0).clamp(min=1e-6)
    means = labels.T @ vectors / sizes[:, None]
    scatter = (vectors.T * labels.sum(1)) @ vectors - (means.T * sizes) @ means
    covariance = scatter / sizes.sum()
    dim = covariance.shape[0]
    # The floor keeps identical vectors (a set of silence, say) from making a singular matrix.
    level = (covariance.trace() / dim).clamp(min=1e-6)
    covariance = (1 - shrinkage) * covariance + shrinkage * level * torch.eye(dim, device=vectors.device)
    directions = torch.linalg.solve(covariance, means.T)
    return directions, (means.T * directions).sum(0) / 2


def cross_fitted_expert(
    vectors: torch.Tensor, labels: torch.Tensor, folds: torch.Tensor, temperature: float = 1.0, shrinkage: float = 0.3
) -> torch.Tensor:
    """Class probabilities of each utterance from a discriminant that was fitted on the others.

    No utterance takes part in fitting what judges it, so the expert does not echo the soft label that it was given.

    Parameters
    ----------
    vectors : torch.Tensor
        `[N, D]`.
    labels : torch.Tensor
        `[N, C]`, soft labels.
    folds : torch.Tensor
        `[N]`, int: utterances of one number are judged together.
    temperature : float
        Divides the scores: the directions of a covariance shrunk from few utterances are too sure of themselves.
    shrinkage : float
        As for `discriminant_scores`.

    Returns
    -------
    torch.Tensor
        `[N, C]`, distributions.

    Example
    -------
    >>> vectors = torch.tensor([[0.0], [0.2], [0.1], [5.0], [5.2], [5.1]])
    >>> labels = torch.tensor([[0.9, 0.1]] * 2 + [[0.1, 0.9]] + [[0.1, 0.9]] * 3)  # the third is mislabelled
    >>> cross_fitted_expert(vectors, labels, torch.arange(6) % 3).argmax(1).tolist()
    [0, 0, 0, 1, 1, 1]
    """
    scores = torch.zeros_like(labels)
    for fold in folds.unique():
        held_out = folds == fold
        fitted = ~held_out
        scores[held_out] = discriminant_scores(vectors[fitted], labels[fitted], vectors[held_out], shrinkage)
    return (scores / temperature).softmax(-1)
