"""State dicts into safetensors: what cannot be read or written is said in one sentence of ours."""

from pathlib import Path
from typing import Any

import pytest
import torch

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
