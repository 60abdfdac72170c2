"""State dicts into safetensors: what cannot be read or written is said in one sentence of ours."""

import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from mcdrop.convert import convert
from mcdrop.errors import ArtifactError, InputError


@pytest.mark.parametrize("data", [b"", b"garbage", b"PK\x03\x04" + bytes(100)], ids=["empty", "text", "zip"])
def test_what_torch_did_not_write_is_refused_without_its_advice(tmp_path: Path, data: bytes) -> None:
    """Torch would have the file read again with what runs its code."""
    (tmp_path / "net.pth").write_bytes(data)
    with pytest.raises(ArtifactError) as caught:
        convert(tmp_path / "net.pth", tmp_path / "net.safetensors")
    said = f"{tmp_path / 'net.pth'} is not a plain state dict: it is damaged, or torch.save did not write it"
    assert str(caught.value) == said


def test_whatever_torch_stumbles_over_is_refused_in_a_sentence(tmp_path: Path) -> None:
    """A table in place of weights is an opcode of pickle with nothing to work on: torch raises one of many errors."""
    source = tmp_path / "rows.csv"
    for first in range(256):
        for data in (bytes([first]), bytes([first]) + b"bc,1\n2,3"):
            source.write_bytes(data)
            with pytest.raises(ArtifactError, match=r"is not a plain state dict|does not hold a state dict"):
                convert(source, tmp_path / "net.safetensors")


def test_others_may_read_the_file_as_its_place_says(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "net.pth")
    usual, new, old = (tmp_path / name for name in ("usual", "new.safetensors", "old.safetensors"))
    usual.touch()
    old.touch()
    old.chmod(0o640)
    for target in (new, old):
        convert(tmp_path / "net.pth", target)
    assert new.stat().st_mode == usual.stat().st_mode
    assert old.stat().st_mode & 0o777 == 0o640


def test_no_bytes_are_held_beside_the_weights_when_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the file are let go of, and those to write are never together. Tensors are not traced."""
    held = []

    def traced(*given: Any) -> None:
        tracemalloc.reset_peak()
        save_file(*given)
        held.append(tracemalloc.get_traced_memory()[1])

    torch.save({f"w{i}": torch.ones(2**16) for i in range(8)}, tmp_path / "net.pth")
    monkeypatch.setattr("mcdrop.convert.save_file", traced)
    tracemalloc.start()
    convert(tmp_path / "net.pth", tmp_path / "net.safetensors")
    tracemalloc.stop()
    assert len(held) == 1
    assert held[0] < 2**20  # of two


def test_a_pipe_gets_the_weights_and_stays_one(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(3.0)}, tmp_path / "net.pth")
    reader, writer = os.pipe()
    convert(tmp_path / "net.pth", f"/dev/fd/{writer}")
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        assert load(stream.read())["w"].tolist() == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:.*(quant|prototype|Sparse).*:UserWarning", "ignore:.*deprecated")
@pytest.mark.parametrize(
    ("name", "made", "said"),
    [
        ("w", lambda: torch.eye(2).to_sparse(), "is of torch.sparse_coo"),
        ("w", lambda: torch.eye(2).to_sparse_csr(), "is of torch.sparse_csr"),
        ("w", lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "is quantized"),
        ("w", lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "is nested"),
        ("w", lambda: torch.empty(2, device="meta"), "is on the device meta"),
        ("w", lambda: torch.ones(2, dtype=torch.complex128), "is of torch.complex128"),
        ("__metadata__", lambda: torch.ones(2), "has the one name that the format keeps"),
        ("w\ud800", lambda: torch.ones(2), "has a name that is not text"),
    ],
)
def test_a_tensor_that_the_format_cannot_hold_is_named(tmp_path: Path, name: str, made: Any, said: str) -> None:
    torch.save({"plain": torch.ones(2), name: made()}, tmp_path / "net.pth")
    with pytest.raises(ArtifactError) as caught:
        convert(tmp_path / "net.pth", tmp_path / "net.safetensors")
    assert f"the tensor {name!a} {said}" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]


def test_a_target_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "net.pth")
    target = tmp_path / "no" / "net.safetensors"
    with pytest.raises(InputError, match=f"cannot write {target}: .*No such file"):
        convert(tmp_path / "net.pth", target)


@pytest.mark.parametrize("name", ["model", "module", "state_dict"])
def test_a_tensor_may_be_named_as_what_holds_weights_is(tmp_path: Path, name: str) -> None:
    for i, saved in enumerate(({name: torch.ones(2)}, {"epoch": 3, name: {name: torch.ones(2)}})):
        torch.save(saved, tmp_path / f"{i}.pth")
        assert convert(tmp_path / f"{i}.pth", tmp_path / f"{i}.safetensors") == 1
        assert list(load((tmp_path / f"{i}.safetensors").read_bytes())) == [name]
