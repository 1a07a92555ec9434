"""Foreign networks: what is read, and that nothing in them is run."""

import os
import pickle  # noqa: TID251 - to make the file that must not be run
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rpgcli.errors import ArtifactError, LayoutError
from rpgcli.imports import match_network, networks_in, read_network


def example() -> dict[str, torch.Tensor]:
    return {
        "layer.weight": torch.arange(6.0).view(2, 3),
        "layer.bias": torch.tensor([1.0, -2.0], dtype=torch.float16),
        "norm.num_batches_tracked": torch.tensor(7),
    }


def save(path: Path, content: object, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)  # noqa: TID251 - what other programs write
    return path


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_safetensors_are_read_as_they_were_written(tmp_path):
    save_file(example(), tmp_path / "a.safetensors")
    assert same(read_network(tmp_path / "a.safetensors"), example())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
def test_pth_files_are_read_alone_or_wrapped_and_do_not_depend_on_the_file(tmp_path, zipped, wrapper):
    content = example() if wrapper is None else {"epoch": 3, wrapper: example()}
    path = save(tmp_path / "a.pth", content, zipped)
    state = read_network(path)
    path.write_bytes(b"gone")
    assert same(state, example())


def test_parameters_and_views_come_out_as_plain_contiguous_tensors(tmp_path):
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    state = read_network(save(tmp_path / "a.pt", {"w": weight, "t": weight.detach().t()}))
    assert type(state["w"]) is torch.Tensor
    assert not state["w"].requires_grad
    assert state["t"].is_contiguous()
    assert torch.equal(state["t"], weight.detach().t())


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("written", ["pickle", "zip", "legacy"])
def test_code_in_a_pth_file_is_not_run(tmp_path, written):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    content = {"state_dict": {"w": torch.zeros(1)}, "extra": Malicious(trace)}
    if written == "pickle":
        path.write_bytes(pickle.dumps(Malicious(trace)))
    else:
        save(path, content, written == "zip")
    with pytest.raises(ArtifactError, match="cannot be read as a file of tensors"):
        read_network(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content", [[1, 2], {"w": 3}, {"w": [torch.zeros(1)]}, {1: torch.zeros(1)}, {}, torch.zeros(2)]
)
def test_pth_files_that_are_no_state_dict_are_refused(tmp_path, content):
    with pytest.raises(ArtifactError, match=r"not a state dict|other things than dense tensors|no tensor"):
        read_network(save(tmp_path / "a.pth", content))


def test_leaves_that_are_not_tensors_are_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"'lr' \(float\)"):
        read_network(save(tmp_path / "a.pth", {"w": torch.zeros(1), "lr": 0.1}))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_and_meta_tensors_are_refused(tmp_path):
    for tensor in (torch.eye(3).to_sparse(), torch.zeros(3, device="meta")):
        with pytest.raises(ArtifactError, match="other things than dense tensors"):
            read_network(save(tmp_path / "a.pth", {"w": tensor}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, value, dtype):
    save_file({"good": torch.zeros(2), "bad": torch.tensor([0, value], dtype=dtype)}, tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError, match="1 of 2 values of bad are not finite"):
        read_network(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["../w", "a/b", "a\\b", "a\x1b[31m", "line\nbreak", "", "a..b"])
def test_names_that_could_leave_a_folder_or_a_line_are_refused(tmp_path, name):
    save_file({name: torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError, match="holds a tensor with the name"):
        read_network(tmp_path / "a.safetensors")


def test_files_and_networks_above_the_cap_are_refused(tmp_path):
    save_file({"w": torch.zeros(1000)}, tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError, match="more than the"):
        read_network(tmp_path / "a.safetensors", max_bytes=3999)
    path = save(tmp_path / "b.pth", {"w": torch.zeros(1).expand(1 << 40)})  # four bytes on disk, terabytes in memory
    with pytest.raises(ArtifactError, match="more than the"):
        read_network(path)


def test_a_compressed_pth_that_unpacks_above_the_cap_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(ArtifactError, match="more than the"):
        read_network(tmp_path / "a.pth", max_bytes=1 << 16)


def test_missing_files_and_other_suffixes_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        read_network(tmp_path / "a.pth")
    with pytest.raises(ArtifactError, match="does not exist or is not a file"):
        (tmp_path / "folder.pth").mkdir()
        read_network(tmp_path / "folder.pth")
    with pytest.raises(ArtifactError, match="not a file of a network"):
        read_network(tmp_path / "a.pkl")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_gives_an_artifact_error_or_a_network_and_never_another_failure(tmp_path, kind, data):
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth")
    if kind == "safetensors":
        save_file(example(), path)
    else:
        save(path, example(), kind == "zip")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert all(isinstance(tensor, torch.Tensor) for tensor in read_network(path).values())
    except ArtifactError as error:
        assert error.exit_code == 3


def test_networks_in_a_folder_come_in_natural_order_without_other_files(tmp_path):
    for name in ("net10.pth", "net2.safetensors", "net1.pt", "readme.txt", ".hidden.pth", "10.PTH", "9.pth"):
        (tmp_path / name).touch()
    (tmp_path / "folder.pth").mkdir()
    names = [path.name for path in networks_in(tmp_path)]
    assert names == ["9.pth", "10.PTH", "net1.pt", "net2.safetensors", "net10.pth"]


def test_a_folder_without_networks_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="holds no network"):
        networks_in(tmp_path)
    with pytest.raises(ArtifactError, match="not a folder"):
        networks_in(tmp_path / "missing")


def test_match_network_puts_tensors_in_the_targets_order_and_takes_off_a_common_prefix():
    expected = {name: tensor.to("meta") for name, tensor in example().items()}
    state = {f"module.{name}": tensor for name, tensor in reversed(example().items())}
    matched = match_network(state, expected)
    assert same(matched, example())
    assert list(matched) == list(expected)


def test_match_network_lists_what_is_missing_unexpected_and_different():
    expected = example()
    state = {
        "layer.weight": torch.zeros(3, 2),
        "layer.bias": torch.zeros(2),
        **{f"extra{i}": torch.zeros(1) for i in range(7)},
    }
    with pytest.raises(LayoutError) as caught:
        match_network(state, expected)
    text = str(caught.value)
    assert "1 missing, 7 unexpected, 2 of another shape or dtype" in text
    assert "missing: norm.num_batches_tracked" in text
    assert "extra4 and 2 more" in text
    assert "layer.weight: (3, 2) float32 instead of (2, 3) float32" in text
    assert "layer.bias: (2,) float32 instead of (2,) float16" in text
