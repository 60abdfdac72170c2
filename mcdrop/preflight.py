"""What is looked at in a ``.pt2`` file before torch reads it. Needs no torch and runs nothing of the file.

``torch.export.load`` runs code from a file in several ways: weights and sample inputs that are pickles, symbolic
expressions and guards, which are evaluated, and descriptions of containers, which import what they name. So a copy of
the archive is made of known members alone, without sample inputs and guards; pickled tensors are refused; expressions
may hold numbers, symbols and arithmetic, operators may be torch's own, containers may be tuples, lists and dicts.
"""

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

from mcdrop.errors import ArtifactError

__all__ = ["preflight"]

_JSON_BYTES = 64 * 2**20
_EXPRESSION = 2048
_MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(?:version|serialization_id|alignment)|models/[\w.-]+\.json"
    r"|data/weights/(?:weight_\d+|[\w.-]+_weights_config\.json)"
    r"|data/constants/(?:tensor_\d+|[\w.-]+_constants_config\.json)|data/sample_inputs/[\w.-]+\.pt",
    re.ASCII,
)
_PAYLOAD = re.compile(r"(?:weight|tensor)_\d+", re.ASCII)
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+"
    r"|_operator\.(?:getitem|add|sub|mul|floordiv|mod|ge|gt|le|lt|eq|ne|neg|truediv|pow|and_|or_)"
    r"|torch\.sym_(?:int|float|max|min|not|ite)",
    re.ASCII,
)
_SYMBOL = re.compile(r"(?:s|u|f|zuf|zf)\d+", re.ASCII)
_CONSTANTS = {"int_oo", "oo", "true", "false"}
_ASSUMPTIONS = {"finite", "integer", "nonnegative", "positive", "real", "zero"}
_FUNCTION = re.compile(
    "Add|And|CeilDiv|CeilToInt|CleanDiv|Eq|Equality|Float|FloatTrueDiv|FloorDiv|FloorToInt|Ge|GreaterThan|Gt"
    "|IntTrueDiv|Integer|Le|LessThan|Lt|Max|Min|Mod|ModularIndexing|Mul|Ne|Not|Or|Pow|PowByNatural|PythonMod|Rational"
    "|RoundToInt|StrictGreaterThan|StrictLessThan|ToFloat|TruncToInt|Unequality|Where|ceiling|floor"
)
_CONTAINERS = {None, "builtins.dict", "builtins.list", "builtins.tuple", "collections.OrderedDict"}
_MOST_POWER = 16


