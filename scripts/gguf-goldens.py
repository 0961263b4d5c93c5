"""Writes goldens/gguf_blocks: random blocks of every GGUF format and the F32 that gguf-py decodes from them.

    pip install gguf==0.19.0 numpy && python scripts/gguf-goldens.py goldens/gguf_blocks

Each file is 1024 elements of blocks, then the same as F32, both little endian.
"""

import sys
from pathlib import Path

import gguf
import numpy as np

ELEMENTS = 1024
# Where the blocks have halves: their exponents are kept off NaN and infinity.
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
    "MXFP4": [],
}

out = Path(sys.argv[1])
random = np.random.default_rng(20261124)
for name, halves in HALVES.items():
    kind = gguf.GGMLQuantizationType[name]
    block_len, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (ELEMENTS // block_len, block_bytes), dtype=np.uint8)
    for at in halves:
        high = blocks[:, at + 1]
        high[(high & 0x7C) == 0x7C] &= 0xBF
    values = gguf.quants.dequantize(blocks.reshape(-1), kind).astype("<f4")
    assert values.size == ELEMENTS
    (out / f"{name}.bin").write_bytes(blocks.tobytes() + values.tobytes())
