"""Discovery: which parts of a network are random, proved by looking at what they do.

The probe says which training flags draw; then every draw is traced, and a mask on it is shown to reach the output.
Whatever draws and cannot be controlled is named, and by default the network is refused.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mcdrop.audit import Audit, SiteReport
from mcdrop.checks import alone, changing, mean_preserving, same_again, seeded_anew, unrepeatable
from mcdrop.effects import Verdict, Verdicts
from mcdrop.errors import InputError, MCDropError, ModelRefused, NoStochasticSite, UncontrolledDraw
from mcdrop.flags import Flags, in_front, lost_draws, lost_message
from mcdrop.forward import may_fail, to_tensors
from mcdrop.generators import doubted, known, own_generator, with_private
from mcdrop.outputs import Pick
from mcdrop.probe import probe
from mcdrop.quiet import first_line
from mcdrop.reach import NEAR
from mcdrop.record import Spy, record
from mcdrop.refusals import check_reach, none_message, whose
from mcdrop.rows import Rows
from mcdrop.shadow import live_shadow
from mcdrop.trace import Trace, trace
from mcdrop.volatile import Left, own, starts

__all__ = ["UNUSABLE", "Discovery", "Overrules", "discover", "matching"]

UNUSABLE = "the network cannot take these inputs"

_FEW_ROWS, _MANY_ROWS = 4, 64
_REMEDIES = {  # by what an error says
    "fullgraph=True": "; call torch.compiler.set_stance('force_eager') before, which runs what it compiles as it is",
    "unexpected keyword": "; for one that takes a dict, wrap a module whose forward(self, **inputs) hands it on",
}


@dataclass(frozen=True)
class Overrules:
    """What the user decides over the probe: module paths or types, and dropout that its author switched off.

    ``include`` switches on the training flag of modules that the probe left in eval, ``exclude`` switches draws off.
    ``force_literal`` also drops where a call says ``training=False``. ``strict=False`` warns where a draw of training
    is lost, instead of refusing the network.
    """

    include: tuple[str | type, ...] = ()
    exclude: tuple[str | type, ...] = ()
    force_literal: bool = False
    strict: bool = True


@dataclass(frozen=True)
class Discovery:
    """A network's two shadows (draws on; all off), modules whose draws stay off, forced calls, and the audit.

    ``found`` is the trace of the example, of which ``rows`` are a few; ``beside`` says that the network takes no single
    row, and one beside itself as it takes several. ``front`` has the numbers of later rows of the example that show
    what the first ones do not: put in front of those they are the few. ``flags`` are those of the live shadow.
    """

    live: nn.Module
    plain: nn.Module
    excluded: frozenset[str]
    force: Callable[[str], bool]
    audit: Audit
    rows: Rows
    found: Trace
    beside: bool
    flags: Flags
    front: tuple[int, ...] = ()


@own_generator()
def discover(
    module: nn.Module, rows: Rows, pick: Pick, overrules: Overrules = Overrules(), *, front: tuple[int, ...] = ()
) -> Discovery:  # fmt: skip
    """Finds every random draw of the module's training behaviour and proves each one live.

    ``front`` has the numbers of rows that stand in front already.

    Raises:
        InputError: the module cannot take the rows, or an overrule names nothing in it.
        NoStochasticSite: no draw reaches the output.
        UncontrolledDraw: something draws random numbers that no mask controls.
        ModelRefused: the shadow does not reach a part of the network.
    """
    name = type(module).__name__
    live, plain = live_shadow(module, drawing=True), live_shadow(module)
    _check_initialised(module)
    unseen = with_private(live)
    few = to_tensors(rows.take(slice(0, _FEW_ROWS)), live)
    spy = _first_look(live, few, pick, rows)
    # where each pass begins as the first one did, what a pass makes is not there for the later looks
    made, warnings = spy.escaped if spy.written else [], _own_written((live, plain), spy.written, spy.tied)
    _own_swapped((live, plain), spy.swapped)
    check_reach(module, live, few, pick)
    verdicts = _overruled(live, _probed(live, few, pick), overrules.include, overrules.exclude)
    flags = Flags.of(live, few, pick, verdicts, strict=overrules.strict)
    if not front and (telling := flags.telling(to_tensors(rows.take(slice(0, _MANY_ROWS)), live))):
        return discover(module, in_front(rows, telling), pick, overrules, front=(*telling,))
    warnings += _own_written((live, plain), (spy := _look(live, few, pick)[1]).written, spy.tied)
    refused = frozenset(path for path, verdict in verdicts.items() if verdict.kind == "refused")

    def force(path: str) -> bool:
        return overrules.force_literal or path in refused

    found = trace(live, few, pick, force)
    warnings += _own_forced((live, plain), spy, found)
    seeded = seeded_anew(live, few, pick, spy)
    lost = lost_draws(found, verdicts, [*made, *spy.escaped]) + unrepeatable(live, few, pick, found) + seeded
    if lost and overrules.strict:
        raise UncontrolledDraw(lost_message(name, *whose(live, few, pick, lost)))
    excluded = frozenset(path for path, verdict in verdicts.items() if verdict.kind == "excluded")
    single = alone(live, few, pick, found, excluded)
    warnings += [*lost, *unseen, *_in_doubt(name, overrules), *_unclear(found), *single.said]
    changes = changing(live, few, pick, found, by_one=not (single.said or single.beside or found.unclear))
    sites = tuple(_report(found, index, excluded, changes) for index in range(len(found.sites)))
    preserving = mean_preserving(live, plain, few, pick, found)
    audit = _audit(module, verdicts, sites, warnings, preserving=preserving)
    if not audit.live:
        why = [f"it draws what no mask controls: {', '.join(lost)}"] if lost else single.said
        raise NoStochasticSite("; ".join([none_message(live, audit, found), *why]))
    return Discovery(live, plain, excluded, force, audit, few, found, single.beside, flags, front)


def _first_look(live: nn.Module, rows: Rows, pick: Pick, example: Rows) -> Spy:
    """Runs one pass that cannot write to the user's tensors, and checks that its output can be used."""
    try:
        output, spy = _look(live, rows, pick)
    except MCDropError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{name}: {tuple(leaf.shape)} {leaf.dtype}" for name, leaf in rows.named())
        said = (remedy for part, remedy in _REMEDIES.items() if part in str(error))
        remedy = next(said, None) or _taken_whole(live, example, pick)
        raise InputError(f"{UNUSABLE} ({shapes}): {first_line(error)}{remedy}") from error
    if output.is_complex():
        raise InputError("the picked output is complex; return real numbers, such as torch.view_as_real of it")
    shape = tuple(output.shape)
    if not shape or shape[0] != rows.count:
        several = "; give an example of several rows, where squeeze() leaves that axis" if rows.count == 1 else ""
        raise InputError(
            f"the picked output has the shape {shape} for {rows.count} rows; its first axis must be the rows{several}"
        )
    return spy


