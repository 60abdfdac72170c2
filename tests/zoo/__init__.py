"""A zoo of small networks that draw random numbers in every way we know of, each with the truth about itself.

``ZOO`` maps names to specimens. To add one, add one function to a family module; to add a family, name it below.
"""

from . import awkward, conv, coupled, elusive, forms, handmade, language, mlp, sequence, vision
from .reference import Draws, Expected, reference, reference_passes
from .specimen import ROWS, Example, Specimen, call, specimens, why_missing

__all__ = [
    "FAMILIES",
    "ROWS",
    "ZOO",
    "Draws",
    "Example",
    "Expected",
    "Specimen",
    "call",
    "reference",
    "reference_passes",
    "why_missing",
]

FAMILIES = {
    module.__name__.rpartition(".")[2]: specimens(vars(module))
    for module in (mlp, handmade, conv, sequence, vision, language, awkward, coupled, forms, elusive)
}

ZOO: dict[str, Specimen] = {specimen.name: specimen for family in FAMILIES.values() for specimen in family}
