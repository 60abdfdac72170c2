"""What holds for every specimen, checked by torch alone. A tool that wraps networks is tested against these truths."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from . import FAMILIES, ROWS, ZOO, Draws, Example, Expected, Specimen, call, reference, reference_passes, why_missing
from .reference import UnknownExpectation

EVERY = [pytest.param(specimen, id=name) for name, specimen in ZOO.items()]
every = pytest.mark.parametrize("specimen", EVERY)


@pytest.fixture
def built(specimen: Specimen) -> tuple[nn.Module, Example]:
    for library in specimen.requires:
        if reason := why_missing(library):
            pytest.skip(reason)
    return specimen.build()


def leaves(example: Example) -> list[Tensor]:
    if isinstance(example, Tensor):
        return [example]
    return list(example.values() if isinstance(example, dict) else example)


def one_row(example: Example, row: int) -> Example:
    if isinstance(example, Tensor):
        return example[row : row + 1]
    if isinstance(example, dict):
        return {name: leaf[row : row + 1] for name, leaf in example.items()}
    return tuple(leaf[row : row + 1] for leaf in example)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def close(left: Tensor, right: Tensor) -> bool:
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(left.dtype, 1e-4)
    scale = float(right.abs().max())
    return left.shape == right.shape and bool(torch.allclose(left, right, rtol=tolerance, atol=tolerance * scale))


def test_names_are_unique() -> None:
    assert sum(map(len, FAMILIES.values())) == len(ZOO)


def test_every_family_has_its_own_specimens_only() -> None:
    assert {(name, s.family) for name, family in FAMILIES.items() for s in family if s.family != name} == set()


@every
def test_says_what_it_is(specimen: Specimen) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", specimen.name)
    assert len(specimen.note) > 5
    assert specimen.refused or specimen.draws > 0


@every
def test_is_built_the_same_every_time(specimen: Specimen, built: tuple[nn.Module, Example]) -> None:
    generator = torch.get_rng_state()
    again, example = specimen.build()
    assert torch.equal(generator, torch.get_rng_state())
    assert same(state(built[0]), state(again))
    assert all(torch.equal(x, y) for x, y in zip(leaves(built[1]), leaves(example), strict=True))


@every
def test_is_built_in_eval_with_four_rows(specimen: Specimen, built: tuple[nn.Module, Example]) -> None:
    module, example = built
    assert not any(m.training for m in module.modules())
    assert {len(leaf) for leaf in leaves(example)} == {ROWS}


@every
@torch.no_grad()
def test_draws_in_eval_only_what_it_says(specimen: Specimen, built: tuple[nn.Module, Example]) -> None:
    module, example = built
    with Draws() as draws:
        output = specimen.pick(call(module, example))
    assert len(draws.seen) == specimen.draws_in_eval, draws.seen
    assert len(output) == ROWS
    assert output.isfinite().all()
    if not specimen.draws_in_eval:
        assert torch.equal(output, specimen.pick(call(module, example)))


@every
@torch.no_grad()
def test_draws_what_it_says_at_every_seed(specimen: Specimen, built: tuple[nn.Module, Example]) -> None:
    module, example = built
    for seed in range(3):
        with torch.random.fork_rng(devices=[]), reference(specimen, module), Draws() as draws:
            torch.manual_seed(seed)
            call(module, example)
        assert len(draws.seen) == specimen.draws, draws.seen


@every
def test_varies_in_every_row_or_has_nothing_to_draw(specimen: Specimen, built: tuple[nn.Module, Example]) -> None:
    drawn = reference_passes(specimen, *built, 8)
    spread = drawn.std(dim=0).flatten(1).amax(1) if drawn.ndim > 2 else drawn.std(dim=0)
    if specimen.draws:
        assert spread.min() > 1e-3 * drawn.abs().max()
    elif not specimen.foreign:
        assert spread.max() == 0


@every
@torch.no_grad()
def test_the_reference_leaves_no_trace(specimen: Specimen, built: tuple[nn.Module, Example]) -> None:
    module, example = built
    plain, before, generator = specimen.pick(call(module, example)), state(module), torch.get_rng_state()
    flags = [m.training for m in module.modules()]
    drawn = reference_passes(specimen, module, example, 2)
    assert drawn.shape == (2, *plain.shape)
    assert [m.training for m in module.modules()] == flags
    assert same(before, state(module))
    assert torch.equal(generator, torch.get_rng_state())


@every
@torch.no_grad()
def test_keeps_the_mean_where_it_says_so(specimen: Specimen, built: tuple[nn.Module, Example]) -> None:
    module, example = built
    try:
        with Expected():
            plain = specimen.pick(call(module, example))
        with reference(specimen, module), Expected():
            expected = specimen.pick(call(module, example))
    except UnknownExpectation as reason:
        pytest.skip(str(reason))
    if not specimen.foreign:
        assert close(expected, plain) == specimen.mean_preserving


@pytest.mark.parametrize("specimen", [param for param in EVERY if not ZOO[str(param.id)].row_coupled])
@torch.no_grad()
def test_rows_answer_for_themselves(specimen: Specimen, built: tuple[nn.Module, Example]) -> None:
    module, example = built
    try:
        with reference(specimen, module), Expected():
            together = specimen.pick(call(module, example))
            alone = [specimen.pick(call(module, one_row(example, row))) for row in range(ROWS)]
    except UnknownExpectation as reason:
        pytest.skip(str(reason))
    if not specimen.foreign:
        assert close(torch.cat(alone), together)


def test_no_file_is_long() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in Path(__file__).parent.glob("*.py")}
    assert max(lengths.values()) <= 300, lengths
