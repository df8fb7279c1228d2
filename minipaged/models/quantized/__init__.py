"""How do other people's tools keep weights in four or eight bits, and what do they mean?

Read words.py (small numbers in 32-bit words) and layer.py (the tensors of one linear layer, checked as they are
read), then one format after the other: gptq.py, awq.py, fp8.py, compressed_tensors.py; config.py says which it is.

    format               tensors of layer X                                    W[o, i], g the group of column i
    GPTQ                 qweight, qzeros, scales, [g_idx]                      scale[g, o] * (q - (z[g, o] + 1))
    GPTQ v2              as GPTQ                                               scale[g, o] * (q - z[g, o])
    AWQ                  qweight, qzeros, scales; columns interleaved          scale[g, o] * (q - z[g, o])
    compressed-tensors   weight_packed or weight, weight_scale, ...            scale[o, g] * (q - z[o, g])
    FP8                  weight, weight_scale or weight_scale_inv              scale * q

Each is a class with `shape`, which checks all that the files' headers say; `weight`, which reads a layer: a
kernels.packed.Packed, or floats where its groups are no equal pieces of a row; and `places`, which says where in its
tensors the outputs or inputs lie, so that some of them can be read alone. Activations are never quantized here:
formats that do so, too (W8A8, FP8), are computed with their weights alone, which is nearer to the model they came from.
"""

from minipaged.models.fields import ModelError
from minipaged.models.quantized.config import Method, read_method
from minipaged.models.quantized.layer import Header, Layer, Read

__all__ = ["Header", "Layer", "Method", "find_layers", "read_method"]


def find_layers(method: Method, headers: dict[str, Header], read: Read) -> dict[str, Layer]:
    """The quantized layers among a checkpoint's tensors, by name. ModelError if one has a plain weight as well.

    read: gives the tensor of a name.
    """
    names = set()
    for name, header in headers.items():
        layer, _, part = name.rpartition(".")
        if part in method.parts and (part != "weight" or header.dtype in method.weight_dtypes):
            names.add(layer)
    layers = {}
    for name in sorted(names):
        parts = {part: headers[f"{name}.{part}"] for part in method.parts if f"{name}.{part}" in headers}
        layers[name] = Layer(name, parts, read)
        if name.endswith(("embed_tokens", "wte", "wpe")):
            raise ModelError(f"tensor {name}.{next(iter(parts))}: quantized embeddings are not supported")
        if "weight" not in method.parts and f"{name}.weight" in headers:
            which = f"{name}.weight and as {name}.{next(iter(parts))}"
            raise ModelError(f"tensor {name}.weight is there twice, as {which}: which one counts?")
    return layers
