"""The communication hook by itself, on a bucket made by hand; tests/test_ranks.py reduces over processes."""

import pytest
import torch
from torch import nn
from torch.futures import Future

from lightning_topkast import Targets, TopKast
from lightning_topkast.training import all_reduce
from lightning_topkast.training.all_reduce import sparse_all_reduce


class Bucket:
    """As DDP makes them: gradients lie in the buffer in memory order, whatever their strides."""

    def __init__(self, parameters) -> None:
        self._parameters = list(parameters)
        self._buffer = torch.arange(1.0, 1 + sum(parameter.numel() for parameter in self._parameters))

    def parameters(self):
        return self._parameters

    def buffer(self):
        return self._buffer

    def gradients(self):
        parts = self._buffer.split([parameter.numel() for parameter in self._parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self._parameters, strict=True)]


def send(hook, parameters) -> torch.Tensor:
    """What the bucket holds once the hook's future is done."""
    return hook(None, Bucket(parameters)).wait()


@pytest.fixture
def sent():
    return []


@pytest.fixture
def inner(sent):
    def hook(state, bucket):
        sent.append(bucket.buffer().clone())
        future = Future()
        future.set_result(bucket.buffer())
        return future

    return hook


@pytest.fixture
def convolution():
    torch.manual_seed(0)
    return nn.Conv2d(4, 3, 2)


def engine_of(module) -> TopKast:
    topkast = TopKast(module, 0.75, 0.5, targets=Targets(keep_first_dense=False, keep_last_dense=False), penalty=None)
    return topkast.attach(torch.optim.SGD(module.parameters(), lr=0.1))


def check_sends_the_updated_set(hook, topkast, sent) -> None:
    (weight,) = topkast.weights.values()
    received = send(hook, [weight.parameter])
    whole = torch.arange(1.0, 1 + weight.size)
    strided = torch.empty_like(weight.parameter).copy_(weight.updated)
    members = strided.as_strided((weight.size,), (1,)).bool()
    assert torch.equal(sent[-1], whole[members])
    assert torch.equal(received, whole * members)


def test_what_is_sent_follows_the_sets(convolution, inner, sent):
    topkast = engine_of(convolution)
    hook = sparse_all_reduce(topkast, hook=inner)
    check_sends_the_updated_set(hook, topkast, sent)

    state, alpha = topkast.state_dict(), convolution.weight.detach().clone()
    with torch.no_grad():
        convolution.weight.copy_(convolution.weight.flip(0, 1, 2, 3))
    topkast.refresh()
    check_sends_the_updated_set(hook, topkast, sent)
    assert not torch.equal(sent[-1], sent[-2])

    with torch.no_grad():
        convolution.weight.copy_(alpha)
    topkast.load_state_dict(state)
    check_sends_the_updated_set(hook, topkast, sent)
    assert torch.equal(sent[-1], sent[0])

    convolution.to(memory_format=torch.channels_last)
    for weight in topkast.weights.values():
        weight.match_layout()
    check_sends_the_updated_set(hook, topkast, sent)
    assert not torch.equal(sent[-1], sent[0])


def test_indices_are_made_once_for_each_choice_of_the_sets(convolution, inner, monkeypatch):
    made = []
    monkeypatch.setattr(all_reduce, "indices", lambda members: made.append(members) or members.nonzero().flatten())
    topkast = engine_of(convolution)
    hook = sparse_all_reduce(topkast, hook=inner)
    for refreshes in (1, 2):
        for _ in range(3):
            send(hook, [convolution.weight])
        assert len(made) == refreshes
        topkast.refresh()


def test_gradient_is_sent_whole_while_no_optimizer_is_accompanied(convolution, inner, sent):
    topkast = engine_of(convolution)
    hook = sparse_all_reduce(topkast, hook=inner)
    topkast.detach()
    received = send(hook, convolution.parameters())
    assert torch.equal(sent[0], torch.arange(1.0, 1 + 48 + 3))
    assert torch.equal(received, sent[0])


def test_dense_gradients_beside_are_sent_whole(convolution, inner, sent):
    topkast = engine_of(convolution)
    received = send(sparse_all_reduce(topkast, hook=inner), convolution.parameters())
    assert len(sent[0]) == 24 + 3
    assert received[48:].tolist() == [49, 50, 51]


def test_a_hook_may_change_the_dtype_of_what_is_sent(convolution, inner, sent):
    def in_16_bits(state, bucket):
        bucket.set_buffer(bucket.buffer().bfloat16())
        assert [gradient.dtype for gradient in bucket.gradients()] == [torch.bfloat16] * 2
        return inner(state, bucket)

    topkast = engine_of(convolution)
    received = send(sparse_all_reduce(topkast, hook=in_16_bits), convolution.parameters())
    assert sent[0].dtype == torch.bfloat16
    assert received.dtype == torch.float32
    assert received[48:].tolist() == [49, 50, 51]
