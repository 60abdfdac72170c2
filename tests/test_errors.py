"""Errors: one tree, and messages that help."""

import inspect

import pytest

from mcdrop import errors
from mcdrop.errors import ArtifactError, InputError, MCDropError, MissingExtra, ModelNotFound, UnknownName

CLASSES = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}


def test_every_error_is_listed_and_of_one_tree() -> None:
    assert sorted(CLASSES) == errors.__all__
    assert all(issubclass(kind, MCDropError) for kind in CLASSES.values())


def test_the_tree_is_the_one_that_is_drawn() -> None:
    """Each class stands one step further right than its parent, below it."""
    path: list[tuple[int, str]] = []
    drawn = {}
    for line in (errors.__doc__ or "").splitlines():
        words = line.replace("│", " ").replace("├──", "   ").replace("└──", "   ").split()
        if not words or words[0] not in CLASSES:
            continue
        depth = line.index(words[0])
        path = [(at, name) for at, name in path if at < depth]
        drawn[words[0]] = path[-1][1] if path else "Exception"
        path.append((depth, words[0]))
    assert drawn == {name: kind.__bases__[0].__name__ for name, kind in CLASSES.items()}


def test_errors_are_also_what_python_would_raise() -> None:
    assert issubclass(InputError, ValueError)
    assert issubclass(MissingExtra, ImportError)
    assert issubclass(UnknownName, InputError)
    assert issubclass(ModelNotFound, ArtifactError)


def test_an_unknown_name_comes_with_all_known_ones_in_order() -> None:
    assert str(UnknownName("interval", "nope", ["normal", "mean"])) == (
        "unknown interval 'nope'; choose one of: mean, normal"
    )
    assert str(UnknownName("score", None, {"b": 1, "a": 2})) == "unknown score None; choose one of: a, b"


@pytest.mark.parametrize("given", ["nope", None, ["b"], {"b": 1}, 1])
def test_a_name_is_checked_whatever_it_is(given: object) -> None:
    UnknownName.check("score", "b", {"b": 1})
    with pytest.raises(UnknownName, match=r"unknown score .*; choose one of: b"):
        UnknownName.check("score", given, {"b": 1})


def test_a_missing_library_comes_with_the_command_that_installs_it() -> None:
    with pytest.raises(ImportError, match=r"ray is not installed; it comes with: pip install 'mcdrop\[ray\]'"):
        raise MissingExtra("ray", "ray")
