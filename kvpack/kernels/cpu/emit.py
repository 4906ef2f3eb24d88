"""Machine code that needs nothing of numba: from what numba made, without its way of raising errors.

Numba wraps a compiled loop in a C function that turns errors into Python's exceptions, with functions
of numba's own. Loops of this package raise none that a caller could hear of, so another C function takes
the wrapper's place. What is left calls nothing but the C library.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Iterator
from typing import Any

from llvmlite import binding

from kvpack.kernels.cpu.objects import machine, symbol

_ENTRY = """
define void @{symbol}(ptr %frame) {{
  %nothing = alloca ptr
  %error = alloca ptr
  store ptr null, ptr %nothing
  store ptr null, ptr %error
  %status = call i32 {native}(ptr %nothing, ptr %error, ptr %frame)
  ret void
}}
"""
_SYMBOL_TABLE, _SECTION, _SYMBOL = 2, struct.Struct("<IIQQQQIIQQ"), struct.Struct("<IBBHQQ")


def object_code(name: str, function: Any) -> bytes | None:
    """Machine code of the loop `name`, from the C function that numba made of it.

    None where that would need more than the C library when it runs, or this numba writes its code in
    another way than is known here.
    """
    text = _rewired(symbol(name), function.native_name, function.inspect_llvm())
    if text is None:
        return None
    try:
        module = binding.parse_assembly(text)
        module.verify()
    except RuntimeError:
        return None
    code: bytes = machine().emit_object(module)
    known = ctypes.CDLL(None)
    return code if all(hasattr(known, needed) for needed in missing(code)) else None


def _rewired(entry: str, wrapper: str, text: str) -> str | None:
    """LLVM code with a C function `entry` in the place of numba's `wrapper`."""
    native = rf'@"?{re.escape(wrapper.removeprefix("cfunc."))}"?'
    taking = re.search(rf"^define [^\n]*i32 ({native})\(ptr [^,\n]*, ptr [^,\n]*, ptr [^,\n]*\)", text, re.M)
    whole = re.compile(rf'^define [^\n]*@"?{re.escape(wrapper)}"?\(.*?^}}$', re.M | re.S)
    if taking is None or len(whole.findall(text)) != 1:
        return None
    return whole.sub("", text) + _ENTRY.format(symbol=entry, native=taking.group(1))


def missing(code: bytes) -> set[str]:
    """Names that machine code (64-bit ELF, little-endian) wants from elsewhere."""
    return {
        name
        for place, names in _tables(code)
        for name in _undefined(code[place[0] : sum(place)], code[names[0] : sum(names)])
    }


def _tables(code: bytes) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Start and length of every table of symbols, and of that of its names."""
    start, size, count = struct.unpack_from("<Q", code, 40)[0], *struct.unpack_from("<HH", code, 58)
    sections = [_SECTION.unpack_from(code, start + i * size) for i in range(count)]
    for section in sections:
        if section[1] == _SYMBOL_TABLE:
            names = sections[section[6]]
            yield (section[4], section[5]), (names[4], names[5])


def _undefined(table: bytes, names: bytes) -> Iterator[str]:
    for name, _, _, section, _, _ in _SYMBOL.iter_unpack(table):
        if name and not section:
            yield names[name : names.index(b"\0", name)].decode()
