"""The convex toy of RotoGrad's paper, vectorised over variants and seeds."""

import torch

from accel_weighting.methods.rotograd import orthogonalise, retract, skew

VARIANTS = ["vanilla", "magnitude only", "rotations only", "RotoGrad", "flipped sign", "R for Rᵀ", "g̃ for g"]


def avocado(u):
    a, b = u.sum(-1), u[..., 0] - u[..., 1]
    return torch.log(torch.cosh(a)) + torch.log(torch.cosh(b)) / 2 + 0.05 * (a**2 + b**2)


def toy(seeds, steps, lr=0.05):
    """All variants × seeds at once: the optima's gaps ``[variants, seeds, 2]`` and the rotations.

    ``L_k = φ(R_k z − c_k)``, one input, z a two-layer net of it, SGD at 1e-3. Moments as a window makes them, steps by
    the library's retraction.
    """
    V = len(VARIANTS)
    g = torch.Generator().manual_seed(0)

    def uniform(*shape, fan_in):
        return ((2 * torch.rand(seeds, *shape, generator=g).double() - 1) / fan_in**0.5).repeat(V, 1, *[1] * len(shape))

    net = [uniform(10, 2, fan_in=2), uniform(10, fan_in=2), uniform(2, 10, fan_in=10), uniform(2, fan_in=10)]
    net = [p.flatten(0, 1).requires_grad_() for p in net]
    B = V * seeds
    x = torch.tensor([1.0, -1.0]).double()
    c = torch.tensor([[1.5, 1.5], [-1.5, -1.5]]).double()
    R = torch.eye(2).double().repeat(B, 2, 1, 1)
    which = torch.arange(V).repeat_interleave(seeds)
    rotate = (which >= 2).double()
    scale = (which == 1) | (which >= 3)
    sign = torch.where(which == VARIANTS.index("flipped sign"), -1.0, 1.0).double()
    initial = None

    def representation():
        W1, b1, W2, b2 = net
        return (W2 @ torch.relu((W1 @ x) + b1)[..., None])[..., 0] + b2

    for step in range(steps):
        z = representation()
        leaf = z.detach()[:, None].expand(B, 2, 2).clone().requires_grad_()
        r = (R @ leaf[..., None])[..., 0]
        G, G_r = torch.autograd.grad(avocado(r - c).sum(), (leaf, r))
        n = G.norm(dim=-1).clamp(min=1e-300)
        initial = n if initial is None or step == 20 else initial
        alpha = n / initial / (n / initial).sum(1, keepdim=True)
        w = torch.where(scale[:, None], (alpha * n).sum(1, keepdim=True) / n, 1.0)
        gradients = torch.autograd.grad(z, net, (w[..., None] * G).sum(1))
        with torch.no_grad():
            for p, q in zip(net, gradients, strict=True):
                p -= 1e-3 * q
        wrong = (R @ G_r[..., None])[..., 0]
        G = torch.where((which == VARIANTS.index("R for Rᵀ"))[:, None, None], wrong, G)
        G = torch.where((which == VARIANTS.index("g̃ for g"))[:, None, None], G_r, G)
        D = G[:, 0, 0] * G[:, 1, 1] - G[:, 0, 1] * G[:, 1, 0]
        b = sign * rotate * lr * D / (2 * n.prod(1))
        X = skew(torch.stack([b, -b], 1).view(-1, 1), 2)
        R = orthogonalise(retract(R.flatten(0, 1), X)).view(B, 2, 2, 2)
    gaps = avocado((R @ representation().detach()[:, None, :, None])[..., 0] - c).view(V, seeds, 2)
    return gaps, R.view(V, seeds, 2, 2, 2), [p.detach().view(V, seeds, *p.shape[1:]) for p in net]
