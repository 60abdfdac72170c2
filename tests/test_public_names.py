"""The public names: all are there, documented, sorted, loaded when first used."""

import importlib
import inspect
import subprocess
import sys

import pytest

import mcdrop

NAMES = [name for name in mcdrop.__all__ if not name.startswith("_") and name != "errors"]


def test_all_names_are_there_and_no_other() -> None:
    assert dir(mcdrop) == sorted([*mcdrop.__all__, "layers", "metrics", "plotting"])
    for name in mcdrop.__all__:
        assert getattr(mcdrop, name) is not None
    with pytest.raises(AttributeError, match="module 'mcdrop' has no attribute 'nope'"):
        mcdrop.nope  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_at_home_in_a_module_that_lists_it(name: str) -> None:
    value = getattr(mcdrop, name)
    home = inspect.getmodule(value)
    assert home is not None
    assert home.__name__.startswith("mcdrop.")
    assert name in home.__all__


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_a_docstring_that_begins_with_a_sentence(name: str) -> None:
    first = (inspect.getdoc(getattr(mcdrop, name)) or "").splitlines()[0]
    assert first.endswith(".")
    assert first[0].isupper()


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isfunction(getattr(mcdrop, name))])
def test_functions_are_typed_and_take_options_by_keyword_only(name: str) -> None:
    """At most three may stand without a name, and of those with a default only the second."""
    signature = inspect.signature(getattr(mcdrop, name))
    assert signature.return_annotation is not signature.empty
    assert all(parameter.annotation is not parameter.empty for parameter in signature.parameters.values())
    by_place = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(by_place) <= 3
    assert all(p.default is p.empty for i, p in enumerate(by_place) if i != 1)


def test_the_functions_win_over_the_modules_of_the_same_name() -> None:
    """``import mcdrop.predict`` anywhere must not turn ``mcdrop.predict`` into a module."""
    script = "import mcdrop, mcdrop.predict, mcdrop.audit; print(callable(mcdrop.predict))"
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_modules_that_are_used_by_their_own_names_are_there_when_asked_for() -> None:
    """As ``mcdrop.layers.DropConnect`` after ``import mcdrop`` alone; what has been imported is an attribute anyway."""
    for name in ("layers", "metrics", "plotting"):
        assert mcdrop.__getattr__(name) is importlib.import_module(f"mcdrop.{name}")


def test_the_version_is_that_of_the_project() -> None:
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(mcdrop.__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["version"] == mcdrop.__version__
