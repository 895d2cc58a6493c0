"""The network: pooling that padding cannot touch and whose gradient is the formula's, and dropout drawn in one pass."""

import pytest
import torch

from speechbrain_mifuse.nnet.classifier import EmotionClassifier, LayerWeighting
from speechbrain_mifuse.nnet.statistical_attentive_pooling import StatisticalAttentivePooling, frame_mask

D, C = 6, 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def attentive(dtype=torch.float32):
    """Pooling whose attention has moved from its start."""
    pool = StatisticalAttentivePooling(D, 5).to(dtype)
    torch.nn.init.normal_(pool.score.weight)
    return pool


def textbook(pool, frames):
    """`[mu; sigma]` of whole utterances by Okabe's formula: `sigma^2 = sum a z^2 - mu^2`, nothing detached."""
    energy = torch.tanh(frames @ pool.project.weight.T + pool.project.bias) @ pool.score.weight.squeeze(0)
    weights = (energy.exp() / energy.exp().sum(1, keepdim=True)).unsqueeze(-1)
    mean = (weights * frames).sum(1)
    return torch.cat([mean, ((weights * frames.square()).sum(1) - mean.square()).sqrt()], dim=1)


def classifier(**options):
    """Classifier in evaluation mode whose every part matters."""
    model = EmotionClassifier(D, C, hidden_size=32, **options)
    torch.nn.init.normal_(model.pooling.score.weight)
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


def test_pooling_follows_the_formula():
    pool, frames = attentive(torch.float64), torch.randn(3, 7, D, dtype=torch.float64)
    torch.testing.assert_close(pool(frames), textbook(pool, frames))


def test_padding_has_no_influence_on_the_pooled_vector():
    pool, counts = attentive(), [3, 9, 1, 6]
    alone = [torch.randn(1, count, D) for count in counts]
    padded = torch.full((4, 9, D), 1e3)
    for row, frames in zip(padded, alone, strict=True):
        row[: frames.shape[1]] = frames[0]
    batch = pool(padded, torch.tensor(counts) / 9)
    torch.testing.assert_close(batch, torch.cat([pool(frames) for frames in alone]), atol=1e-5, rtol=1e-5)


def test_padding_has_no_influence_on_the_logits():
    model, counts = classifier(), [3, 9, 1, 6]
    alone = [torch.randn(1, count, D) for count in counts]
    padded = torch.nn.utils.rnn.pad_sequence([frames[0] for frames in alone], batch_first=True, padding_value=50.0)
    batch = model(padded, torch.tensor(counts) / 9)
    torch.testing.assert_close(batch, torch.cat([model(frames) for frames in alone]), atol=1e-5, rtol=1e-5)


def test_padding_gets_no_gradient():
    pool, frames = attentive(), torch.randn(2, 8, D, requires_grad=True)
    pool(frames, torch.tensor([0.5, 1.0])).square().sum().backward()
    assert not frames.grad[0, 4:].any() and frames.grad[0, :4].any() and frames.grad[1].all()


def test_pooling_starts_as_plain_statistics_pooling():
    pool, frames = StatisticalAttentivePooling(D), torch.randn(2, 9, D)
    mean, deviation = frames.mean(1), frames.std(1, unbiased=False)
    torch.testing.assert_close(pool(frames), torch.cat([mean, deviation], dim=1))


def test_the_attention_learns_from_its_start():
    pool, frames = StatisticalAttentivePooling(D), torch.randn(2, 9, D)
    pool(frames).square().sum().backward()
    assert pool.score.weight.grad.any()


def test_one_frame_gives_itself_a_tiny_deviation_and_a_finite_gradient():
    pool, frames = attentive(), torch.randn(2, 1, D, requires_grad=True)
    pooled = pool(frames)
    torch.testing.assert_close(pooled[:, :D], frames[:, 0])
    assert (pooled[:, D:] <= 1e-3).all() and torch.isfinite(pooled).all()
    pooled.sum().backward()
    assert torch.isfinite(frames.grad).all()


def test_large_offsets_do_not_spoil_the_deviation():
    frames = torch.randn(2, 50, D)
    pool = StatisticalAttentivePooling(D)
    torch.testing.assert_close(pool(frames + 1000)[:, D:], pool(frames)[:, D:], atol=1e-3, rtol=1e-3)


