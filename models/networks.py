"""The reference networks: builder functions, named by a model folder as ``models.networks:noisy_line``.

To add a network, add one function whose arguments are plain values, so that a manifest can repeat the call.
"""

from torch import nn

__all__ = ["digits", "noisy_line"]

HIDDEN = 100


def noisy_line() -> nn.Module:
    """The net that learns y = x from noisy points: (N, 1) to (N, 1), dropout 0.5 and 0.2 before the ReLUs."""
    return nn.Sequential(
        nn.Linear(1, HIDDEN),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.Dropout(0.2),
        nn.ReLU(),
        nn.Linear(HIDDEN, 1),
    )


def digits(hidden_layers: int = 3, inputs: int = 64) -> nn.Module:
    """The digit classifier: (N, inputs) grey levels in [0, 1] to (N, 10) logits.

    The first hidden layer has no dropout, every later one has dropout 0.2 before its sigmoid. The weights start as
    Xavier's: with torch's own start three sigmoid layers hardly learn.

    Raises:
        ValueError: fewer than two hidden layers, which would leave nothing random.
    """
    if hidden_layers < 2:
        raise ValueError(f"hidden_layers must be at least 2, or no dropout is left; got {hidden_layers}")
    layers: list[nn.Module] = [nn.Linear(inputs, HIDDEN), nn.Sigmoid()]
    for _ in range(hidden_layers - 1):
        layers += [nn.Linear(HIDDEN, HIDDEN), nn.Dropout(0.2), nn.Sigmoid()]
    layers.append(nn.Linear(HIDDEN, 10))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(*layers)
