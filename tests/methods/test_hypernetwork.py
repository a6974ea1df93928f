# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from safetensors.torch import load_file, save_file

from pkt_ext.errors import InputError
from pkt_ext.methods.hypernetwork import TYPES, Hypernetwork, penalty


def neurons(size=12, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 5, size, generator=generator) for name in TYPES}


def test_two_layers_per_type_on_each_vector_alone():
    network = Hypernetwork(12, 8, seed=3, std=0.5)
    weights = network.state_dict()
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        f"{name}.{layer}.weight": shape
        for name in TYPES
        for layer, shape in (("inner", (12, 12)), ("outer", (8, 12)))
    }
    given = neurons()
    found = network(given)
    for name in TYPES:
        inner, outer = weights[f"{name}.inner.weight"], weights[f"{name}.outer.weight"]
        for place in [(0, 0), (2, 4)]:
            vector = outer @ (inner @ given[name][place]).clamp(min=0)
            torch.testing.assert_close(found[name][place], vector)
    part = network({"up": given["up"][1:, :2]})  # another rate: the same neurons, the same values
    torch.testing.assert_close(part["up"], found["up"][1:, :2])


def test_start_is_drawn_by_the_seed_alone():
    state = torch.random.get_rng_state()
    one, two, other = (Hypernetwork(48, 32, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.random.get_rng_state(), state)
    fewer = Hypernetwork(48, 32, types=("o", "up"), seed=7)
    for name, weight in one.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, two.state_dict()[name])
        assert not torch.equal(weight, other.state_dict()[name])
        if name.startswith(("o.", "up.")):
            assert torch.equal(weight, fewer.state_dict()[name])
    every = torch.cat([weight.flatten() for weight in one.state_dict().values()])
    assert every.std() == pytest.approx(1e-5, rel=0.03) and every.mean().abs() < 3e-7


def test_float32_whatever_surrounds_it():
    network = Hypernetwork(12, 8, std=0.5)
    given = {name: tensor.half() for name, tensor in neurons().items()}
    expected = network({name: tensor.float() for name, tensor in given.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(given)
    for name, values in found.items():
        assert values.dtype == torch.float32 and torch.equal(values, expected[name])


def test_penalty_acts_where_half_precision_would_not():
    values = {"up": torch.full((2, 3, 4), 1e-5), "o": torch.full((5, 4), 2e-5)}
    for tensor in values.values():
        tensor.requires_grad_()
    total = penalty(values)
    assert total.item() == pytest.approx(1000 * (1e-10 + 4e-10))
    assert penalty(values, 10.0).item() == pytest.approx(5e-9)
    total.backward()
    torch.testing.assert_close(values["up"].grad, torch.full((2, 3, 4), 2e3 * 1e-5 / 24))
    assert penalty({name: v.detach().half() for name, v in values.items()}) > 0


def test_file(tmp_path):
    network, path = Hypernetwork(12, 8, types=("up", "o"), seed=5), tmp_path / "h.safetensors"
    network.save(path)
    first = path.read_bytes()
    network.save(path)
    assert path.read_bytes() == first and [p.name for p in tmp_path.iterdir()] == [path.name]
    again = Hypernetwork.load(path)
    assert (again.types, again.teacher_size, again.student_size) == (("up", "o"), 12, 8)
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    tensors = load_file(path)
    tensors["up.inner.weight"] = tensors["up.inner.weight"][1:].clone()
    save_file(tensors, tmp_path / "bad.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(first[:-3])
    for name in ("bad", "other", "torn", "absent"):
        with pytest.raises(InputError, match=f"{name}.safetensors: no hypernetwork"):
            Hypernetwork.load(tmp_path / f"{name}.safetensors")
    for types in ((), ("gate",)):
        with pytest.raises(InputError, match="choose of up, down, v, o"):
            Hypernetwork(12, 8, types=types)
