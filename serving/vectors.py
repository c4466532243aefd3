"""Item vectors as a bundle has them: made in blocks, written so, and read where they lie.

V items · E width · N items of a block
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from recsys.batch import FIRST_ITEM
from recsys.model import SequenceModel

VECTORS = "vectors.safetensors"
"""Item vectors, where they are others than the model's table."""
LONGEST = "longest_vector"
"""Entry of a bundle's manifest: the length of its longest item vector."""
BLOCK = 2**18
"""Items that are made, written or indexed at once; a multiple of 16, so that kernels give each the same bits in any company."""
ALIGNED = 64
"""Bytes of which the first number's place in the file is a multiple."""


def item_vectors(model: SequenceModel) -> Tensor:
    """`model.item_vectors`: the model's own table, if they are that, else made in blocks, if one can be made alone."""
    if model.fusion is None or model.reads_neighbours:
        return model.item_vectors()
    parts = []
    for start in range(0, model.lines, BLOCK):
        begin = max(0, min(start, model.lines - BLOCK))  # the last block is as long as the others, of which it repeats some
        lines_N = torch.arange(begin, min(begin + BLOCK, model.lines), device=model.table.device)
        parts.append(model.vectors(lines_N + FIRST_ITEM)[start - begin :])
    return torch.cat(parts)


def is_table(vectors_VE: Tensor, model: SequenceModel) -> bool:
    """Whether the vectors are the model's table itself, which needs no second file."""
    return vectors_VE.untyped_storage().data_ptr() == model.table.weight.untyped_storage().data_ptr()


def write_vectors(vectors_VE: Tensor, path: Path) -> None:
    """Write a safetensors file, without a copy of all in memory."""
    size = vectors_VE.numel() * vectors_VE.element_size()
    told = {"vectors": {"dtype": "F32", "shape": list(vectors_VE.shape), "data_offsets": [0, size]}}
    header = json.dumps(told, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % ALIGNED)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for part_NE in torch.split(vectors_VE.float(), BLOCK):
            file.write(part_NE.contiguous().numpy().data)


def read_vectors(path: Path) -> Tensor:
    """Placed item vectors of a bundle that has a file of them, shape V × E."""
    return load_file(path / VECTORS)["vectors"]
