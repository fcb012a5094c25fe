"""Runs a GE graph on CPU, operation by operation, and refuses what it does not understand.

Checked on the way: every type is known, its inputs and attributes are those of torchair's own table of operations, no
attribute with an unusual value goes unread, both sides of an elementwise operation have one dtype, and what belongs to
an operation of FX has the shape and the dtype that it has there.
"""

import re
from collections.abc import Callable, Container
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torchair._ge_concrete_graph import auto_generated_ge_raw_ops as table

from mmfunc.kernels.ge import own
from mmfunc.kernels.ge.operations import EVEN, HOST, OPERATIONS

PROTO = {1: torch.float32, 2: torch.float16, 3: torch.int8, 4: torch.uint8, 5: torch.int16, 7: torch.int32,
         8: torch.int64, 11: torch.bool, 12: torch.float64, 27: torch.bfloat16}  # by number in a graph's file
UNTOLD = {  # operations that the table lacks: names of the inputs, attributes with their defaults
    "Cast": (["x"], {"dst_type": ...}), "SplitV": (["x", "size_splits", "split_dim"], {"num_split": ...}),
    "Unpack": (["x"], {"num": ..., "axis": 0})}
LAYOUTS = "input_layout_info", "output_layout_info"  # attributes that torchair adds to any operation
SIZES = {torch.int32, torch.int64}  # dtypes that torchair mixes where it counts with sizes
REAL = {torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16, *SIZES}
GROUPS = {  # names that the table has for sets of dtypes; "BasicType" has no bool
    "BasicType": REAL, "NumberType": REAL, "RealNumberType": REAL, "IndexNumberType": SIZES,
    "UnaryDataType": {torch.float32, torch.float16, torch.bfloat16, torch.float64}}
NAMED = {"DT_FLOAT": torch.float32, "DT_FLOAT32": torch.float32, "DT_DOUBLE": torch.float64, "DT_BF16": torch.bfloat16,
         **{f"DT_{str(t)[6:].upper()}": t for t in REAL | {torch.bool}}}
LARGE = 1 << 16  # elements of a constant that is not worked out where only shapes are asked for


class Misread(ValueError):
    """A graph with a meaning that cannot be told, or another one than its program."""


class Attributes(dict):
    """Attributes of an operation, and which of them were read."""

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default


def _default(kind: str, text: str) -> Any:
    """A default as torchair's table writes it."""
    if kind == "Bool":
        return text == "true"
    if kind == "ListInt":
        return [int(n) for n in re.findall(r"-?\d+", text)]
    if kind == "String":
        return text.strip('"')
    return text if kind == "Type" or text.startswith("DT_") else float(text) if kind == "Float" else int(text)


@cache
def declared(kind: str) -> tuple[list[str], dict[str, Any]]:
    """(names of the inputs, "*" behind one of any number; attributes with defaults, ... where required)."""
    if kind in UNTOLD:
        return UNTOLD[kind]
    if kind in own.KINDS:
        return [n for n, _ in own.declared(kind)[1]], dict.fromkeys(own.ATTRIBUTES, ...)
    text = getattr(getattr(table, kind, None), "__doc__", None) or ""
    named = re.findall(r"\.(|OPTIONAL_|DYNAMIC_)INPUT\((\w+)", text)
    inputs = [name + "*" * (how == "DYNAMIC_") for how, name in named]
    attributes = dict.fromkeys(re.findall(r"\.REQUIRED_ATTR\((\w+)", text), ...)
    for name, type_, default in re.findall(r"\.ATTR\((\w+), (\w+), (.*)\)", text):
        attributes[name] = _default(type_, default)
    if not inputs:
        raise Misread(f"GE has no operation {kind} in torchair's table")
    return inputs, attributes


@cache
def dtypes(kind: str) -> list[set]:
    """The dtypes that the table allows for each input of an operation; nothing where it does not say."""
    text = getattr(getattr(table, kind, None), "__doc__", None) or ""
    named = lambda s: {NAMED[n] for n in re.findall(r"DT_\w+", s) if n in NAMED}
    grouped = lambda s: set().union(*(found for g, found in GROUPS.items() if g in s))
    return [named(s) | grouped(s) for s in re.findall(r"\.\w*INPUT\(\w+, (.*)\)", text)]


def undeclared(op: Any, given: list[Tensor | None]) -> list[str]:
    """Inputs of an operation whose dtype torchair's table does not allow: to be looked up in the CANN at hand."""
    return [f"{op.type} {name} {str(x.dtype)[6:]}"
            for name, allowed, x in zip(declared(op.type)[0], dtypes(op.type), given)
            if x is not None and allowed and x.dtype not in allowed]


