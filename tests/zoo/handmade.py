"""Random draws that people write by hand: the lecture's own dropout, noise layers, samples from distributions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mlp import hidden, layered
from .specimen import ROWS, Built, specimen

KEEP = 0.7


def gated(noisy: Callable[[Tensor], Tensor]) -> Built:
    """Hidden units that are changed while training and left alone in eval."""
    return hidden(lambda net, h: noisy(h) if net.training else h)


class NaiveDropout(nn.Module):
    """Drops while training, and multiplies by the keep rate in eval: how dropout was first written."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x * (torch.rand(x.size()) < KEEP)
        return x * KEEP


@specimen(draws=1, note="not inverted: eval multiplies by the keep rate; a mask by torch.rand", mean_preserving=False)
def naive_dropout() -> Built:
    return layered(nn.ReLU(), NaiveDropout())


@specimen(draws=1, note="not inverted, a mask by torch.bernoulli")
def naive_bernoulli() -> Built:
    return hidden(lambda net, h: h * torch.bernoulli(torch.full_like(h, KEEP)) if net.training else h * KEEP)


@specimen(draws=1, note="inverted mask by torch.bernoulli of a tensor of probabilities")
def bernoulli() -> Built:
    return gated(lambda h: h * torch.bernoulli(torch.full_like(h, KEEP)) / KEEP)


@specimen(draws=1, note="inverted mask by Tensor.bernoulli")
def bernoulli_method() -> Built:
    return gated(lambda h: h * torch.full_like(h, KEEP).bernoulli() / KEEP)


@specimen(draws=1, note="inverted mask by torch.empty().bernoulli_()")
def empty_bernoulli() -> Built:
    return gated(lambda h: h * torch.empty(h.shape).bernoulli_(KEEP) / KEEP)


@specimen(draws=1, note="whole rows are dropped by new_empty(N, 1).bernoulli_()")
def new_empty_bernoulli() -> Built:
    return gated(lambda h: h * h.new_empty(h.shape[0], 1).bernoulli_(KEEP).div_(KEEP))


def _unbound(h: Tensor) -> Tensor:
    mask = h.new_empty(h.shape)
    mask.bernoulli_(KEEP)
    return h * mask / KEEP


@specimen(draws=1, note="mask.bernoulli_() as a statement, its result not taken")
def bernoulli_statement() -> Built:
    return gated(_unbound)


@specimen(draws=1, note="inverted mask by comparing torch.rand", mean_preserving=False)
def rand_mask() -> Built:
    return gated(lambda h: h * (torch.rand(h.shape) < KEEP).float() / KEEP)


@specimen(draws=1, note="inverted mask by comparing torch.rand_like", mean_preserving=False)
def rand_like_mask() -> Built:
    return gated(lambda h: torch.where(torch.rand_like(h) < KEEP, h / KEEP, 0.0))


@specimen(draws=1, note="inverted mask by comparing Tensor.uniform_", mean_preserving=False)
def uniform_mask() -> Built:
    return gated(lambda h: h * (torch.empty_like(h).uniform_() < KEEP) / KEEP)


@specimen(draws=1, note="inverted mask by Tensor.bernoulli_ of booleans")
def bool_mask() -> Built:
    return gated(lambda h: torch.where(torch.empty(h.shape, dtype=torch.bool).bernoulli_(KEEP), h / KEEP, 0.0))


@specimen(draws=1, note="a half of the units by torch.randint")
def randint_mask() -> Built:
    return gated(lambda h: 2 * h * torch.randint(0, 2, h.shape))


@specimen(draws=2, note="noise on some units: with one draw at its expectation the other reaches nothing")
def sparse_noise() -> Built:
    return gated(lambda h: h + torch.randn_like(h) * torch.bernoulli(torch.full_like(h, 0.3)))


@specimen(draws=1, note="additive Gaussian noise by torch.randn_like")
def gaussian_noise() -> Built:
    return gated(lambda h: h + 0.3 * torch.randn_like(h))


@specimen(draws=1, note="multiplicative Gaussian noise by torch.randn(*sizes)")
def gaussian_dropout() -> Built:
    return gated(lambda h: h * (1 + 0.5 * torch.randn(h.size(0), h.size(1))))


@specimen(draws=1, note="multiplicative Gaussian noise by Tensor.normal_")
def normal_inplace() -> Built:
    return gated(lambda h: h * torch.empty_like(h).normal_(1.0, 0.5))


@specimen(draws=1, note="noise by torch.normal(mean, std)")
def normal_function() -> Built:
    return gated(lambda h: torch.normal(h, 0.1 + h.abs()))


@specimen(draws=1, note="multiplicative exponential noise by Tensor.exponential_")
def exponential_noise() -> Built:
    return gated(lambda h: h * torch.empty_like(h).exponential_(1.0))


@specimen(draws=1, note="nn.RReLU: a slope drawn for each negative unit")
def rrelu() -> Built:
    return layered(nn.RReLU(0.1, 0.9))


class ConcreteDropout(nn.Module):
    """A relaxed mask with a learnt rate (Gal, Hron, Kendall 2017); its mean is not the keep rate."""

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(-0.8))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        uniform = torch.rand_like(x).clamp(1e-6, 1 - 1e-6)
        dropped = torch.sigmoid((self.logit + uniform.logit()) / 0.1)
        return x * (1 - dropped) / (1 - self.logit.sigmoid())


@specimen(draws=1, note="concrete dropout: a smooth function of a uniform draw", mean_preserving=False)
def concrete_dropout() -> Built:
    return layered(nn.ReLU(), ConcreteDropout())


class Encoder(nn.Module):
    """The sampling step of a variational autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std, self.decode = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(x)
        code = torch.distributions.Normal(mean, self.log_std(x).exp()).rsample() if self.training else mean
        return self.decode(code)  # type: ignore[no-any-return]


@specimen(draws=1, note="torch.distributions.Normal.rsample, with a mean and scale of each row")
def distribution_normal() -> Built:
    return Encoder(), torch.randn(ROWS, 8)


@specimen(draws=1, note="torch.distributions.Bernoulli.sample")
def distribution_bernoulli() -> Built:
    return gated(lambda h: h * torch.distributions.Bernoulli(probs=torch.tensor(KEEP)).sample(h.shape) / KEEP)


class NoisyExperts(nn.Module):
    """A mixture of experts whose gate is disturbed before the best two are chosen (Shazeer et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        if self.training:
            gate = gate + torch.randn_like(gate)
        best, which = gate.topk(2, dim=-1)
        weights = torch.zeros_like(gate).scatter(-1, which, best.softmax(-1))
        return torch.stack([expert(x) for expert in self.experts], -1).mul(weights.unsqueeze(1)).sum(-1)


@specimen(draws=1, note="noise decides which experts are used")
def noisy_experts() -> Built:
    return NoisyExperts(), torch.randn(ROWS, 8)


# Draws that are not a mask: what they give is an index or a sample, not noise that multiplies or adds.


def _multinomial(h: Tensor) -> Tensor:
    which = torch.multinomial(h.softmax(-1), 8, replacement=False)
    return torch.zeros_like(h).scatter(-1, which, h.gather(-1, which)) * 2


@specimen(draws=1, note="torch.multinomial chooses the units that stay", refused="samples indices, not a mask")
def multinomial() -> Built:
    return gated(_multinomial)


@specimen(draws=1, note="F.gumbel_softmax weighs the units, and hides its draw")
def gumbel_softmax() -> Built:
    return hidden(lambda net, h: h * 16 * (F.gumbel_softmax(h, tau=1.0) if net.training else h.softmax(-1)))
