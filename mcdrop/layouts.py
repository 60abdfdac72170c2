"""How the entries of a draw follow the rows."""

from dataclasses import dataclass

from torch import Tensor

from mcdrop.errors import UncontrolledDraw

__all__ = ["FEW", "MORE", "Layout", "Told", "own_shape", "told_layout"]

FEW, MORE = 3, 2  # rows at least, and how many more of the same; what differs between their draws is the rows' axis


@dataclass(frozen=True)
class Layout:
    """Which axis of a draw follows the rows, and how many entries of it belong to one row.

    These stand side by side, but for ``outer`` ones, such as steps: the first of all rows comes before the second.
    """

    axis: int
    multiple: int = 1
    outer: int = 1

    def unit_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Gives the shape of what one row draws."""
        own = () if self.multiple == 1 else (self.multiple,)
        return (*shape[: self.axis], *own, *shape[self.axis + 1 :])

    def check(self, shape: tuple[int, ...], rows: int | None) -> None:
        """Checks that a draw has as many entries for each row as it had, where the numbers are known.

        Raises:
            UncontrolledDraw: it has not, as where a network draws for those steps alone that are no padding.
        """
        size = shape[self.axis]
        if isinstance(size, int) and isinstance(rows, int) and size != self.multiple * rows:
            remedy = "wrap it with example rows that differ in how many they have"
            if size < self.multiple * rows:
                remedy += f", or give it at most {size // self.multiple} rows at a time where it cuts them into parts"
            raise UncontrolledDraw(
                f"the network draws for {size} entries of {rows} rows, where it drew for {self.multiple} of each row: "
                f"which are whose cannot be told; {remedy}"
            )

    def spread(self, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Repeats one row's mask over all rows of a draw (broadcast where that is enough)."""
        if self.multiple == 1:
            return mask.unsqueeze(self.axis)
        own = (self.outer, shape[self.axis] // self.multiple, self.multiple // self.outer)
        return self.opened(mask).expand(*shape[: self.axis], *own, *shape[self.axis + 1 :]).reshape(shape)

    def opened(self, mask: Tensor, before: int = 0) -> Tensor:
        """Gives a row's mask, with further axes ``before`` its own, with one for the rows amid the row's entries."""
        at = self.axis + before
        own = (self.outer, 1, self.multiple // self.outer)
        return mask.reshape(*mask.shape[:at], *own, *mask.shape[at + (self.multiple > 1) :])


def own_shape(shape: tuple[int, ...], layout: Layout | None) -> tuple[int, ...]:
    """Gives the shape of what one row draws, or all together where no axis follows the rows."""
    return shape if layout is None else layout.unit_shape(shape)


Told = tuple[Layout | None, bool]  # the layout of a draw, and whether it could be told


def told_layout(few: tuple[int, ...], more: tuple[int, ...] | None, rows: int) -> Told:
    """Gives the layout of a draw from its shapes for so many rows and ``MORE`` of them, and whether they tell it."""
    if more is None or len(more) != len(few):
        return None, False
    differing = [axis for axis, (a, b) in enumerate(zip(few, more, strict=True)) if a != b]
    if not differing:
        return None, True
    axis = differing[0]
    if len(differing) > 1 or few[axis] % rows or few[axis] // rows * (rows + MORE) != more[axis]:
        return None, False
    return Layout(axis, few[axis] // rows), True
