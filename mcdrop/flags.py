"""The training flags of a live shadow: which are on, and what is done where a pass reads one that nobody knows.

The probe looks at flags that some rows read. Other rows may read others: longer ones, or those that a branch on a
value sends another way. So flags without a verdict are watched, rows of a new signature are looked at first, and where
a pass has read such a flag the probe looks again. A captured graph reads none and pays nothing.

What is found of a signature is of that one alone, beside what the example has shown: answers do not depend on which
rows came before. Not looked at again are flags whose effect a value switches where they were read before:
``if self.training and (x > 50).any()`` stays off for later rows of a shape whose first rows have no such value. Nor are
flags that drew on the example: they are on for all rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from mcdrop.effects import Verdict
from mcdrop.errors import UncontrolledDraw
from mcdrop.forward import may_fail
from mcdrop.generators import own_generator, with_private
from mcdrop.observed import Observation, Observer, Readers, same, unwatched, watched
from mcdrop.outputs import Pick
from mcdrop.probe import probe
from mcdrop.reach import NEAR
from mcdrop.refusals import PARTIAL
from mcdrop.rows import Rows
from mcdrop.shadow import takes_masks
from mcdrop.trace import Trace

__all__ = ["Flags", "in_front", "lost_draws", "lost_message"]

_SEED = 1
_FEW = 4
_TELLING = 3  # rows that are put in front: a trace runs so many
_READ_IT = (nn.TransformerEncoder, nn.TransformerEncoderLayer)  # layers of torch that read a flag and draw nothing


@dataclass
class Flags:
    """The flags of a shadow by verdict; used by one thread at a time.

    ``verdicts`` are the example's, by which the flags are set but for the while that they are ``under`` those of other
    rows. With ``strict`` draws that are lost refuse the rows. ``noted`` says whether the network bears that its flags
    are watched: one that looks for them among its attributes does not.
    """

    live: nn.Module
    pick: Pick
    verdicts: Mapping[str, Verdict]
    strict: bool
    noted: bool = True
    _now: dict[str, Verdict] = field(init=False)
    _on: list[nn.Module] = field(default_factory=list)
    _watched: list[nn.Module] = field(default_factory=list)
    _readers: Readers = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begins with the verdicts of the example."""
        self._now = dict(self.verdicts)

    @classmethod
    def of(cls, live: nn.Module, rows: Rows, pick: Pick, verdicts: dict[str, Verdict], *, strict: bool) -> "Flags":
        """Sets the flags of a shadow whose flags are off, which was probed with such rows."""
        flags = cls(live, pick, verdicts, strict)
        flags._set()
        with flags._aside():
            look = Observer(live, rows, pick)
            look.base(_SEED, flags._on)
            flags.noted = look.notes
        return flags

    def over(self, live: nn.Module) -> "Flags":
        """Sets the flags of another shadow alike."""
        other = Flags(live, self.pick, self.verdicts, self.strict, self.noted)
        other._set()
        return other

    def telling(self, rows: Rows) -> list[int]:
        """Gives a few rows beyond the first ones that show flags which those do not; none of a usual network.

        Where no value tells the way, all rows go the same.
        """
        if rows.count <= _FEW or not self.noted:
            return []
        with may_fail(), self._aside():  # of a network that takes no other number of rows its passes will say so
            look = Observer(self.live, rows.take(slice(0, _FEW)), self.pick)
            if any(seen.by_values for seen in self._seen(look)) and self._news(rows):
                found = (row for row in range(_FEW, rows.count) if self._news(rows.take([0, 1, row])))
                return [*islice(found, _TELLING)]
        return []

    @contextmanager
    def under(self, verdicts: dict[str, Verdict]) -> Iterator[None]:
        """Sets the flags by the verdicts of a signature for the while; what is found meanwhile is added to them."""
        before = self._now
        self._use(verdicts)
        try:
            yield
        finally:
            self._use(before)

    def look(self, rows: Rows) -> None:
        """Looks at rows of another signature, and probes with them where they show flags in another light.

        Raises:
            UncontrolledDraw: they draw what no mask controls.
        """
        if self.noted:
            with self._aside():
                if self._news(few := rows.take(slice(0, _FEW))) or self._hides(few):
                    self._learn(few)

    def check(self, found: Trace) -> None:
        """Checks what a trace of rows of another signature draws.

        Raises:
            UncontrolledDraw: no mask controls it.
        """
        if (lost := _escapes(found.escaped)) and self.strict:
            raise UncontrolledDraw(lost_message(type(self.live).__name__, lost))

    def begin(self) -> None:
        """Begins with passes of which ``end`` is asked."""
        self._readers.clear()

    @property
    def read(self) -> bool:
        """Whether a flag of which nothing is known was read since it began."""
        return bool(self._readers)

    def end(self, rows: Rows) -> bool:
        """Whether passes of rows have read flags of which nothing was known: they are to be run again.

        Raises:
            UncontrolledDraw: what such a flag does could not be told.
        """
        if not self.read or not (unknown := self._unknown(self._readers)):
            return False
        with self._aside(), own_generator():
            with_private(self.live, most=NEAR)
            self._learn(rows)
        left = [path or "the root module" for path in unknown if path not in self._now]
        if left:
            raise UncontrolledDraw(
                f"{type(self.live).__name__} reads the training flag of {', '.join(left)} in some passes of these rows "
                "only, and of none of its example, so what it draws there could not be told: read it in every pass, "
                "or wrap the network with an example of rows that go this way"
            )
        return True

    def _set(self) -> None:
        """Switches on what draws, and watches what nothing is known of."""
        unknown = []
        for path, child in self.live.named_modules():
            verdict, draws = self._now.get(path), _only_draws(child)
            if verdict.kind == "stochastic" if verdict else draws:
                self._on.append(child)
                child.training = True
            elif verdict is None and draws is None:
                unknown.append(child)
        if self.noted:
            self._watched = watched(unknown, self._readers)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Takes all flags off and leaves them unwatched for the while, as the probe wants them."""
        unwatched(self._watched)
        for child in self._on:
            child.training = False
        try:
            yield
        finally:
            self._on, self._watched = [], []
            self._readers.clear()
            self._set()

    def _use(self, verdicts: dict[str, Verdict]) -> None:
        if verdicts == self._now:  # as for most signatures
            self._now = verdicts
            return
        with self._aside():
            self._now = verdicts

    def _unknown(self, readers: Readers) -> list[str]:
        """The modules of which nothing is known, of those that were read."""
        return [
            path
            for path, child in self.live.named_modules()
            if id(child) in readers
            and path not in self._now
            and not isinstance(child, _NormBase)
            and (_only_draws(child) is not False or not all(readers[id(child)]))  # or where others go by it
        ]

    def _modules(self, verdicts: Mapping[str, Verdict], kind: str) -> list[nn.Module]:
        by_path = dict(self.live.named_modules())
        return [by_path[path] for path, one in verdicts.items() if one.kind == kind]

    def _seen(self, look: Observer) -> Iterator[Observation]:
        """A pass as it is, and one where flags are on besides that had no effect where they were read."""
        yield look.base(_SEED, self._on)
        if inert := self._modules(self._now, "inert"):
            yield look.observe([*self._on, *inert], seed=_SEED)

    def _news(self, rows: Rows) -> bool:
        """Whether a pass of rows reads flags of which nothing is known, or those without an effect have one here."""
        first: Observation | None = None
        for seen in self._seen(Observer(self.live, rows, self.pick)):
            first = first or seen
            if self._unknown(seen.readers) or seen.draws != first.draws or not same(seen, first):
                return True
        return False

    def _hides(self, rows: Rows) -> bool:
        """Whether flags that stay off and drew nothing where they were probed draw here."""
        quiet = self._modules({path: one for path, one in self._now.items() if not one.draws}, "refused")
        if quiet:
            look = Observer(self.live, rows, self.pick)
            base = look.base(_SEED, self._on)
            with may_fail():
                return look.observe([*self._on, *quiet], seed=_SEED).draws > base.draws
        return False

    def _settled(self, path: str, child: nn.Module) -> bool:
        """Whether a flag stays as it is whatever a probe finds."""
        before = self._now.get(path)
        if before is None:
            return takes_masks(child) and _only_draws(child) is False  # on, it would be a draw of rate 0
        return before.kind not in ("inert", "refused") or before.draws > 0

    def _learn(self, rows: Rows) -> None:
        """Probes with rows, and keeps what is found of flags that were not known, or drew nothing.

        Raises:
            UncontrolledDraw: flags that stay off draw.
        """
        by_path = dict(self.live.named_modules())
        found = probe(self.live, rows, self.pick)
        new = {path: one for path, one in found.items() if not self._settled(path, by_path[path])}
        lost, verdicts = _staying_off(new), {**self._now, **new}
        on = self._modules(verdicts, "stochastic")
        lost += _escapes(Observer(self.live, rows, self.pick).base(_SEED, on).escaped)
        if lost and self.strict:  # and not kept, so that the next rows are refused as well
            raise UncontrolledDraw(lost_message(type(self.live).__name__, lost))
        self._now.update(new)


def _only_draws(layer: nn.Module) -> bool | None:
    """Whether the flag of a layer of torch's, which does nothing else, draws; None where its code does not tell.

    A layer that draws may be on where nobody has read it, and one whose flag does nothing need not be watched.
    """
    if isinstance(layer, _NormBase):
        return False
    own = layer._forward_hooks or layer._forward_pre_hooks or ("forward" in vars(layer) and not takes_masks(layer))
    if own or not type(layer).__module__.startswith("torch.nn.modules.") or isinstance(layer, _READ_IT):
        return None
    if isinstance(layer, _DropoutNd):
        return float(layer.p) > 0
    if isinstance(layer, nn.MultiheadAttention | nn.RNNBase):
        return float(layer.dropout) > 0
    return isinstance(layer, nn.RReLU)


def in_front(rows: Rows, numbers: Sequence[int]) -> Rows:
    """Gives the same rows, those of some numbers before the others."""
    return rows.take([*numbers, *(row for row in range(rows.count) if row not in numbers)]) if numbers else rows


def lost_draws(found: Trace, verdicts: dict[str, Verdict], escaped: Sequence[tuple[str, str]] = ()) -> list[str]:
    """Names what draws and no mask controls: operations without a rule, and draws of flags that stay off."""
    lost = _escapes([*found.escaped, *escaped])
    forced = [found.off[index] for index in found.forced]
    return lost + _staying_off(verdicts, forced)


def _staying_off(verdicts: Mapping[str, Verdict], forced: Sequence[str | None] = ()) -> list[str]:
    """Names flags that stay off and the draws that they switch on, but for those that are forced."""
    return [
        f"{draws} draws in {path or 'the root module'}, which {one.reason}"
        for path, one in verdicts.items()
        if one.kind == "refused" and (draws := one.draws - forced.count(path)) > 0
    ]


def _escapes(escaped: Sequence[tuple[str, str]]) -> list[str]:
    return sorted({f"{operation} in {path or 'the root module'}" for path, operation in escaped})


def lost_message(name: str, lost: Sequence[str], last: str = PARTIAL) -> str:
    """Says what a network draws that no mask controls, and what to do."""
    return (
        f"{name} draws random numbers that no mask controls: {'; '.join(lost)}. Write the draw with torch.bernoulli, "
        f"torch.rand, torch.randn or F.dropout in a module of its own, teach mcdrop with mcdrop.register, or {last}"
    )