def _taken_whole(live: nn.Module, example: Rows, pick: Pick) -> str:
    """Says so, and what to do, where the network takes all rows of the example and not a few of them."""
    if example.count > _FEW_ROWS:
        with may_fail():
            _look(live, to_tensors(example, live), pick)
            return f"; it takes all {example.count} rows of the example{Rows.ONE_ROW}"
    return ""


def _probed(live: nn.Module, rows: Rows, pick: Pick) -> Verdicts:
    """Probes all flags, and once more where the network has made or imported generators meanwhile."""
    before, verdicts = len(known()), probe(live, rows, pick)
    with_private(live, most=NEAR)
    return verdicts if len(known()) == before else probe(live, rows, pick)


def _look(live: nn.Module, rows: Rows, pick: Pick) -> tuple[Tensor, Spy]:
    """Runs a pass, and a second one where the first leaves something on the network: what that reads is written to.

    What is only kept, such as positions for rows of a shape, stays: a graph need not hold how it is made. Generators
    that were made or imported are known after that.
    """
    outputs: list[Tensor] = []

    def keep(result: object) -> Tensor:
        outputs.append(pick(result))
        return outputs[-1]

    left = Left(live)
    source, spy = record(live, rows, keep, seed=0, rewinds=True)
    changed = left.changed()
    if changed:
        try:
            again, _ = record(live, rows, keep, seed=0)
            record(live, rows, keep, seed=1)
            reads = again.draws != source.draws or not same_again(*outputs)
        except Exception:  # whatever a network does with what it has left
            reads = True
        if reads:
            left.put_back()
            spy.written.update(changed)
    with_private(live, most=NEAR)
    return outputs[0], spy


