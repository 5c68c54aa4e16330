"""What can be known about the generated clinic's labels: the AUROC of the best possible score.

A task's score is y = sum_m s_m f_m + e with independent factors f_m ~ N(0, 1) and e ~ N(0, 1); its label is the
interval of fixed thresholds in which y falls. Who sees the factors of the modalities V only, sees a score whose
correlation with y is rho = sqrt(sum_{m in V} s_m^2 / (1 + sum_m s_m^2)), and no score of these can rank better than
P(label | score), whose AUROC is computed here by numerical integration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

Floats = NDArray[np.float64]

_GRID: Floats = np.linspace(-8.0, 8.0, 4001)


def thresholds(balance: Iterable[float]) -> Floats:
    """Cuts of a standard normal score that give the classes of this balance; (classes - 1,), increasing."""
    return np.asarray(ndtri(np.cumsum(list(balance))[:-1]))


def correlation(signal: Mapping[str, float], seen: Iterable[str]) -> float:
    """Correlation of the score with the factors of the modalities that are seen."""
    total = 1.0 + sum(s**2 for s in signal.values())
    return float(np.sqrt(sum(signal.get(name, 0.0) ** 2 for name in seen) / total))


def best_auroc(rho: float, balance: tuple[float, ...]) -> float:
    """AUROC, one class against the rest and averaged over classes, of the best score with this correlation.

    Args:
        rho: correlation of what is seen with the score.
        balance: prevalence of each class, adding up to 1; for two classes both give the same AUROC.

    Example:
        >>> best_auroc(0.0, (0.5, 0.5))
        0.5
    """
    if rho == 0.0:
        return 0.5
    density = np.exp(-0.5 * _GRID**2)
    density /= density.sum()
    above = ndtr((rho * _GRID[:, None] - thresholds(balance)) / np.sqrt(1.0 - rho**2))
    reach = np.concatenate([np.ones((len(_GRID), 1)), above, np.zeros((len(_GRID), 1))], axis=1)
    posterior = reach[:, :-1] - reach[:, 1:]
    return float(np.mean([_auroc(posterior[:, c], density) for c in range(posterior.shape[1])]))


def _auroc(posterior: Floats, density: Floats) -> float:
    """P(a random positive is ranked above a random negative), ranked by the posterior itself."""
    order = np.argsort(posterior)
    positive, negative = (density * posterior)[order], (density * (1.0 - posterior))[order]
    below = np.cumsum(negative) - 0.5 * negative
    return float((positive * below).sum() / (positive.sum() * negative.sum()))
