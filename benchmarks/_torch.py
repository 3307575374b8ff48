"""torch's flex_attention on one shape, in a process of its own: `python -m benchmarks._torch NAME`.

Prints "ready" once all is compiled, waits for a line on stdin, and prints the times as JSON. So
the compiling goes on beside JAX's, and the timing when nobody else uses the GPU.
"""

import json
import sys

from benchmarks._shapes import ALL, Shape
from benchmarks._timing import calls_within, median_seconds


def launches(shape: Shape):
    """(forward, forward and backward) as functions without arguments."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def random(heads):
        return torch.randn(1, heads, shape.length, shape.dim, device="cuda", dtype=torch.bfloat16)

    query, key, value, dout = map(
        random, (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    )
    leaves = [x.requires_grad_() for x in (query, key, value)]
    lengths = torch.tensor(shape.documents or (shape.length,), device="cuda")
    begins = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)

    def sees(batch, head, i, j):
        seen = (j <= i) & (j >= begins[i])
        if shape.window is None:
            return seen
        return seen & ((i - j <= shape.window) | (j - begins[i] < shape.sinks))

    mask = create_block_mask(sees, None, None, shape.length, shape.length, "cuda", _compile=True)
    flex = torch.compile(flex_attention, dynamic=False)
    grouped = shape.heads != shape.kv_heads

    def forward():
        with torch.no_grad():
            flex(query, key, value, block_mask=mask, enable_gqa=grouped)

    def both():
        out = flex(query, key, value, block_mask=mask, enable_gqa=grouped)
        torch.autograd.grad(out, leaves, dout)

    return forward, both


def main() -> None:
    """Answers with {"forward": seconds, "both": seconds}, or {"reason": text}."""
    shape, repeats = ALL[sys.argv[1]], int(sys.argv[2])
    answer: dict[str, float | str]
    try:
        import torch

        functions = launches(shape)
        for function in functions:
            function()
        torch.cuda.synchronize()
        print("ready", flush=True)
        sys.stdin.readline()

        def wait(_):
            torch.cuda.synchronize()

        seconds = []
        for function in functions:
            calls = calls_within(0.1, function, wait=wait)
            seconds.append(median_seconds(function, calls=calls, repeats=repeats, wait=wait))
        answer = {"forward": seconds[0], "both": seconds[1]}
    except Exception as error:  # whatever it is, the parent prints it in the table
        answer = {"reason": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