def _check_initialised(module: nn.Module) -> None:
    lazy = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if is_lazy(tensor)]
    if lazy:
        raise ModelRefused(
            f"{type(module).__name__} has no weights yet ({', '.join(lazy)}): run it once, train it, then wrap it"
        )


def _overruled(
    live: nn.Module, verdicts: dict[str, Verdict], include: tuple[str | type, ...], exclude: tuple[str | type, ...]
) -> dict[str, Verdict]:
    """Puts the user's decisions over the probe's."""
    verdicts = dict(verdicts)
    for chosen, verdict in (
        (include, Verdict("stochastic", "included by the user")),
        (exclude, Verdict("excluded", "excluded by the user")),
    ):
        for which in chosen:
            paths = matching(live, which)
            if not paths:
                raise InputError(f"no module of the network matches {which!r}; paths are as in named_modules()")
            verdicts.update(dict.fromkeys(paths, verdict))
    return verdicts


def matching(module: nn.Module, which: str | type) -> list[str]:
    """Gives the paths of the modules that a path or a type means."""
    named = module.named_modules()
    return [path for path, child in named if (path == which if isinstance(which, str) else isinstance(child, which))]


# -- proof -------------------------------------------------------------------------------------------------------------


def _own_written(shadows: tuple[nn.Module, ...], written: Collection[str], tied: Collection[str]) -> list[str]:
    """Makes shadows start every forward from the same of what the network writes to even in eval; says from what.

    Raises:
        ModelRefused: it writes to a parameter, or to memory that two share.
    """
    own(shadows, starts(shadows[0], written, tied))
    said = "is written to even in eval mode: every pass starts from mcdrop's own copy of it"
    return [f"{name} {said}" for name in sorted(written)]


def _own_forced(shadows: tuple[nn.Module, ...], spy: Spy, found: Trace) -> list[str]:
    """Does the same with what is written to, and swapped, where draws that are off are forced to drop."""
    _own_swapped(shadows[:1], found.swapped)
    return _own_written(shadows, {*found.written} - spy.written, ())


def _own_swapped(shadows: tuple[nn.Module, ...], paths: Collection[str]) -> None:
    """Gives shadows their own dicts of tensors where a forward swaps some for a while, as ``functional_call`` does."""
    for owner in [shadow.get_submodule(path) for shadow in shadows for path in paths]:
        owner.__dict__.update(_parameters=dict(owner._parameters), _buffers=dict(owner._buffers))


def _audit(
    module: nn.Module, verdicts: dict[str, Verdict], sites: tuple[SiteReport, ...], warnings: Sequence[str], *,
    preserving: bool,
) -> Audit:  # fmt: skip
    return Audit(
        model=type(module).__name__,
        modules=sum(1 for _ in module.modules()),
        sites=sites,
        stochastic=tuple(path for path, verdict in verdicts.items() if verdict.kind == "stochastic"),
        kept={p: v.reason for p, v in verdicts.items() if v.kind in ("norm", "refused", "excluded")},
        mean_preserving=preserving,
        injected="; ".join(text for part in module.modules() if (text := vars(part).get("_mcdrop_injected"))) or None,
        warnings=tuple(warnings),
    )


def _report(found: Trace, index: int, excluded: frozenset[str], changes: Callable[[int], bool]) -> SiteReport:
    """Reports on one site; ``changes`` says whether a mask on it alone changes the output."""
    site = found.sites[index]
    verdict, reason = "live", "changes the output"
    if site.constant:
        verdict, reason = "idle", f"its drop rate is {site.p:.12g}: all passes have one mask"
    elif not changes(index):
        verdict, reason = "idle", "no mask on it changes the output"
    if site.path in excluded:
        verdict, reason = "excluded", "excluded by the user"
    p = site.p if site.kind == "bernoulli" else None
    shared = found.layouts[index] is None and site.name not in found.unclear
    return SiteReport(site.name, site.path, site.kind, p, site.shape, verdict, reason, shared)


# -- words -------------------------------------------------------------------------------------------------------------


def _unclear(found: Trace) -> list[str]:
    return [
        f"{name}: no axis of its draw could be told to follow the rows, so a row's answer depends on its batch"
        for name in found.unclear
    ]


def _in_doubt(name: str, overrules: Overrules) -> list[str]:
    if overrules.strict and doubted(name):
        raise UncontrolledDraw(f"{doubted(name)[0]}; wrap it while nothing else does, or accept that: strict=False")
    return doubted(name)
