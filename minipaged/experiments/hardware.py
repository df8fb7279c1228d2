"""How long an iteration takes on a GPU that we don't have: a roofline.

A step reads all weights once, and the keys and values of every token before it; it multiplies; and the host has work
for the step and for each of its requests. Bytes go over a bandwidth, operations over a peak:

    seconds = max(weight bytes / bandwidth, 2 * parameters * tokens / peak)      the matrix products
            + bytes of keys and values read / bandwidth                          attention
            + layers * (kernels * launch + all-reduces)                          starting them
            + requests * HOST_PER_REQUEST                                       sampling, text, bookkeeping

Two constants are calibrated by the paper: HOST_PER_REQUEST by a number that it prints, and REACHED_BANDWIDTH, which was
chosen anew when small batches came out too fast. All others come from data sheets, or from what is commonly reached.
"""

from dataclasses import dataclass, replace

GIB = 2**30
# Of the data sheet's bandwidth. A plain copy reaches 0.8 or more, which was our first guess; with it small batches came
# out a third faster than in the paper. So this is calibrated, too: the latency of small batches proves nothing. (Matrix
# products of few rows, and whole decoding steps, do reach about two thirds.)
REACHED_BANDWIDTH = 0.67
REACHED_COMPUTE = 0.6  # of the data sheet's: about what large fp16 matrix products reach inside a model
KERNELS_PER_LAYER = 12  # norms, products, attention, cache write, activation, additions: an eager PyTorch layer
LAUNCH = 10e-6  # seconds that Python and the driver need to start a kernel
ALL_REDUCE = 25e-6  # seconds for one small all-reduce over NVLink; a layer of a model that is split needs two
# Seconds of host work for each request in a step. Calibrated: with it, paging has about as many requests in its batch
# at 30 requests a second on Alpaca (OPT-13B) as the paper's Figure 13 prints, 132.44. Beside it and
# REACHED_BANDWIDTH nothing is fitted. For each request and not for each sequence, since vLLM's first release drew the
# tokens of all its samples or beams together.
HOST_PER_REQUEST = 0.25e-3
# Moving blocks to CPU memory and back: a copy for each block and layer, keys and values apart (vLLM's first release),
# started as a kernel is.
PCIE = 25e9  # bytes a second, PCIe 4.0 x16 in practice
# What attention through page tables pays for each block that it reads: see `block_seconds`.
DRAM_LATENCY = 0.6e-6  # seconds until a load from global memory arrives, on an A100
DEPENDENT_LOADS = 3  # for each block one after another: its number, its keys, its values
WARPS_PER_SM = 16  # that are in flight at a time in such a kernel
# Weights in four bits as GPTQ and AWQ store them: for each 128 columns of a row an fp16 scale and a zero of four bits.
FOUR_BITS = 4 + (16 + 4) / 128
OPT_13B_EMBEDDING = 50_272 * 5_120  # weights that such checkpoints leave in fp16; also its output matrix (OPT's config)


@dataclass(frozen=True)
class GPU:
    """Data sheet values: bytes per second, dense fp16 operations per second, multiprocessors."""

    name: str
    bandwidth: float
    peak: float
    multiprocessors: int


A100_40 = GPU("A100-40GB", 1555e9, 312e12, 108)
A100_80 = GPU("A100-80GB", 2039e9, 312e12, 108)
H100 = GPU("H100-80GB", 3350e9, 989e12, 132)


