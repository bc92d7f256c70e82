import hashlib
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from moray.parallel.checkpoint.tensor_file import DTYPE_OF_NAME, PIECE_BYTES, write_tensors


def test_safetensors_reads_every_dtype_and_shape(tmp_path: Path) -> None:
    tensors = {
        "flag": torch.tensor([True, False, True]),
        "half": torch.arange(5).to(torch.bfloat16),
        "scalar": torch.tensor(2**40 + 1),
        "empty": torch.zeros(0, 3, dtype=torch.float16),
        "double": torch.tensor([[1 / 3, 2 / 3]], dtype=torch.float64),
        "several pieces": torch.arange(PIECE_BYTES // 4 * 2 + 3, dtype=torch.int32),
        "ünïcode": torch.arange(3, dtype=torch.uint8),
        **{f"as {name}": torch.ones(3).to(dtype) for name, dtype in DTYPE_OF_NAME.items()},
    }
    stored = write_tensors(tmp_path / "x.safetensors", tensors)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert stored.size == len(content)
    assert stored.sha256 == hashlib.sha256(content).hexdigest()
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it
        assert all(file.get_tensor(name).data_ptr() % tensor.element_size() == 0 for name, tensor in tensors.items())


def test_no_tensors_make_a_readable_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {})
    assert load_file(tmp_path / "x.safetensors") == {}


def test_a_failed_write_names_the_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*x\.safetensors'"):
            write_tensors(tmp_path / "x.safetensors", {"w": torch.zeros(4096)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_dtype_without_a_name_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'w' has dtype torch\.complex128"):
        write_tensors(tmp_path / "x.safetensors", {"w": torch.zeros(2, dtype=torch.complex128)})
