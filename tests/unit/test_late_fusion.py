"""Late fusion: where it begins, and what it makes of scores."""

import pytest
import torch
from torch.nn import functional as F

from speechbrain_mifuse.nnet.adapter_classifier import AdapterClassifier
from speechbrain_mifuse.nnet.late_fusion import LateFusion, LogitAverage, ScoresOnly, SpecialistOnly
from speechbrain_mifuse.utils.errors import UserError

FRAMES, LENGTHS = torch.zeros(3, 5, 8), torch.ones(3)
# For the classes 2 and 0, and for one that is none of the four.
SCORES = torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.9, 0.2], [0.9, 0.1, 0.8]])


@pytest.mark.parametrize(
    "fusion",
    [
        LateFusion(AdapterClassifier(8, 4), [2, 0, None], 4, from_scores=True).eval(),
        ScoresOnly(None, [2, 0, None], 4, from_scores=True),
    ],
)
def test_a_fusion_that_begins_at_the_scores_adds_each_of_them_to_its_class(fusion):
    # Equal scores are zeros behind the LayerNorm: what they leave is the random specialist and the random bias.
    added = fusion(FRAMES, LENGTHS, SCORES) - fusion(FRAMES, LENGTHS, torch.ones(3, 3))
    first, second, _ = F.layer_norm(SCORES, (3,)).unbind(1)
    nothing = torch.zeros(3)
    assert torch.allclose(added, torch.stack([second, nothing, first, nothing], dim=1), atol=1e-5)


def test_beginning_at_the_scores_leaves_the_specialists_side_as_it_is():
    torch.manual_seed(0)
    plain = LateFusion(AdapterClassifier(8, 4), [2, 0, None], 4)
    torch.manual_seed(0)
    begun = LateFusion(AdapterClassifier(8, 4), [2, 0, None], 4, from_scores=True)
    assert torch.equal(begun.output.weight[:, :-3], plain.output.weight[:, :-3])
    assert not torch.equal(begun.output.weight[:, -3:], plain.output.weight[:, -3:])


def test_few_labels_do_not_make_a_fusion_forget_the_scores():
    torch.manual_seed(0)
    classes = torch.arange(4).repeat(50)
    frames, lengths = torch.randn(200, 1, 64), torch.ones(200)  # tell nothing
    scores = torch.nn.functional.one_hot(classes, 4) + 0.5 * torch.randn(200, 4)

    def right(from_scores):
        fusion = LateFusion(AdapterClassifier(64, 4), range(4), 4, from_scores=from_scores)
        optimizer = torch.optim.AdamW(fusion.parameters(), 1e-3)
        for _ in range(100):
            loss = torch.nn.functional.cross_entropy(fusion(frames[:8], lengths[:8], scores[:8]), classes[:8])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = fusion.eval()(frames[8:], lengths[8:], scores[8:]).argmax(1)
        return (found == classes[8:]).float().mean()

    assert right(True) > right(False) + 0.1


def test_averaging_multiplies_both_sides_where_there_is_a_score_for_each_class():
    torch.manual_seed(0)
    specialist = AdapterClassifier(8, 3)
    average = LogitAverage(specialist, [2, 0, 1], 3).eval()
    frames, scores = torch.randn(4, 5, 8), torch.randn(4, 3)
    alone = SpecialistOnly.forward(average, frames, torch.ones(4), scores).softmax(-1)
    told = F.layer_norm(scores, (3,)).softmax(-1)[:, [1, 2, 0]]
    wanted = (alone * told).sqrt()
    found = average(frames, torch.ones(4), scores).softmax(-1)
    assert torch.allclose(found, wanted / wanted.sum(-1, keepdim=True), atol=1e-6)


def test_averaging_leaves_a_class_without_a_score_to_the_specialist_and_passes_over_foreign_scores():
    torch.manual_seed(0)
    average = LogitAverage(AdapterClassifier(8, 4), [None, 0, 1], 4).eval()
    frames, scores = torch.randn(4, 5, 8), torch.randn(4, 3)
    alone = SpecialistOnly.forward(average, frames, torch.ones(4), scores).softmax(-1)
    found = average(frames, torch.ones(4), scores).exp()
    assert torch.allclose(found[:, 2:], alone[:, 2:], atol=1e-6)
    told = F.layer_norm(scores[:, 1:], (2,)).softmax(-1) * alone[:, :2].sum(-1, keepdim=True)
    assert torch.allclose(found[:, :2], (alone[:, :2] * told).sqrt(), atol=1e-6)
    other = torch.cat([torch.randn(4, 1), scores[:, 1:]], dim=1)
    assert torch.equal(average(frames, torch.ones(4), other), average(frames, torch.ones(4), scores))


def test_averaging_with_scores_for_none_of_the_classes_is_one_clear_error():
    with pytest.raises(UserError, match="at least one of the classes"):
        LogitAverage(AdapterClassifier(8, 4), [None, None], 4)


def test_the_specialist_alone_does_not_read_scores():
    alone = SpecialistOnly(AdapterClassifier(8, 4), [2, 0, None], 4).eval()
    frames = torch.randn(3, 5, 8)
    assert torch.equal(alone(frames, LENGTHS, SCORES), alone(frames, LENGTHS, -SCORES))
