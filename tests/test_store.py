"""The store: which folders are models, in which order, and what may lie in them."""

import os
from pathlib import Path
from typing import Any

import pytest
from folders import verified, written
from hypothesis import given
from hypothesis import strategies as st

import mcdrop
from mcdrop.errors import ArtifactError, ModelNotFound
from mcdrop.store import (
    MANIFEST,
    _version_key,
    check_name,
    list_models,
    name_and_version,
    read_manifest,
    resolve,
    sha256,
)


def names(store: Path) -> list[str]:
    return [f"{entry.name}/{entry.version}" for entry in list_models(store)]


@pytest.mark.parametrize(
    ("folder", "version"), [("store/net/2", "2"), ("net/2.1-a", "2.1-a"), ("net/my model", "1"), ("net/x/..", "1")]
)
def test_what_is_not_given_is_read_off_the_place(folder: str, version: str) -> None:
    place = Path(folder)
    assert name_and_version(place, "", None) == (place.parent.name, version)
    assert name_and_version(place, "mine", "7") == ("mine", "7")


def test_the_folder_that_one_stands_in_has_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net" / "4").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "net" / "4")
    assert name_and_version(Path(), "", None) == ("net", "4")


# -- order -------------------------------------------------------------------------------------------------------------


def test_models_go_by_name_and_versions_by_number(tmp_path: Path) -> None:
    for name, version in (
        ("b", "10"),
        ("b", "9"),
        ("a", "1.10"),
        ("a", "1.9"),
        ("a", "1.9.1"),
        ("a", "2-rc"),
        ("a", "2"),
        ("c", "v10"),
        ("c", "v9"),
        ("c", "epoch9"),
        ("c", "epoch10"),
    ):
        written(tmp_path / name / version)
    assert names(tmp_path) == [
        "a/1.9",
        "a/1.9.1",
        "a/1.10",
        "a/2",
        "a/2-rc",
        "b/9",
        "b/10",
        "c/epoch9",
        "c/epoch10",
        "c/v9",
        "c/v10",
    ]
    assert resolve(tmp_path / "b") == tmp_path / "b" / "10"
    assert resolve(tmp_path / "b" / "9") == tmp_path / "b" / "9"
    assert resolve(tmp_path / "c") == tmp_path / "c" / "v10"


def test_the_newest_is_the_same_for_one_model_as_in_the_list_wherever_its_folder_was_moved(tmp_path: Path) -> None:
    written(tmp_path / "net" / "best", version="3")
    written(tmp_path / "net" / "4", version="1")
    assert names(tmp_path) == ["net/1", "net/3"]
    assert resolve(tmp_path / "net") == list_models(tmp_path)[-1].folder == tmp_path / "net" / "best"


@given(st.lists(st.integers(0, 10**9), min_size=2, unique=True), st.text(".-_az09²٣", min_size=1, max_size=6))
def test_versions_that_are_numbers_are_in_the_order_of_numbers(numbers: list[int], odd: str) -> None:
    ordered = sorted([*map(str, numbers), odd], key=_version_key)
    ordered.remove(odd)
    assert ordered == [str(number) for number in sorted(numbers)]


def test_a_folder_of_an_odd_version_does_not_hide_the_others(tmp_path: Path) -> None:
    written(tmp_path / "net" / "²", version="2")
    written(tmp_path / "net" / "1")
    assert resolve(tmp_path / "net").name == "²"
    assert len(list_models(tmp_path)) == 2


# -- what is a model ---------------------------------------------------------------------------------------------------


def test_hidden_and_half_written_folders_are_not_listed(tmp_path: Path) -> None:
    written(tmp_path / "net" / "1")
    written(tmp_path / "net" / ".writing-abc", name="net", version="2")
    written(tmp_path / "net" / ".replaced-abc" / "old", name="net", version="0")
    written(tmp_path / ".trash" / "1", name="trash")
    (tmp_path / "net" / "3").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    assert names(tmp_path) == ["net/1"]
    assert resolve(tmp_path / "net") == tmp_path / "net" / "1"


def test_a_path_with_dots_means_what_it_does_to_the_system(tmp_path: Path) -> None:
    folder = written(tmp_path / "store" / "net" / "1")
    assert names(tmp_path / "store" / "net" / "..") == ["net/1"]
    assert resolve(folder / ".." / ".." / "net").resolve() == folder
    assert list_models(tmp_path / "store" / ".." / "store")[0].folder.resolve() == folder


@pytest.mark.parametrize("place", ["nope", "file", "empty", "net/1/weights.bin"])
def test_what_is_no_store_or_model_is_said_to_be_none(tmp_path: Path, place: str) -> None:
    written(tmp_path / "net" / "1")
    (tmp_path / "file").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFound, match="there is no model at"):
        resolve(tmp_path / place)
    if place != "empty":
        with pytest.raises(ModelNotFound, match="is not a folder of models"):
            list_models(tmp_path / place)


