"""Files of tensors: what shares memory is written apart, and nothing else is copied for it."""

import safetensors.torch
import torch

from relearn_lens.files import read_tensors, write_tensors


def test_tensors_that_share_memory_are_copied_and_no_others(tmp_path, monkeypatch):
    joint = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "joint": joint, "queries": joint[:1], "keys": joint.T, "tied": joint, "alone": torch.ones(5),
        "mask": torch.tensor([True]).expand(3), "half": torch.arange(8.0)[4:],
        "none": torch.zeros(0), "no": torch.zeros(0),
    }  # fmt: skip
    held = {}
    save = safetensors.torch.save_file

    def saved(given, *args, **keywords):
        held.update({name: tensor.data_ptr() for name, tensor in given.items()})
        save(given, *args, **keywords)

    monkeypatch.setattr(safetensors.torch, "save_file", saved)
    write_tensors(tmp_path / "x.safetensors", tensors, {"a": 1})
    back, meta = read_tensors(tmp_path / "x.safetensors")
    assert meta == {"a": 1}
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert [name for name in ("alone", "half") if held[name] == tensors[name].data_ptr()] == ["alone", "half"]
    assert sum(held[name] == joint.data_ptr() for name in ("joint", "queries", "tied")) == 1
