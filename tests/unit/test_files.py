import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from exvideo_train import files, tensor_files
from exvideo_train.errors import UserError


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    files.atomic_write_json(path, {"b": 1, "a": 2})

    def write_half_and_fail(temporary):
        temporary.write_bytes(b"half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        files.atomic_write(path, write_half_and_fail)
    assert path.read_text() == '{\n  "a": 2,\n  "b": 1\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def test_folders_are_made_and_the_umask_is_kept(tmp_path):
    path = tmp_path / "deep" / "er" / "x.txt"
    files.atomic_write_text(path, "ä")
    assert path.read_bytes() == "ä".encode()
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_target_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot write .*file/x.*writable folder"):
        files.atomic_write_text(tmp_path / "file" / "x", "")


def test_a_full_disk_is_named():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")

    def write(temporary):
        with open("/dev/full", "wb") as stream:
            stream.write(b"x" * 100_000)

    with pytest.raises(UserError, match=r"No space left.*free space"):
        files.atomic_write(files.Path("/dev/shm/exvideo_full_disk_test"), write)
    assert not [name for name in os.listdir("/dev/shm") if "exvideo_full_disk_test" in name]


def test_safetensors_header(tmp_path):
    path = tmp_path / "t.safetensors"
    tensor_files.atomic_save_safetensors(path, {"a": torch.arange(6.0).reshape(2, 3)}, {"note": "n"})
    header = tensor_files.read_safetensors_header(path)
    assert header["a"]["shape"] == [2, 3]
    assert header["__metadata__"] == {"note": "n"}


def test_tensors_of_any_kind_are_saved_as_the_library_loads_them(tmp_path):
    path = tmp_path / "t.safetensors"
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    tensors = {f"{number}": torch.arange(3).to(kind) for number, kind in enumerate(kinds)}
    tensors |= {"turned": torch.arange(6.0).reshape(2, 3).T, "one": torch.tensor(2.0), "none": torch.zeros(0, 4)}
    tensor_files.atomic_save_safetensors(path, tensors)
    tensor_files.read_safetensors_header(path)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


@pytest.mark.parametrize("num_bytes", [0, 3, 20, -1])
def test_a_truncated_safetensors_file_is_named(tmp_path, num_bytes):
    path = tmp_path / "t.safetensors"
    tensor_files.atomic_save_safetensors(path, {"a": torch.arange(6.0)})
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(UserError, match=r"t\.safetensors is truncated"):
        tensor_files.read_safetensors_header(path)


def test_not_a_safetensors_file(tmp_path):
    missing = tmp_path / "missing.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        tensor_files.read_safetensors_header(missing)
    other = tmp_path / "other.safetensors"
    for content in (
        b"<html>not found</html>" * 10,
        b"\x02" + bytes(7) + b"[]",
        b"\x0b" + bytes(7) + json.dumps({"a": "1"}).encode(),
    ):
        other.write_bytes(content)
        with pytest.raises(UserError, match="not a safetensors file"):
            tensor_files.read_safetensors_header(other)


def test_sha256(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert files.sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