@dataclass(frozen=True)
class Server:
    """A model on one or more GPUs. Sizes of weights and KV memory: the paper's Table 1, where it has them.

    All is fp16 if the last three don't say otherwise: bits of a weight, scales and zeros counted; bytes of a number in
    the cache; bytes of the scale that each token has there for each head, of its key and of its value. Whatever the
    bits, arithmetic is in fp16: numbers become fp16 in registers, which costs nothing here.
    """

    model: str
    gpu: GPU
    num_gpus: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    weight_bytes: float
    kv_memory: int  # bytes left for keys and values
    weight_bits: float = 16.0
    cache_bytes: int = 2
    scale_bytes: int = 0

    @property
    def name(self) -> str:
        many = f"{self.num_gpus} x " if self.num_gpus > 1 else ""
        return f"{self.model} on {many}{self.gpu.name}"

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of one token, in all layers.

        >>> SERVERS["13b"].kv_bytes, SERVERS["13b-kv8"].kv_bytes
        (819200, 422400)
        """
        return 2 * self.layers * self.kv_heads * (self.head_size * self.cache_bytes + self.scale_bytes)

    @property
    def num_slots(self) -> int:
        """Tokens that fit.

        >>> SERVERS["13b"].num_slots, SERVERS["175b"].num_slots
        (15728, 60074)
        """
        return self.kv_memory // self.kv_bytes

    @property
    def bandwidth(self) -> float:
        return self.num_gpus * self.gpu.bandwidth * REACHED_BANDWIDTH

    def reading_seconds(self) -> float:
        """All weights, once."""
        return self.weight_bytes / self.bandwidth

    def computing_seconds(self, tokens: float) -> float:
        """A matrix product of each weight and so many tokens."""
        operations = 2 * (8 * self.weight_bytes / self.weight_bits) * tokens
        return operations / (self.num_gpus * self.gpu.peak * REACHED_COMPUTE)

    def matrix_seconds(self, tokens: int) -> float:
        """All matrix products of a step, and starting its kernels; tokens: of all sequences together."""
        starting = self.layers * (KERNELS_PER_LAYER * LAUNCH + (2 * ALL_REDUCE if self.num_gpus > 1 else 0))
        return max(self.reading_seconds(), self.computing_seconds(tokens)) + starting

    def context_seconds(self, block_size: int | None) -> float:
        """What attention adds for each token that is read; None: contiguous."""
        return self.kv_bytes / self.bandwidth + (self.block_seconds(block_size) / block_size if block_size else 0)

    def block_seconds(self, block_size: int) -> float:
        """What reading one block more costs beside its bytes.

        Each of its keys and values is asked for by a warp that must wait: for the block's number, then for its
        contents. Little's law: so many warps are in flight, and each is away for so long. A larger block gives the
        warp more to ask for at once. All layers and heads pay it.
        """
        in_flight = self.num_gpus * self.gpu.multiprocessors * WARPS_PER_SM
        return self.layers * self.kv_heads * DEPENDENT_LOADS * DRAM_LATENCY / in_flight

    def swap_seconds(self, blocks: int, block_size: int) -> float:
        """Moving so many blocks one way. Each GPU moves its heads' share, at the same time."""
        share = block_size * self.kv_bytes / (2 * self.layers) / self.num_gpus
        return blocks * 2 * self.layers * (LAUNCH + share / PCIE)


def in_four_bits(server: Server, kept: float) -> Server:
    """The same in four bits, but for `kept` of its weights. What that frees is room for keys and values."""
    count = server.weight_bytes / 2
    bits = (16 * kept + FOUR_BITS * (count - kept)) / count
    size = count * bits / 8
    room = server.kv_memory + int(server.weight_bytes - size)
    return replace(
        server, model=f"{server.model}, 4-bit weights", weight_bytes=size, kv_memory=room, weight_bits=bits
    )  # fmt: skip


def eight_bit_cache(server: Server) -> Server:
    """The same with keys and values as this engine has them in eight bits: a byte a number, and scales in fp32."""
    return replace(server, model=f"{server.model}, 8-bit cache", cache_bytes=1, scale_bytes=4)


SERVERS = {
    "13b": Server("OPT-13B", A100_40, 1, 40, 40, 40, 128, 26e9, 12 * GIB),
    "66b": Server("OPT-66B", A100_40, 4, 64, 72, 72, 128, 132e9, 21 * GIB),
    "175b": Server("OPT-175B", A100_80, 8, 96, 96, 96, 128, 346e9, 264 * GIB),
    # Not in the paper: a model of today. Of 80 GB nine tenths are used, 16.1 GB of them by the weights.
    "llama": Server("Llama-3-8B", H100, 1, 32, 32, 8, 128, 16.1e9, int(0.9 * 80e9 - 16.1e9)),
    "13b-h100": Server("OPT-13B", H100, 1, 40, 40, 40, 128, 26e9, int(0.9 * 80e9 - 26e9)),
}
# Nor these: the paper's smallest server, with numbers of today.
SERVERS["13b-kv8"] = eight_bit_cache(SERVERS["13b"])
SERVERS["13b-w4"] = in_four_bits(SERVERS["13b"], OPT_13B_EMBEDDING)
SERVERS["13b-w4-kv8"] = eight_bit_cache(SERVERS["13b-w4"])
