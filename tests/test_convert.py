"""State dicts into safetensors: what cannot be read or written is said in one sentence of ours."""

from pathlib import Path

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


def test_a_target_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "net.pth")
    target = tmp_path / "no" / "net.safetensors"
    with pytest.raises(InputError, match=f"cannot write {target}: .*No such file"):
        convert(tmp_path / "net.pth", target)
