"""The devices that every test of a fast path runs on: the CPU, and a CUDA device where there is one."""

import pytest
import torch

__all__ = ["on_each_device"]

if torch.cuda.is_available():  # answers are compared in all their digits
    torch.backends.cudnn.allow_tf32 = False

_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=_cuda)])
