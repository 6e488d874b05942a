"""Published laws of pretraining: loss from parameters and tokens, the best split of a budget, the worth of repeats.

- Kaplan et al. (2020), arXiv:2001.08361: kept for comparison, known to favour parameters over tokens too much.
- Hoffmann et al. (2022), arXiv:2203.15556 ("Chinchilla"): L = E + A N^-alpha + B D^-beta with C = 6 N D. The published
  constants contradict the paper's own 20 tokens a parameter; the re-fit of Besiroglu et al. (2024), arXiv:2404.10102,
  does not and is the default. Its standard errors are large still: about 125 for A and 1300 for B.
- Muennighoff et al. (2023), arXiv:2305.16264: the same with tokens, and parameters beyond what the unique tokens can
  feed, worth less and less. By the authors' own warning only comparisons are meaningful, not the loss itself.

All are laws of training from scratch. None has a term for overfitting, so none can rise; none is a law of fine-tuning,
whose exponents depend on task and method (Zhang et al. 2024, arXiv:2402.17193) and are fitted to a pilot instead.
"""

# N parameters, D tokens, U unique tokens, C FLOPs

from __future__ import annotations

import math
from dataclasses import dataclass

REPEAT_CONSTANT = 15.387756
"""R_D*: epochs beyond the first after which a repeated token is worth 1/e of a fresh one."""
EXCESS_CONSTANT = 5.309743
"""R_N*: the same for parameters, in multiples of those that the unique tokens can feed."""
FLOPS_PER_PARAMETER_TOKEN = 6.0
"""C = 6 N D of the laws; plans of a run count its own FLOPs instead."""


def kaplan_loss(params: float, tokens: float) -> float:
    """L(N, D) = ((N_c / N)^(.076 / .095) + D_c / D)^.095, nats per token; N without embeddings.

    >>> round(kaplan_loss(1e9, 2e10), 3)
    2.435
    """
    return float(((8.8e13 / params) ** (0.076 / 0.095) + 5.4e13 / tokens) ** 0.095)


@dataclass(frozen=True)
class ParametricLaw:
    """L(N, D) = floor + param_scale N^-param_exponent + data_scale D^-data_exponent, in nats per token."""

    floor: float
    param_scale: float
    data_scale: float
    param_exponent: float
    data_exponent: float

    def loss(self, params: float, tokens: float) -> float:
        """Loss of ``params`` parameters trained on ``tokens`` fresh tokens."""
        of_params = self.param_scale * params**-self.param_exponent
        return self.floor + of_params + self.data_scale * tokens**-self.data_exponent

    def slope(self, tokens: float) -> float:
        """-dL/dD: nats that one more fresh token takes off."""
        return float(self.data_exponent * self.data_scale * tokens ** -(self.data_exponent + 1.0))

    def optimum(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens with the lowest loss among all with 6 N D = ``flops``.

        >>> params, tokens = CHINCHILLA.optimum(5.76e23)
        >>> round(tokens / params, 1)
        18.4
        """
        total, volume = self.param_exponent + self.data_exponent, flops / FLOPS_PER_PARAMETER_TOKEN
        params = self._balance * volume ** (self.data_exponent / total)
        return params, volume / params

    def params_fed_by(self, tokens: float) -> float:
        """Parameters for which ``tokens`` fresh tokens are the optimal number."""
        return float((tokens * self._balance) ** (self.data_exponent / self.param_exponent) * self._balance)

    @property
    def _balance(self) -> float:
        """G = (alpha A / beta B)^(1 / (alpha + beta))."""
        ratio = self.param_exponent * self.param_scale / (self.data_exponent * self.data_scale)
        return float(ratio ** (1.0 / (self.param_exponent + self.data_exponent)))


CHINCHILLA = ParametricLaw(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
"""The re-fit of arXiv:2404.10102: the default."""
CHINCHILLA_PUBLISHED = ParametricLaw(1.69, 406.4, 410.7, 0.34, 0.28)
"""Constants as printed in arXiv:2203.15556, for comparison."""
REPEATED_DATA = ParametricLaw(math.exp(0.6254804), math.exp(6.255414), math.exp(7.3049974), 0.3526596, 0.3526596)
"""Constants of arXiv:2305.16264; for use with ``effective_tokens`` and ``effective_params``."""


def repetition_value(epochs: float, constant: float = REPEAT_CONSTANT) -> float:
    """Worth of the next token relative to a fresh one: exp(-(epochs - 1) / R_D*), 1 within the first epoch.

    Args:
        epochs: Tokens trained on over unique tokens, at least 0.
        constant: R_D*, above 0.

    >>> [round(repetition_value(epochs), 3) for epochs in (1, 4, 16, 64)]
    [1.0, 0.823, 0.377, 0.017]
    """
    return math.exp(-max(0.0, epochs - 1.0) / constant)


def effective_tokens(tokens: float, unique: float, constant: float = REPEAT_CONSTANT) -> float:
    """D': fresh tokens that ``tokens`` tokens with ``unique`` different ones are worth; at most U (1 + R_D*).

    >>> round(effective_tokens(4e9, 1e9) / 4e9, 3)
    0.931
    """
    if tokens <= unique:
        return tokens
    return unique * (1.0 - constant * math.expm1(-(tokens / unique - 1.0) / constant))


def effective_params(params: float, unique: float) -> float:
    """N': parameters that count, those beyond what the unique tokens can feed counting less and less."""
    fed = min(params, REPEATED_DATA.params_fed_by(unique))
    excess = params / fed - 1.0
    return fed * (1.0 - EXCESS_CONSTANT * math.expm1(-excess / EXCESS_CONSTANT))


def repeated_data_loss(params: float, tokens: float, unique: float) -> float:
    """Loss after ``tokens`` tokens, of which ``unique`` are different.

    >>> repeated_data_loss(6.34e9, 242e9, 25e9)  # two values of the authors' own
    2.2256440889984477
    >>> repeated_data_loss(8.67e9, 178e9, 25e9)
    2.2269634075087867
    """
    return REPEATED_DATA.loss(effective_params(params, unique), effective_tokens(tokens, unique))