def test_the_gradient_is_that_of_the_formula_with_nothing_detached():
    frames, direction = torch.randn(3, 7, D, dtype=torch.float64), torch.randn(3, 2 * D, dtype=torch.float64)
    pool = attentive(torch.float64)
    found = []
    for pooled in (pool, lambda z: textbook(pool, z)):
        inputs = frames.clone().requires_grad_()
        pool.zero_grad()
        (pooled(inputs) * direction).sum().backward()
        found.append([inputs.grad, *(parameter.grad.clone() for parameter in pool.parameters())])
    for ours, formula in zip(*found, strict=True):
        torch.testing.assert_close(ours, formula, atol=1e-12, rtol=1e-9)


def test_the_gradient_agrees_with_finite_differences():
    pool, lengths = attentive(torch.float64), torch.tensor([0.6, 1.0], dtype=torch.float64)
    frames = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: pool(z, lengths), (frames,))
    parameters = tuple(pool.parameters())
    assert torch.autograd.gradcheck(lambda *_: pool(frames.detach(), lengths), parameters)


def test_the_mask_marks_at_least_one_frame_and_rounds_relative_lengths():
    counts = torch.arange(1, 501)
    assert frame_mask(counts / 500, 500).sum(1).equal(counts)
    assert frame_mask(torch.tensor([0.0]), 5).sum() == 1


def test_layers_are_averaged_at_first_and_weighted_by_softmax():
    weighting, frames = LayerWeighting(3), torch.randn(2, 5, 3, D)
    torch.testing.assert_close(weighting(frames), frames.mean(2))
    weighting.weight.data = torch.tensor([0.0, 1.0, -2.0])
    share = torch.tensor([0.0, 1.0, -2.0]).exp() / torch.tensor([0.0, 1.0, -2.0]).exp().sum()
    expected = sum(share[layer] * frames[:, :, layer] for layer in range(3))
    torch.testing.assert_close(weighting(frames), expected)


def test_a_classifier_of_several_layers_weights_them_and_learns_how():
    model = EmotionClassifier(D, C, n_layers=3)
    frames = torch.randn(4, 5, 3, D)
    model(frames).square().sum().backward()
    assert model.layer_weighting.weight.grad.any()
    model.eval()
    model.layer_weighting.weight.data = torch.tensor([-50.0, 50.0, -50.0])
    single = EmotionClassifier(D, C).eval()
    single.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("layer_weighting")})
    torch.testing.assert_close(model(frames), single(frames[:, :, 1]))


def test_evaluation_is_deterministic_and_training_is_not():
    model, frames = classifier(), torch.randn(3, 5, D)
    assert model(frames).equal(model(frames))
    model.train()
    assert not model(frames).equal(model(frames))


def test_one_stack_of_passes_holds_different_predictions_even_in_evaluation_mode():
    logits = classifier().stochastic_logits(torch.randn(2, 5, D), None, passes=16)
    assert logits.shape == (2, 16, C)
    assert all(len({tuple(row) for row in utterance.tolist()}) == 16 for utterance in logits)


def test_masks_differ_between_utterances_too():
    frames = torch.randn(1, 5, D).expand(2, -1, -1)
    first, second = classifier().stochastic_logits(frames, None, passes=16)
    assert not any(row.equal(other) for row, other in zip(first, second, strict=True))


def test_the_mean_of_many_passes_is_the_deterministic_prediction():
    model, frames = classifier(dropout=0.3), torch.randn(2, 5, D)
    draws = model.stochastic_logits(frames, None, passes=20000)
    error = (draws.mean(1) - model(frames)).abs()
    assert (error < 5 * draws.std(1) / 20000**0.5).all()
    assert (draws.std(1) > 0.05).all()


def test_without_dropout_every_pass_is_the_deterministic_prediction():
    model, frames = classifier(dropout=0.0), torch.randn(2, 5, D)
    logits = model.stochastic_logits(frames, torch.tensor([0.4, 1.0]), passes=3)
    torch.testing.assert_close(logits, model(frames, torch.tensor([0.4, 1.0])).unsqueeze(1).expand(-1, 3, -1))


def test_all_passes_are_one_batched_pass_that_pools_once():
    model, calls = classifier(), []
    for name in ("pooling", "norm", "hidden", "output"):
        module = getattr(model, name)
        module.register_forward_hook(lambda module, args, result, name=name: calls.append((name, tuple(result.shape))))
    model.stochastic_logits(torch.randn(3, 5, D), None, passes=16)
    assert calls == [("pooling", (3, 2 * D)), ("norm", (3, 2 * D)), ("hidden", (3, 32)), ("output", (3, 16, C))]


def test_stochastic_passes_do_not_touch_the_running_statistics():
    model = classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.stochastic_logits(torch.randn(3, 5, D), None, passes=4)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
