"""torch's flex_attention in a process of its own: `python -m benchmarks._torch REPEATS NAME...`.

Prints "ready" once all shapes are compiled, and then, for each name on stdin, its times as a line
of JSON. So the compiling goes on beside JAX's, and the timing when nobody else uses the GPU.
"""

import json
import sys

from benchmarks._shapes import ALL, Shape
from benchmarks._timing import calls_within, median_seconds


def launches(shape: Shape):
    """(forward, forward and backward) as functions without arguments."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if shape.learned or shape.value_dim is not None:
        raise NotImplementedError("is measured without learned sinks and with one head dim")

    def random(heads):
        size = (shape.batch, heads, shape.length, shape.dim)
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    query, key, value, dout = map(
        random, (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    )
    leaves = [x.requires_grad_() for x in (query, key, value)]
    lengths = torch.tensor(shape.documents or (shape.length,), device="cuda")
    begins = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)

    def sees(batch, head, i, j):
        seen = begins[j] == begins[i]
        if shape.after is not None:
            seen = seen & (j - i <= shape.after)
        if shape.window is None:
            return seen
        sink = (j <= i) & (j - begins[i] < shape.sinks)
        return seen & ((i - j <= shape.window) | sink)

    mask = create_block_mask(sees, None, None, shape.length, shape.length, "cuda")
    torch.cuda.empty_cache()  # of the whole square of the mask: JAX needs the memory
    flex = torch.compile(flex_attention, dynamic=False)
    grouped = shape.heads != shape.kv_heads

    def forward():
        with torch.no_grad():
            flex(query, key, value, block_mask=mask, enable_gqa=grouped)

    def both():
        out = flex(query, key, value, block_mask=mask, enable_gqa=grouped)
        torch.autograd.grad(out, leaves, dout)

    return forward, both


def compiled(shape: Shape):
    """Its launches, run once, or the reason why there are none."""
    import torch

    try:
        functions = launches(shape)
        for function in functions:
            function()
        torch.cuda.synchronize()
    except Exception as error:  # whatever it is, the parent prints it in the table
        return f"{type(error).__name__}: {error}"
    return functions


def times(functions, repeats: int) -> dict[str, float]:
    """{"forward": seconds, "both": seconds}."""
    import torch

    def wait(_):
        torch.cuda.synchronize()

    seconds = {}
    for name, function in zip(("forward", "both"), functions, strict=True):
        calls = calls_within(0.1, function, wait=wait)
        seconds[name] = median_seconds(function, calls=calls, repeats=repeats, wait=wait)
    return seconds


def main() -> None:
    """Answers each name with its times, or with {"reason": text}."""
    import torch

    # Each shape compiles the same function anew; past the limit torch would run it uncompiled.
    torch._dynamo.config.recompile_limit = 4 * len(ALL)
    repeats, *names = sys.argv[1:]
    made = {name: compiled(ALL[name]) for name in names}
    print("ready", flush=True)
    for line in sys.stdin:
        found = made.pop(line.strip())
        answer = {"reason": found} if isinstance(found, str) else times(found, int(repeats))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
