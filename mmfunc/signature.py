"""What a compiled function depends on: its arguments' structure and, of each leaf, shape, dtype, device or value."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch._dynamo import exc
from torch._subclasses.fake_tensor import DataDependentOutputException

from mmfunc import tree
from mmfunc.tree import Tree


class CompileError(ValueError):
    """A function that cannot be one graph, or a call outside the declared shapes."""


def signature(args: Tree) -> tuple[tuple, list[Tensor]]:
    """(a hashable key, the tensors), both in an order that does not depend on how dicts were filled."""
    structure: list[Any] = []
    found: list[Any] = []
    _walk(args, structure, found)
    return (tuple(structure), tuple(map(_leaf, found))), [t for t in found if isinstance(t, Tensor)]


def _walk(t: Tree, structure: list, found: list) -> None:
    if isinstance(t, dict):
        keys = sorted(t)
        structure.append(tuple(keys))
        for k in keys:
            _walk(t[k], structure, found)
    elif isinstance(t, (list, tuple)):
        structure.append(len(t))
        for v in t:
            _walk(v, structure, found)
    elif t is None:
        structure.append(None)
    else:
        found.append(t)


def _leaf(x: Any) -> tuple:
    """(shape, dtype, device, strides unless contiguous) of a tensor; (None, type, None, value) of anything else."""
    if isinstance(x, Tensor):
        return x.shape, x.dtype, x.device, None if x.is_contiguous() else x.stride()
    return None, type(x), None, x


def named(t: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) in the order of signature."""
    if isinstance(t, (dict, list, tuple)):
        for k in sorted(t) if isinstance(t, dict) else range(len(t)):
            yield from named(t[k], f"{prefix}.{k}" if prefix else str(k))
    elif t is not None:
        yield prefix, t


def described(args: Tree) -> dict[str, tuple]:
    """The leaves by name, as a key has them; a static one that cannot be part of a key is an error."""
    for name, x in named(args):
        if not isinstance(x, Tensor):
            try:
                hash(x)
            except TypeError as e:
                what = f"argument {name} is a {type(x).__name__}"
                raise ValueError(f"{what}: it must be a tensor, or a value with a hash") from e
    return {name: _leaf(x) for name, x in named(args)}


def same_shapes(a: dict[str, tuple], b: dict[str, tuple]) -> bool:
    """Equal but for devices and strides, which abstract arguments do not know."""
    loose = lambda leaf: leaf[:2] if leaf[0] is not None else leaf
    return a.keys() == b.keys() and all(loose(a[k]) == loose(b[k]) for k in a)


def _said(name: str, leaf: tuple) -> str:
    shape, dtype, device, rest = leaf
    if shape is None:
        return f"{name} = {rest!r}"
    where = "" if device.type in ("cpu", "meta") else f" on {device}"
    return f"{name} {str(dtype).removeprefix('torch.')}{list(shape)}{where}{f' with strides {rest}' if rest else ''}"


def difference(new: dict[str, tuple], known: list[dict[str, tuple]]) -> str:
    """Which leaf a signature has that none of the known ones has, in words."""
    for name, leaf in new.items():
        others = sorted({_said(name, sig[name]) for sig in known if name in sig})
        if _said(name, leaf) not in others:
            return f"argument {_said(name, leaf)}, compiled are {', '.join(others) or 'calls without it'}"
    lacking = sorted({n for sig in known for n in sig} - new.keys())
    return f"a new combination of arguments{', without ' + lacking[0] if lacking else ''}"


def overwrite(old: Tree, new: Tree) -> None:
    """Write the tensors of a new state into those of the old one; what is the same tensor stays as it is."""
    before, after = tree.flatten(old), tree.flatten(new)
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())[:4]
        raise ValueError(f"a donated state must keep its structure, but these leaves differ: {odd}")
    # a dict, not a set of id(): that would tie the compiled code to the lives of the tensors it was traced with
    tensors = dict.fromkeys(t for t in before.values() if isinstance(t, Tensor))
    for n, t in after.items():
        if isinstance(t, Tensor) and t is not before[n] and t in tensors:
            after[n] = t.clone()  # leaves that change places
    for name, t in before.items():
        if _kind(t) != _kind(after[name]):
            raise ValueError(f"a donated state must keep its shapes and static values: {_said(name, _leaf(t))} became "
                             f"{_said(name, _leaf(after[name]))}")
    for name, t in before.items():
        if after[name] is not t and isinstance(t, Tensor):
            t.copy_(after[name])


def _kind(x: Any) -> Any:
    return (x.shape, x.dtype) if isinstance(x, Tensor) else x


def check_donated(args: tuple) -> None:
    """No other argument may have the memory of a donated leaf."""
    owner: dict[int, str] = {}
    for name, t in named(args):
        if isinstance(t, Tensor) and t.numel():
            other = owner.setdefault(t.data_ptr(), name)
            if other is not name and other.startswith("0."):
                raise ValueError(f"{other} is donated, and {name} is the same memory: give one of them a copy")


def distinct(tensors: list[Tensor]) -> list[Tensor]:
    """Inputs of a graph: no tensor twice (a graph would take it for granted in the next call), none requiring grad."""
    seen: set[int] = set()
    return [t.detach() if id(t) in seen or t.requires_grad else seen.add(id(t)) or t for t in tensors]


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Errors of the first call of a compiled function, or of its tracing, as CompileErrors that say why."""
    try:
        yield
    except (exc.Unsupported, exc.UncapturedHigherOrderOpError, exc.FailOnRecompileLimitHit) as e:
        raise CompileError(f"{name} cannot be compiled as one graph: {reason(e)}") from e
    except exc.BackendCompilerFailed as e:
        if not isinstance(e.inner_exception, ValueError):
            raise
        why = str(e.inner_exception).partition("\nTraceback")[0]  # torchair adds its own calls
        raise CompileError(f"{name} cannot run on this device: {why}") from e
    except DataDependentOutputException as e:
        raise CompileError(f"{name} cannot be compiled as one graph: {e.func} asks for a value of a tensor") from e


def reason(e: Exception) -> str:
    """Dynamo's words without its advice to its own developers: the cause, hints, and the lines of the user's code."""
    cause, _, rest = str(e).partition("\n  Developer debug context:")
    context, _, where = rest.partition("from user code:")
    raised = context.partition("raised exception ")[2].partition("\n")[0]
    lines = (f"it raised {raised}" if raised else cause).splitlines()
    lines = [s for s in lines if s.strip() and "report an issue" not in s]
    trace = where.partition("\nSet TORCHDYNAMO_VERBOSE")[0].rstrip()
    return "\n".join(lines) + (f"\nin {trace.lstrip()}" if trace else "")
