"""A checkpoint's folder: config.json, tensors in safetensors, and files that are only copied."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ring_swa_jax import weights_from_hugging_face, weights_to_hugging_face

from _hugging_face.decoder import Decoder, Parameters

Shape = tuple[int, ...]
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    Attributes:
        folder: where it is.
        config: config.json.
        files: by the name of each safetensors file, its tensors by their names.
    """

    folder: pathlib.Path
    config: dict[str, Any]
    files: dict[str, dict[str, np.ndarray]]

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Checkpoint":
        """Reads a folder.

        Raises:
            ValueError: a file is missing, or not what its name says.
        """
        try:
            config = json.loads((folder / "config.json").read_text())
            files = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
        except (OSError, json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(f"cannot read the checkpoint {folder}: {error}") from error
        if not files:
            raise ValueError(f"there is no file *.safetensors in {folder}")
        return cls(folder, config, files)

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """Of all files."""
        return {name: tensor for file in self.files.values() for name, tensor in file.items()}

    def names(self) -> dict[str, str]:
        """From the names that a decoder uses to those of the text decoder's tensors here.

        Raises:
            ValueError: no embedding, or several.
        """
        found = [name for name in self.tensors if name.endswith(_EMBEDDING)]
        if len(found) != 1:
            raise ValueError(f"not one tensor '*{_EMBEDDING}' in {self.folder}, but {found}")
        prefix = found[0].removesuffix(_EMBEDDING)
        names = {
            name.removeprefix(prefix): name for name in self.tensors if name.startswith(prefix)
        }
        for name in self.tensors:
            if name.endswith(_HEAD):
                names[_HEAD] = name
        return names

    def parameters(self, decoder: Decoder) -> Parameters:
        """The decoder's parameters, in float32.

        Raises:
            ValueError: tensors that the decoder has no place for, that it lacks, or whose shapes
                are not those that it expects.
        """
        tensors, names = self.tensors, self.names()
        shapes = decoder.shapes(tensors[names[_EMBEDDING]].shape[0])
        self._check(shapes, {name: tensors[full].shape for name, full in names.items()})
        attention = [
            weights_from_hugging_face(self._of_layer(i, np.float32), decoder.model_layers, i)
            for i in range(len(decoder.attention))
        ]
        rest = {name: tensors[names[name]].astype(np.float32) for name in shapes}
        return Parameters(attention, rest)

    def _check(self, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
        """Compares shapes of all tensors but the attention's, which are checked elsewhere."""
        own = {name for name in found if ".self_attn." not in name and name != _HEAD}
        problems = {
            "lacks": expected.keys() - found.keys(),
            "has tensors that are not understood:": own - expected.keys(),
            "has tensors of other shapes:": {
                f"{name} {found[name]} instead of {expected[name]}"
                for name in expected.keys() & found.keys()
                if found[name] != expected[name]
            },
        }
        for what, which in problems.items():
            if which:
                first = ", ".join(sorted(which)[:4])
                raise ValueError(f"{self.folder} {what} {first} ({len(which)} in all)")

    def _of_layer(self, layer: int, dtype: Any = None) -> dict[str, np.ndarray]:
        """The tensors of one attention layer, without its prefix."""
        tensors, prefix = self.tensors, f"layers.{layer}.self_attn."
        return {
            name.removeprefix(prefix): tensors[full].astype(dtype or tensors[full].dtype)
            for name, full in self.names().items()
            if name.startswith(prefix)
        }

    def write(self, folder: pathlib.Path, decoder: Decoder, parameters: Parameters) -> None:
        """Writes a folder like this one, with the decoder's parameters."""
        new = dict(parameters.tensors)
        for i, own in enumerate(parameters.attention):
            layer = weights_to_hugging_face(own, decoder.model_layers, i, like=self._of_layer(i))
            new |= {f"layers.{i}.self_attn.{name}": tensor for name, tensor in layer.items()}
        if decoder.tied:
            new[_HEAD] = new[_EMBEDDING]  # some checkpoints hold it twice
        by_full_name = {full: new[name] for name, full in self.names().items()}
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copy(path, folder)
        for file, tensors in self.files.items():
            written = {
                name: np.ascontiguousarray(by_full_name.get(name, old), dtype=old.dtype)
                for name, old in tensors.items()
            }
            save_file(written, folder / file, metadata={"format": "pt"})