def _value(attribute: Any) -> Any:
    """What an attribute of a graph's file holds."""
    which = attribute.WhichOneof("value")
    if which != "list":
        found = getattr(attribute, which)
        return found.decode() if which == "s" else found
    part = attribute.list
    return [s.decode() for s in part.s] or list(part.i) or list(part.f) or list(part.b)


def attributes(op: Any) -> Attributes:
    """All attributes of an operation, defaults too; an unknown one, or one that is missing, is an error."""
    _, known = declared(op.type)
    given = {k: _value(v) for k, v in op.attr.items() if not k.startswith("_")}
    given = {k: v for k, v in given.items() if k not in LAYOUTS}
    layout = op.attr["input_layout_info"].list if "input_layout_info" in op.attr else None
    if odd := given.keys() - known.keys():
        raise Misread(f"{op.type} has no attribute {', '.join(sorted(odd))}; it has {', '.join(known)}")
    if lacking := [k for k, v in known.items() if v is ... and k not in given]:
        raise Misread(f"{op.type} lacks the attribute {', '.join(lacking)}")
    return Attributes(known | given | {"layout": {s.decode() for s in layout.s} if layout else set()})


def constant(op: Any) -> Tensor:
    """The tensor of a Const."""
    value = op.attr["value"].t
    dtype, shape = PROTO[value.desc.dtype], tuple(value.desc.shape.dim)
    flat = torch.frombuffer(bytearray(value.data), dtype=dtype) if value.data else torch.empty(0, dtype=dtype)
    return flat.view(shape)


def _ints(x: Tensor | None) -> list[int] | None:
    if x is None:
        return None
    if x.is_meta:
        raise Misread("an input that says what is to be done depends on data")
    return x.flatten().tolist()


def compute(op: Any, inputs: list[Tensor | None]) -> tuple[Tensor, ...]:
    """The results of one operation."""
    if op.type not in OPERATIONS:
        raise Misread(f"the interpreter knows no {op.type}")
    names, _ = declared(op.type)
    if len(inputs) != len(names) and not any(n.endswith("*") for n in names):
        raise Misread(f"{op.type} has {len(inputs)} inputs; it takes {', '.join(names)}")
    if op.type in EVEN and inputs[0].dtype != inputs[1].dtype and not {x.dtype for x in inputs} <= SIZES:
        raise Misread(f"{op.type} of {inputs[0].dtype} and {inputs[1].dtype}")
    a, host = attributes(op), HOST.get(op.type, ())
    if any(x is not None and x.is_meta for i, x in enumerate(inputs) if i not in host):
        inputs = [x if x is None or i in host or x.ndim == 0 else x.to("meta") for i, x in enumerate(inputs)]
    found = OPERATIONS[op.type](a, *(_ints(x) if i in host else x for i, x in enumerate(inputs)))
    unread = {k: v for k, v in a.items() if k not in a.read and v != declared(op.type)[1].get(k, set())}
    if unread:
        raise Misread(f"{op.type} has attributes that the interpreter does not read: {unread}")
    return found if isinstance(found, tuple) else (found,)


def run(graph: Any, inputs: list[Tensor], expected: dict[str, tuple] | None = None,
        watch: Callable | None = None, failed: Container[str] = ()) -> list[Tensor]:
    """What a graph gives for inputs on CPU, or on the meta device for shapes only.

    expected: (shape, dtype) by name of a result; watch(operation, inputs, results) sees each operation; failed: types
    that stand for what could not be lowered, whose results are only expected.
    """
    values: dict[str, Tensor | None] = {"": None}
    meta = any(x.is_meta for x in inputs)
    for op in graph.op:
        if op.type == "Data":
            found = (inputs[op.attr["index"].i],)
        elif op.type == "Const":
            found = (constant(op),)
        else:
            given = [values[i] for i in op.input if not i.endswith(":-1")]
            if op.type == "NetOutput":
                return given
            if op.type in failed:
                names = sorted(n for n in expected if n.startswith(f"{op.name}:"))
                values |= {n: torch.empty(expected[n][0], dtype=expected[n][1], device="meta") for n in names}
                continue
            try:
                found = compute(op, given)
            except (ValueError, RuntimeError, IndexError, KeyError) as e:
                shapes = [None if x is None else f"{str(x.dtype)[6:]}{list(x.shape)}" for x in given]
                raise Misread(f"{op.name} = {op.type}({', '.join(map(str, shapes))}): {e}") from e
            found = tuple(t.to("meta") if meta and t.numel() > LARGE else t for t in found)
            if watch:
                watch(op, given, found)
        for i, t in enumerate(found):
            name = f"{op.name}:{i}"
            said = (list(t.shape), t.dtype)
            if expected and expected.get(name, said) != said:
                raise Misread(f"{op.name} = {op.type} gives {said}; the program has {expected[name]} there")
            values[name] = t
    raise Misread("the graph has no NetOutput")