@pytest.mark.parametrize("place", ["x" * 300, "net/" + "x" * 300, "x/" * 3000], ids=["name", "version", "path"])
def test_a_place_that_the_system_does_not_take_is_named(tmp_path: Path, place: str) -> None:
    written(tmp_path / "net" / "1")
    for read in (list_models, resolve, mcdrop.load):
        with pytest.raises(ArtifactError, match=r"x.* cannot be read: File name too long"):
            read(tmp_path / place)


@pytest.mark.parametrize("kind", ["a link to itself", "no right to enter"])
def test_a_folder_that_cannot_be_entered_is_no_empty_one(tmp_path: Path, kind: str) -> None:
    written(tmp_path / "good" / "1")
    written(tmp_path / "lost+found" / "1")  # as at the root of a volume
    assert names(tmp_path) == ["good/1"]
    if kind == "a link to itself":
        (tmp_path / "net").symlink_to(tmp_path / "net")
    elif os.geteuid() == 0:
        pytest.skip("root may enter every folder")
    else:
        written(tmp_path / "net" / "1").parent.chmod(0)
    for read, place in ((list_models, tmp_path), (resolve, tmp_path / "net"), (mcdrop.load, tmp_path / "net" / "1")):
        with pytest.raises(ArtifactError, match=r"net\S* cannot be read: "):
            read(place)


GOOD = ["a", "A1", "noisy-line", "1.2.3", "v2_final", "x" * 100]
BAD = [
    "",
    ".",
    "..",
    ".hidden",
    "-x",
    "_x",
    "a/b",
    "a\\b",
    "a b",
    "a\n",
    "x" * 101,
    "ä",
    "a\0",
    "²",
    "../a",
    "~",
    "a:b",
]


@pytest.mark.parametrize("name", GOOD)
def test_a_name_of_letters_digits_and_signs_is_taken(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_could_leave_its_folder_or_address_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="cannot be a name or version: use letters, digits"):
        check_name(name)
    for key in ("name", "version"):
        folder = written(tmp_path / key / "1", **{key: name})
        with pytest.raises(ArtifactError, match="cannot be a name or version"):
            read_manifest(folder)


# -- manifests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "format = 1",
        "format = ",
        "not toml at all",
        '{"format": 1}',
        "format = 2",
        'format = "1"',
        "x = " + "[" * 100_000,
        "format = " + "9" * 100_000,
        "a = 2024-13-45",
        b"\xff\xfe\x00",
    ],
    ids=["empty", "little", "cut", "words", "json", "newer", "text", "brackets", "digits", "date", "binary"],
)
def test_a_manifest_that_cannot_be_read_is_refused_with_its_place(tmp_path: Path, text: str | bytes) -> None:
    folder = written(tmp_path / "net" / "1")
    (folder / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ArtifactError) as caught:
        read_manifest(folder)
    assert str(folder / MANIFEST) in str(caught.value)
    with pytest.raises(ArtifactError):
        list_models(tmp_path)


def test_a_huge_manifest_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "net" / "1")
    with (folder / MANIFEST).open("r+b") as file:
        file.truncate(2**40)  # sparse: a terabyte that takes no space
    with pytest.raises(ArtifactError, match="has 1099511627776 bytes, above the limit of 1048576"):
        read_manifest(folder)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_whole_folder_is_verified(tmp_path: Path) -> None:
    verified(written(tmp_path / "net" / "1"))


def test_an_added_a_missing_and_a_changed_file_are_refused(tmp_path: Path) -> None:
    added, missing, changed = (written(tmp_path / "net" / version) for version in "123")
    (added / "extra.py").write_text("print()")
    (missing / "weights.bin").unlink()
    (changed / "weights.bin").write_bytes(b"weightz")
    with pytest.raises(
        ArtifactError, match=r"holds \['extra.py', 'weights.bin'\], its manifest lists \['weights.bin'\]"
    ):
        verified(added)
    with pytest.raises(ArtifactError, match=r"holds \[\], its manifest lists \['weights.bin'\]"):
        verified(missing)
    with pytest.raises(ArtifactError, match="is not the file that its manifest was written for"):
        verified(changed)


@pytest.mark.parametrize("name", ["weights.bin", MANIFEST])
@pytest.mark.parametrize("kind", ["symlink", "hard link", "FIFO", "folder", "dangling link"])
def test_links_and_special_files_are_refused_and_not_followed(tmp_path: Path, name: str, kind: str) -> None:
    folder = written(tmp_path / "net" / "1")
    path, elsewhere = folder / name, tmp_path / "elsewhere"
    path.rename(elsewhere)
    if kind == "symlink":
        path.symlink_to(elsewhere)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "hard link":
        path.hardlink_to(elsewhere)
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(ArtifactError, match="must be a plain file, not a link or a special file"):
        verified(folder)


@pytest.mark.parametrize("sums", ["x", [], {}, {"weights.bin": 7}, {"weights.bin": "0" * 64}, {"../x": "0" * 64}])
def test_sums_that_do_not_fit_are_refused(tmp_path: Path, sums: Any) -> None:
    with pytest.raises(ArtifactError):
        verified(written(tmp_path / "net" / "1", sha256=sums))


def test_the_sum_is_sha256(tmp_path: Path) -> None:
    """FIPS 180-4's example: the hash of "abc"."""
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
