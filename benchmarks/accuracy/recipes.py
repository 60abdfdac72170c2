"""How the networks are trained: as published in 2016, and our candidates, among which each split chooses."""

from benchmarks.accuracy.nets import Recipe
from benchmarks.accuracy.published import Published

__all__ = ["COVERAGE", "PAPER_PASSES", "candidates", "paper_recipe"]

PAPER_PASSES = 10_000
COVERAGE = 1  # the candidate whose intervals are measured; fixed, so that held-out rows do not choose it
SMALL = 2000  # training rows up to which a set is small


def paper_recipe(published: Published, rows: int, effort: float = 1.0) -> Recipe:
    """Gal and Ghahramani 2016: one layer of 50, 400 epochs of Adam in batches of 32, dropout on the inputs too.

    The L2 penalty l^2 (1 - p) / (2 N tau) on the squared weights is half of the paper's equation 7, because Keras's
    squared error has no factor 1/2, and tau is that of the original y while the loss is that of the standardised: so
    it was, and so it is here. The gradient of W^2 is 2 W, hence twice the penalty as decay.
    """
    penalty = published.length**2 * (1 - published.p) / (2 * rows * published.tau)
    return Recipe(
        p=published.p, hidden=(50,), epochs=max(1, round(400 * effort)), batch=32, rate=1e-3, decay=2 * penalty,
        head=False, drop_inputs=True, decoupled=False,
    )  # fmt: skip


def candidates(rows: int, effort: float = 1.0) -> list[Recipe]:
    """Two layers with a log-variance head on piecewise-linear encodings: smooth with little or some dropout, or kinked.

    The same for all sets, but for what follows from the number of rows. Much data bears wider layers and needs fewer
    epochs; on little data the more the dropout the shorter the training, lest the head learns the noise by heart.
    """
    small = rows <= SMALL
    hidden, batch, rate = ((64, 64), 32, 2e-3) if small else ((128, 128), 256, 6e-3)
    kinds = (
        ("silu", 0.005, 0.0, 500 if small else 120),
        ("silu", 0.05, 0.5, 250 if small else 120),
        ("relu", 0.1, 0.5, 250 if small else 200),
    )
    return [
        Recipe(
            p=p, hidden=hidden, epochs=max(1, round(epochs * effort)), batch=batch, rate=rate, decay=0.1,
            activation=activation, bins=32, beta=beta,
        )
        for activation, p, beta, epochs in kinds
    ]  # fmt: skip
