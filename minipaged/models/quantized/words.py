"""Small numbers in 32-bit words: one stream of bits, lowest first.

With 2, 4 and 8 bits a byte holds whole codes. Three bits do not divide a word: of 32 codes in three words, the
eleventh and the twenty-second lie across two. But they divide three bytes:

    byte     0        1        2
    bits     22111000 54443332 77766655        codes 0 to 7
"""

import torch
from torch import Tensor


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [..., n] -> uint8 [..., n * 32 / bits], for 2, 3, 4 or 8 bits; for 3, n is a multiple of 3.

    >>> unpack(torch.tensor([0x76543210], dtype=torch.int32), 4).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    octets = words.reshape(-1).view(torch.uint8).view(*words.shape[:-1], -1)
    if bits == 8:
        return octets
    span = 8
    if bits == 3:
        low, middle, high = octets.unflatten(-1, (-1, 3)).int().unbind(-1)
        octets, span = low | middle << 8 | high << 16, 24
    codes = [(octets >> shift & (1 << bits) - 1).to(torch.uint8) for shift in range(0, span, bits)]
    return torch.stack(codes, -1).flatten(-2)
