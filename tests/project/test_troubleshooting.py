"""Every message that docs/troubleshooting.md quotes is one that this library or JAX raises."""

import ast
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
from tests.helpers.routes import make_mesh

ROOT = Path(__file__).parents[2]
QUOTE = re.compile(
    r"(?P<elsewhere><!-- not raised here: [^\n]+ -->\n)?"
    r"```text\n(?P<text>\w*(?:Error|Warning|EXHAUSTED): .*?)```",
    flags=re.DOTALL,
)


def quotes():
    """Messages of the page, each in one line; those that cannot be raised here say so."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for found in QUOTE.finditer(page):
        if not found["elsewhere"]:
            yield " ".join(found["text"].split())


def template(node):
    """Regular expression of what a string in the source may become; None if it is no string."""
    match node:
        case ast.Constant(value=str(text)):
            return re.escape(text)
        case ast.JoinedStr(values=parts):
            return "".join(template(part) for part in parts)
        case ast.FormattedValue():
            return ".+"
    return None


def templates():
    """`Error: message` of every raise, and of every warning, in the library."""
    for package in ("ring_swa_jax", "pallas_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                match node:
                    case (
                        ast.Raise(exc=ast.Call(func=ast.Name(id=error), args=[message]))
                        | ast.Call(
                            func=ast.Attribute(attr="warn"), args=[message, ast.Name(id=error)]
                        )
                    ):
                        pattern = template(message)
                        if pattern is not None:
                            yield re.compile(f"{error}: {pattern}")


TEMPLATES = list(templates())
QUOTES = list(quotes())
OF_LIBRARY = [q for q in QUOTES if any(pattern.fullmatch(q) for pattern in TEMPLATES)]
OF_JAX = [q for q in QUOTES if q not in OF_LIBRARY]


def arrays():
    return jax.random.normal(jax.random.key(0), (3, 1, 64, 4, 16))


def in_shard_map(out_specs, kind=AxisType.Auto, **options):
    attend = functools.partial(
        rsj.ring_sliding_window_attn, window_size=3, axis_name="seq", **options
    )
    spec = P(None, "seq")
    mesh = make_mesh(kind, seq=8)
    jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=out_specs)(*arrays())


def on_explicit_axes(function):
    mesh = make_mesh(AxisType.Explicit, seq=8)
    with jax.set_mesh(mesh):
        function(jax.device_put(jnp.zeros((1, 64), int), NamedSharding(mesh, P(None, "seq"))))


def incompatible_devices():
    q, k, v = arrays()
    mesh = make_mesh(seq=4)
    k = jax.device_put(k, NamedSharding(mesh, P(None, "seq")))
    rsj.ring_attention(q, k, v, window_size=3, mesh=make_mesh(seq=8))


def set_mesh_in_jit():
    with jax.set_mesh(make_mesh(seq=8)):
        return rsj.ring_attention(*arrays(), window_size=3)


def forward_mode():
    q, k, v = arrays()
    attend = functools.partial(rsj.ring_attention, window_size=3, seq_axis=None)
    jax.jvp(lambda q: attend(q, k, v), (q,), (q,))


# Beginning of the message: what raises it.
RAISED = {
    "RuntimeError: jax.distributed.initialize()": lambda: (
        jax.devices(),
        jax.distributed.initialize("127.0.0.1:1", num_processes=1, process_id=0),
    ),
    "RuntimeError: jax_num_cpu_devices": lambda: (
        jax.devices(),
        jax.config.update("jax_num_cpu_devices", 4),
    ),
    "ValueError: Number of devices": lambda: jax.make_mesh((16,), ("seq",)),
    "ValueError: `set_mesh`": lambda: jax.jit(set_mesh_in_jit)(),
    "ValueError: Received incompatible devices": incompatible_devices,
    "ShardingTypeError: dot_general": lambda: on_explicit_axes(
        lambda ids: jnp.einsum("bt,bs->bts", ids, ids)
    ),
    "ShardingTypeError: Use `.at": lambda: on_explicit_axes(lambda ids: jnp.ones((10, 4))[ids]),
    "ValueError: in_specs passed": lambda: in_shard_map(P(None, "seq"), AxisType.Explicit),
    "ValueError: shard_map applied": lambda: in_shard_map(P()),
    "ValueError: Primitive pad": lambda: in_shard_map(P(None, "seq"), implementation="triton"),
    "TypeError: can't apply forward-mode": forward_mode,
}


def test_the_page_was_read():
    assert len(OF_LIBRARY) >= 25
    assert len(OF_JAX) == len(RAISED)


@pytest.mark.parametrize("quote", OF_JAX)
def test_jax_says_so(quote):
    (trigger,) = (trigger for begin, trigger in RAISED.items() if quote.startswith(begin))
    with pytest.raises(Exception) as caught:  # noqa: PT011  some types are private
        trigger()
    pattern = ".*".join(re.escape(part) for part in quote.split(" ..."))
    said = f"{type(caught.value).__name__}: {' '.join(str(caught.value).split())}"
    assert re.match(pattern, said)
