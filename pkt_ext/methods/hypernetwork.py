# SPDX-License-Identifier: Apache-2.0
"""LaTen's hypernetwork: a teacher's neurons translated to a student's width (METHODS L6).

    g_m(z) = W2_m relu(W1_m z),    m in {up, down, v, o},    W1 [d_t, d_t], W2 [d_s, d_t]

One pair of matrices for each module type, shared over blocks and neurons, without biases, float32.
It acts on one neuron vector at a time, so it may be applied at another rate than it was trained at.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pkt_ext.errors import InputError

TYPES = ("up", "down", "v", "o")
STD = 1e-5  # of every weight at the start, as published
REGULARISER = 1000.0  # weight of the penalty, as published


class Hypernetwork(nn.Module):
    """One two-layer perceptron per module type.

    Args:
        teacher_size: d_t, the teacher's hidden size.
        student_size: d_s, the student's.
        types: module types to translate, of `TYPES`.
        seed: of the weights, N(0, std^2): equal seeds, equal bits, and each type's weights are the
            same whichever others there are.
    """

    def __init__(
        self,
        teacher_size: int,
        student_size: int,
        *,
        types: Iterable[str] = TYPES,
        seed: int = 42,
        std: float = STD,
    ):
        super().__init__()
        self.types = tuple(types)
        if not self.types or not set(self.types) <= set(TYPES):
            raise InputError(
                f"module types are {', '.join(self.types) or 'none'}; choose of {', '.join(TYPES)}"
            )
        for name in self.types:
            generator = torch.Generator().manual_seed(seed * len(TYPES) + TYPES.index(name))
            layers = nn.ModuleDict()
            for layer, size in (("inner", teacher_size), ("outer", student_size)):
                # skip_init: torch's own start would be drawn from the global generator
                linear = nn.utils.skip_init(nn.Linear, teacher_size, size, False)
                with torch.no_grad():
                    linear.weight.normal_(0.0, std, generator=generator)
                layers[layer] = linear
            self.add_module(name, layers)

    @property
    def teacher_size(self) -> int:
        """d_t."""
        return self.get_submodule(self.types[0]).inner.in_features

    @property
    def student_size(self) -> int:
        """d_s."""
        return self.get_submodule(self.types[0]).outer.out_features

    def forward(self, neurons: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Translate neuron vectors, float32 also under autocast.

        Args:
            neurons: {type: [..., d_t]}, any floating dtype; columns of down and o as vectors too.
        Returns:
            {type: [..., d_s]} float32.
        """
        found = {}
        for name, vectors in neurons.items():
            layers = self.get_submodule(name)
            with torch.autocast(vectors.device.type, enabled=False):
                found[name] = layers.outer(torch.relu(layers.inner(vectors.float())))
        return found

    def save(self, path: str | os.PathLike) -> None:
        """Write the weights as safetensors; the file is complete or absent."""
        path = Path(path)
        staged = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        try:
            # one entry of metadata: equal weights leave equal bytes
            save_file(self.state_dict(), staged, metadata={"format": "pt"})
            with staged.open("rb") as file:
                os.fsync(file.fileno())
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Hypernetwork:
        """What `save` wrote, on the CPU.

        Raises:
            InputError: no such file, or it is damaged or of something else.
        """
        try:
            return cls.from_tensors(load_file(path))
        except (OSError, SafetensorError, InputError) as error:
            raise InputError(f"{path}: no hypernetwork of pkt laten ({error})") from error

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Hypernetwork:
        """A hypernetwork with these weights, by the names of `state_dict`.

        Raises:
            InputError: names or shapes that are no hypernetwork's.
        """
        types = [name for name in TYPES if f"{name}.outer.weight" in tensors]
        try:
            student_size, teacher_size = tensors[f"{types[0]}.outer.weight"].shape
            network = cls(teacher_size, student_size, types=types)
            network.load_state_dict(tensors)
        except (IndexError, ValueError, RuntimeError) as error:
            raise InputError(f"names or shapes do not fit: {', '.join(tensors)[:200]}") from error
        return network


def penalty(translated: Mapping[str, torch.Tensor], weight: float = REGULARISER) -> torch.Tensor:
    """weight * sum over types of mean(g_m^2): a float32 scalar (METHODS L8).

    In half precision, as published, squares of values under 1.7e-4 vanish and it does nothing.
    """
    return weight * sum(values.float().square().mean() for values in translated.values())