def preflight(data: bytes, name: str) -> bytes:
    """Gives an archive of the same program that holds nothing that could run code.

    Raises:
        ArtifactError: it holds something else than tensors and a graph of torch's own operators.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return _copy(archive, len(data), name)
    except ArtifactError:
        raise
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError, RecursionError, NotImplementedError,
            EOFError, MemoryError, OSError) as error:  # fmt: skip
        raise ArtifactError(f"{name} is not a sound .pt2 archive: {type(error).__name__}: {str(error)[:200]}") from None


def _copy(archive: zipfile.ZipFile, size: int, name: str) -> bytes:
    members = archive.infolist()
    roots = {member.filename.partition("/")[0] for member in members}
    if len({member.filename for member in members}) != len(members) or len(roots) != 1:
        raise ArtifactError(f"{name} has members of the same name, or more than one folder")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ArtifactError(f"{name} is compressed; torch.export.save writes archives that are not")
    if sum(member.file_size for member in members) > size:
        raise ArtifactError(f"{name} says that its members are larger than the file")
    sizes = {member.filename.partition("/")[2]: member.file_size for member in members}
    out, configs = io.BytesIO(), 0
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as fresh:
        for member in members:
            inner = member.filename.partition("/")[2]
            if not _MEMBERS.fullmatch(inner):
                raise ArtifactError(
                    f"{name} holds {member.filename!r}, which a plain program has no need of (code, custom objects and "
                    "the layout of torch before 2.8 are not read); export it again with torch.export.save"
                )
            content = archive.read(member)
            if inner.endswith(".json"):
                content = _checked_json(inner, content, name, sizes)
                configs += inner.endswith("_config.json")
            if inner.startswith("data/sample_inputs/"):
                content = b""  # a pickle that nothing needs
            fresh.writestr(zipfile.ZipInfo(member.filename), content)
    if configs < 2:
        raise ArtifactError(f"{name} lacks the tables of its tensors")
    return out.getvalue()


def _checked_json(inner: str, content: bytes, name: str, sizes: Mapping[str, int]) -> bytes:
    if len(content) > _JSON_BYTES:
        raise ArtifactError(f"{name} has a description of {len(content)} bytes, above the limit of {_JSON_BYTES}")
    read = json.loads(content)
    if inner.endswith("_config.json"):
        for key, entry in read["config"].items():
            if entry.get("use_pickle"):
                raise ArtifactError(f"{name} keeps {str(key)[:60]!r} as a pickle, which can run code when it is read")
            if not _PAYLOAD.fullmatch(str(entry["path_name"])):
                raise ArtifactError(f"{name} looks for a tensor in {str(entry['path_name'])[:60]!r}")
            path = f"{inner.rpartition('/')[0]}/{entry['path_name']}"
            if not sizes[path] and all(axis["as_int"] for axis in entry["tensor_meta"]["sizes"]):
                raise ArtifactError(f"{name} has no numbers for {str(key)[:60]!r}, which torch would read as zeros")
        return content
    read["guards_code"] = []
    for key, value in _entries(read):
        _check_entry(key, value, name)
    return json.dumps(read).encode()


def _check_entry(key: str, value: Any, name: str) -> None:
    if key in ("nodes", "as_graph") and value is not None:
        for node in value if key == "nodes" else []:
            if not _OPERATOR.fullmatch(str(node["target"])):
                raise ArtifactError(f"{name} calls {str(node['target'])[:60]!r}; only torch's own operators are run")
            node["metadata"] = {k: v for k, v in node["metadata"].items() if k == "nn_module_stack"}
    elif key == "as_operator" and not _OPERATOR.fullmatch(str(value)):
        raise ArtifactError(f"{name} names {str(value)[:60]!r}; only torch's own operators are known")
    elif key == "expr_str" and value is not None:
        _check_expression(value, name)
    elif key == "range_constraints":
        for symbol in value:
            _check_expression(symbol, name)
    elif key in ("in_spec", "out_spec") and value:
        for inner, container in _entries(json.loads(value)):
            if (inner == "type" and container not in _CONTAINERS) or "__" in str(container):
                raise ArtifactError(f"{name} takes or gives {str(container)[:60]!r}; only tuples, lists and dicts are")
    elif key == "treespec_namedtuple_fields" and value:
        raise ArtifactError(f"{name} takes or gives named tuples; give plain tuples, lists or dicts")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner)


def _check_expression(text: Any, name: str) -> None:
    """Torch hands these strings to sympy, which evaluates them as Python."""
    if isinstance(text, str) and len(text) <= _EXPRESSION:
        try:
            if _harmless(ast.parse(text, mode="eval").body):
                return
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass
    raise ArtifactError(f"{name} holds the expression {str(text)[:60]!r}, which is more than arithmetic on sizes")


def _harmless(node: ast.AST) -> bool:
    """Whether an expression is numbers, symbols, arithmetic, comparisons and known functions."""
    match node:
        case ast.Constant(value=value):
            return type(value) in (bool, float, int)
        case ast.Name(id=word):
            return _SYMBOL.fullmatch(word) is not None or word in _CONSTANTS
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(word))], keywords=keywords):
            return _SYMBOL.fullmatch(word) is not None and _flags(keywords, _ASSUMPTIONS)
        case ast.Call(func=ast.Name(id=word), args=arguments, keywords=keywords):
            return (
                _FUNCTION.fullmatch(word) is not None
                and _flags(keywords, {"evaluate"})
                and all(map(_harmless, arguments))
            )
        case ast.BinOp(op=ast.Pow(), right=ast.Constant(value=int(power))):
            return abs(power) <= _MOST_POWER and _harmless(node.left)
        case ast.BinOp(op=ast.Pow()):
            return False
        case ast.BinOp():
            return _harmless(node.left) and _harmless(node.right)
        case ast.UnaryOp():
            return _harmless(node.operand)
        case ast.Compare():
            return all(map(_harmless, [node.left, *node.comparators]))
    return False


def _flags(keywords: list[ast.keyword], known: set[str]) -> bool:
    return all(
        keyword.arg in known and isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, bool)
        for keyword in keywords
    )
