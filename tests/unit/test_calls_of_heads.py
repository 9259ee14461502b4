"""Models whose heads are called with several tensors, by keyword or step by step, against autograd by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from accel_weighting import IMTLG, MGDA, GradNorm, Weighter

F64 = torch.float64
METHODS = [GradNorm(), MGDA(), IMTLG()]


class ReadsState(nn.Module):
    """Reads the outputs and the last state of a recurrent trunk, a nested tuple."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, outputs, state):
        h, c = state
        return self.linear(outputs.tanh()).mean(1) + self.linear(h[0]) * 0.5 + self.linear(c[0]).square()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.LSTM(3, 4, batch_first=True)
        self.heads = nn.ModuleDict({t: ReadsState() for t in "ab"})

    def forward(self, x):
        outputs, state = self.trunk(x)
        self.shared = [outputs, *state]
        return {t: head(outputs, state) for t, head in self.heads.items()}


class Attends(nn.Module):
    """Attention from a learned query; key and value are one tensor."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, *, query, key, value):
        return self.attention(query.expand(len(key), -1, -1), key, value)[0].mean(2)


class Attended(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.queries = nn.ParameterDict({t: nn.Parameter(torch.randn(1, 1, 4)) for t in "ab"})
        self.heads = nn.ModuleDict({t: Attends() for t in "ab"})

    def forward(self, x):
        z = self.trunk(x)
        self.shared = [z]
        return {t: head(query=self.queries[t], key=z, value=z) for t, head in self.heads.items()}


class StepByStep(nn.Module):
    """Linear heads that are called for every place of a sequence: head after head, or place after place."""

    def __init__(self, heads_outside):
        super().__init__()
        self.heads_outside = heads_outside
        self.trunk = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.heads = nn.ModuleDict({t: nn.Linear(4, 1) for t in "ab"})

    def forward(self, x):
        z = self.trunk(x)
        self.shared = [z]
        if self.heads_outside:
            outputs = {t: [head(z[:, i]) for i in range(z.shape[1])] for t, head in self.heads.items()}
        else:
            places = [{t: head(one) for t, head in self.heads.items()} for one in z.unbind(1)]
            outputs = {t: [place[t] for place in places] for t in "ab"}
        return {t: torch.stack(found, 1).square().mean(1) for t, found in outputs.items()}


def task_losses(outputs, y):
    return {t: scale * (outputs[t] - y[t]).square().mean() for t, scale in (("a", 10), ("b", 1))}


def by_hand(losses, model):
    """Gram matrix at what the heads share, the trunk's gradients by task, and its parameters."""
    trunk = list(model.trunk.parameters())
    at_z = [torch.autograd.grad(loss, model.shared, retain_graph=True) for loss in losses.values()]
    M = [[sum((a * b).sum().item() for a, b in zip(g, h, strict=True)) for h in at_z] for g in at_z]
    return np.array(M), [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in losses.values()], trunk


def largest_errors(model, method):
    """Of statistics and of gradients over three steps, relative."""
    twin = copy.deepcopy(model)
    weighter = Weighter(method, ["a", "b"], heads=dict(model.heads))
    of_statistics = of_gradients = 0.0
    for step in range(3):
        torch.manual_seed(step)
        x, y = torch.randn(6, 5, 3, dtype=F64), {t: torch.randn(6, 1, dtype=F64) for t in "ab"}
        weights = list(weighter.weights.values())
        model.zero_grad(), twin.zero_grad()
        weighter.backward(task_losses(model(x), y))
        losses = task_losses(twin(x), y)
        M, gradients, trunk = by_hand(losses, twin)
        found, want = weighter.statistics.gram, M
        if found is None:
            found, want = np.diag(weighter.statistics.norms**2), np.diag(M.diagonal())
        of_statistics = max(of_statistics, np.abs(found - want).max() / np.abs(M).max())
        on_heads = weights if method.acts_on == "losses" else [1.0, 1.0]
        sum(w * loss for w, loss in zip(on_heads, losses.values(), strict=True)).backward()
        for p, *of_tasks in zip(trunk, *gradients, strict=True):
            p.grad = sum(w * g for w, g in zip(weights, of_tasks, strict=True))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            of_gradients = max(of_gradients, float((p.grad - q.grad).norm() / q.grad.norm()))
    return of_statistics, of_gradients


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("kind", [Recurrent, Attended, lambda: StepByStep(False)], ids=["state", "keyword", "places"])
def test_statistics_and_gradients_are_those_by_hand(kind, method):
    torch.manual_seed(1)
    of_statistics, of_gradients = largest_errors(kind().double(), method)
    assert of_statistics < 1e-14 and of_gradients < 1e-13


def test_heads_that_go_through_a_sequence_one_after_another_have_norms_alone():
    torch.manual_seed(1)
    of_statistics, of_gradients = largest_errors(StepByStep(True).double(), GradNorm())
    assert of_statistics < 1e-14 and of_gradients < 1e-14
    with pytest.raises(RuntimeError, match="the heads were fed different tensors, so that only norms are known"):
        largest_errors(StepByStep(True).double(), MGDA())
