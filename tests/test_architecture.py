"""The floors: a module imports from floors below its own only, heavy libraries at their homes, nothing grows long."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("mcdrop", "service", "models")

# From the ground up. A module may import from lower floors, never from its own.
FLOORS = [
    [
        "mcdrop.errors",
        "mcdrop.locks",
        "mcdrop.blocks",
        "mcdrop.agreement",
        "mcdrop.mixing",
        "mcdrop.decisions",
        "mcdrop.reads",
        "mcdrop.philox",
    ],
    ["mcdrop.at_once", "mcdrop.barefile", "mcdrop.samplers", "mcdrop.streams"],
    [
        "mcdrop.masks",
        "mcdrop.moments",
        "mcdrop.rows",
        "mcdrop.audit",
        "mcdrop.layers",
        "mcdrop.outputs",
        "mcdrop.registry",
        "mcdrop.store",
        "mcdrop.wholes",
        "mcdrop.onnx_graph",
        "mcdrop.preflight",
        "mcdrop.quiet",
        "mcdrop.standing",
        "mcdrop.digits",
        "mcdrop.masking",
        "mcdrop.active",
        "mcdrop.attention",
        "mcdrop.convolve",
        "mcdrop.each_pass",
        "mcdrop.layouts",
        "mcdrop.products",
        "mcdrop.recurrent",
        "mcdrop.rewound",
    ],
    ["mcdrop.holders", "mcdrop.placing", "mcdrop.written", "mcdrop.reach", "mcdrop.telling", "mcdrop.one_order"],
    [
        "mcdrop.shadow",
        "mcdrop.volatile",
        "mcdrop.intercept",
        "mcdrop.backends",
        "mcdrop.onnx_bodies",
        "mcdrop.onnx_inputs",
        "mcdrop.onnx_names",
        "mcdrop.onnx_read",
        "mcdrop.rowfile",
        "mcdrop.stacks",
        "mcdrop.sums",
        "mcdrop.drawn",
    ],
    [
        "mcdrop.sequences",
        "mcdrop.onnx_mixing",
        "mcdrop.onnx_moving",
        "mcdrop.onnx_sessions",
        "mcdrop.onnx_slots",
        "mcdrop.replay",
        "mcdrop.blockwise",
    ],
    ["mcdrop.onnx_draws", "mcdrop.onnx_trace"],
    ["mcdrop.rules", "mcdrop.kernels", "mcdrop.onnx_feeds", "mcdrop.onnx_lost"],
    ["mcdrop.forward", "mcdrop.row_rules", "mcdrop.onednn", "mcdrop.onnx_orders"],
    ["mcdrop.kernel_rules"],
    ["mcdrop.generators", "mcdrop.features", "mcdrop.rewrites", "mcdrop.breaking"],
    ["mcdrop.record"],
    ["mcdrop.exact", "mcdrop.fuse", "mcdrop.heads", "mcdrop.varying", "mcdrop.rarely", "mcdrop.entries"],
    ["mcdrop.trace", "mcdrop.observed", "mcdrop.kept"],
    ["mcdrop.effects"],
    ["mcdrop.probe", "mcdrop.refusals"],
    ["mcdrop.direct", "mcdrop.capture", "mcdrop.flags"],
    ["mcdrop.tiers"],
    ["mcdrop.checks", "mcdrop.stages"],
    ["mcdrop.discover", "mcdrop.program"],
    ["mcdrop.plan"],
    ["mcdrop.planning"],
    ["mcdrop.plans"],
    ["mcdrop.ready"],
    ["mcdrop.backends.*"],
    ["mcdrop.sharded", "mcdrop.any_rows"],
    [
        "mcdrop.engine",
        "mcdrop.diagnose",
        "mcdrop.onnx_discover",
        "mcdrop.onnx_export",
        "mcdrop.posterior_graph",
        "mcdrop.programs",
    ],
    ["mcdrop.posterior_statistics"],
    ["mcdrop.posterior_torch"],
    ["mcdrop.summaries", "mcdrop.fits", "mcdrop.bank", "mcdrop.drift"],
    ["mcdrop.intervals", "mcdrop.screening"],
    ["mcdrop.conformal", "mcdrop.metrics", "mcdrop.plotting"],
    ["mcdrop.calibration"],
    ["mcdrop.model"],
    ["mcdrop.wrapping"],
    ["mcdrop.graphs", "mcdrop.factory", "mcdrop.convert"],
    ["mcdrop.formats"],
    ["mcdrop.beside", "mcdrop.sampling"],
    ["mcdrop.artifact"],
    ["mcdrop.predict"],
    ["mcdrop.fitting", "mcdrop.posterior"],
    ["mcdrop.detect", "mcdrop.batchnorm", "mcdrop.inject"],
    ["mcdrop.table", "mcdrop.parquet", "mcdrop.distributed"],
    ["mcdrop.files"],
    ["mcdrop.console"],
    ["mcdrop.cli"],
    ["mcdrop.__main__"],
    ["mcdrop"],
    ["models.networks", "models.data"],
    ["models.recipes"],
    ["models.train", "models.figure"],
    ["models"],
    ["service.settings", "service.schemas", "service.limits", "service.queue", "service.watch"],
    ["service.registry"],
    ["service.work"],
    ["service.app"],
    ["service.server"],
    ["service"],
    ["service.__main__"],
]

# Each library that is slow to import or optional, and the only modules that may import it, at the top or in a function.
HOMES = {
    "torch": [
        "mcdrop.batchnorm",
        "mcdrop.inject",
        "mcdrop.layers",
        "mcdrop.decisions",
        "mcdrop.direct",
        "mcdrop.mixing",
        "mcdrop.outputs",
        "mcdrop.shadow",
        "mcdrop.holders",
        "mcdrop.reach",
        "mcdrop.volatile",
        "mcdrop.written",
        "mcdrop.intercept",
        "mcdrop.layouts",
        "mcdrop.rewound",
        "mcdrop.recurrent",
        "mcdrop.sequences",
        "mcdrop.rules",
        "mcdrop.features",
        "mcdrop.breaking",
        "mcdrop.one_order",
        "mcdrop.rarely",
        "mcdrop.entries",
        "mcdrop.forward",
        "mcdrop.generators",
        "mcdrop.record",
        "mcdrop.varying",
        "mcdrop.observed",
        "mcdrop.direct",
        "mcdrop.tiers",
        "mcdrop.trace",
        "mcdrop.effects",
        "mcdrop.probe",
        "mcdrop.refusals",
        "mcdrop.flags",
        "mcdrop.discover",
        "mcdrop.diagnose",
        "mcdrop.backends.torch",
        "mcdrop.capture",
        "mcdrop.checks",
        "mcdrop.exact",
        "mcdrop.kept",
        "mcdrop.active",
        "mcdrop.kernel_rules",
        "mcdrop.row_rules",
        "mcdrop.kernels",
        "mcdrop.plan",
        "mcdrop.planning",
        "mcdrop.plans",
        "mcdrop.program",
        "mcdrop.replay",
        "mcdrop.sums",
        "mcdrop.digits",
        "mcdrop.attention",
        "mcdrop.convolve",
        "mcdrop.each_pass",
        "mcdrop.blockwise",
        "mcdrop.masking",
        "mcdrop.stages",
        "mcdrop.fuse",
        "mcdrop.heads",
        "mcdrop.onednn",
        "mcdrop.products",
        "mcdrop.ready",
        "mcdrop.rewrites",
        "mcdrop.sharded",
        "mcdrop.stacks",
        "mcdrop.standing",
        "mcdrop.onnx_export",
        "mcdrop.any_rows",
        "mcdrop.programs",
        "mcdrop.posterior_torch",
        "mcdrop.convert",
        "mcdrop.factory",
        "models.networks",
        "models.recipes",
    ],
    "onnx": ["mcdrop.backends.onnx", "mcdrop.onnx_*", "mcdrop.posterior_graph"],
    "onnxruntime": ["mcdrop.onnx_sessions"],
    "onnxscript": ["mcdrop.onnx_export"],
    "matplotlib": ["models.figure", "mcdrop.plotting"],
    "pyarrow": ["mcdrop.files", "mcdrop.parquet"],
    "ray": ["mcdrop.distributed"],
    "sklearn": ["mcdrop.detect", "models.data"],
    "typer": ["mcdrop.cli", "mcdrop.console"],
    "rich": ["mcdrop.console", "models.train"],
    "anyio": ["service.*"],
    "uvicorn": ["service.server"],
    "fastapi": ["service.app", "service.server"],
    "starlette": ["service.app"],
    "pydantic": ["service.schemas", "service.settings"],
    "pydantic_settings": ["service.settings"],
}

MODULE_LINES = {"mcdrop": 300, "service": 300, "models": 300, "tests": 400, "benchmarks": 150}
FUNCTION_LINES = 40


@dataclass(frozen=True)
class Module:
    """One file of the project."""

    name: str
    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"))


def _modules(*packages: str) -> list[Module]:
    found = []
    for path in sorted(path for package in packages for path in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append(Module(".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


SHIPPED = _modules(*PACKAGES)
NAMES = {module.name for module in SHIPPED}


def _nodes(tree: ast.AST, *, types: bool) -> Iterator[ast.AST]:
    """Walks over the nodes; without ``types`` not into ``if TYPE_CHECKING``, which never runs."""
    for child in ast.iter_child_nodes(tree):
        if types or not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            yield child
            yield from _nodes(child, types=types)


def _imports(module: Module, *, types: bool = True) -> Iterator[str]:
    """The modules that are named in imports, function-level ones too; ``from mcdrop import masks`` is mcdrop.masks."""
    for node in _nodes(module.tree, types=types):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in NAMES else node.module


def _floor(name: str) -> int:
    """The number of its floor; one without a floor floats above all, and a test of its own says so."""
    found = (i for i, floor in enumerate(FLOORS) if any(fnmatch(name, pattern) for pattern in floor))
    return next(found, len(FLOORS))


def _listed(module: Module) -> set[str]:
    """The names in ``__all__``."""
    return {
        name
        for node in module.tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for name in [ast.unparse(element).strip("'") for element in getattr(node.value, "elts", [])]
    }


def _functions(module: Module) -> Iterator[tuple[str, int]]:
    """Each function and its length in lines without its docstring and decorators."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            first = node.body[0]
            documented = ast.get_docstring(node, clean=False) is not None and first.end_lineno is not None
            docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            yield f"{module.name}.{node.name}", node.end_lineno - node.lineno + 1 - docstring


def test_every_module_has_a_floor_of_its_own() -> None:
    assert SHIPPED
    patterns = [pattern for floor in FLOORS for pattern in floor]
    assert {name: "no floor" for name in NAMES if not any(fnmatch(name, pattern) for pattern in patterns)} == {}


def test_imports_go_down() -> None:
    bad = [
        f"{module.name} (floor {_floor(module.name)}) imports {target} (floor {_floor(target)})"
        for module in SHIPPED
        for target in _imports(module)
        if target in NAMES and _floor(target) >= _floor(module.name)
    ]
    assert bad == []


def test_imports_are_absolute() -> None:
    bad = [
        module.name
        for module in SHIPPED
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert bad == []


def test_heavy_libraries_stay_at_home() -> None:
    bad = [
        f"{module.name} imports {target}"
        for module in SHIPPED
        for target in _imports(module, types=False)
        if (homes := HOMES.get(target.split(".")[0])) and not any(fnmatch(module.name, home) for home in homes)
    ]
    assert bad == []


def test_no_module_is_long() -> None:
    lines = {
        f"{module.name}: {count} lines": count > most
        for package, most in MODULE_LINES.items()
        for module in _modules(package)
        for count in [len(module.path.read_text(encoding="utf-8").splitlines())]
    }
    assert [module for module, long in lines.items() if long] == []


def test_no_function_is_long() -> None:
    functions = (function for module in _modules(*MODULE_LINES) for function in _functions(module))
    assert [f"{name}: {lines} lines" for name, lines in functions if lines > FUNCTION_LINES] == []


def test_modules_use_only_what_others_list() -> None:
    """What a module imports by name stands in ``__all__`` of its home; ruff checks that this is sorted (RUF022)."""
    listed = {module.name: _listed(module) for module in SHIPPED}
    bad = [
        f"{module.name} imports {alias.name}, which {node.module}.__all__ does not list"
        for module in SHIPPED
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom) and node.module in NAMES
        for alias in node.names
        if alias.name not in listed[node.module] and f"{node.module}.{alias.name}" not in NAMES
    ]
    assert bad == []


def test_importing_mcdrop_needs_numpy_alone() -> None:
    heavy = {*HOMES, "scipy", "service", "models"}
    assert _run(f"import sys, mcdrop; print(*sorted({heavy!r} & set(sys.modules)))") == []


def test_a_public_name_stays_itself_when_its_module_is_imported() -> None:
    """``mcdrop.predict`` is a function, also after ``from mcdrop.predict import ...`` somewhere."""
    names = "[n for n in mcdrop.__all__ if n != 'errors' and type(getattr(mcdrop, n)) is type(sys)]"
    assert _run(f"import sys, mcdrop; [getattr(mcdrop, n) for n in sorted(mcdrop.__all__)]; print(*{names})") == []
    assert _run(f"import sys, mcdrop, mcdrop.predict; print(*{names})") == []


def test_asking_what_is_in_a_store_does_not_load_torch() -> None:
    assert _run("import sys, mcdrop.store, models.train; print(*sorted({'torch', 'sklearn'} & set(sys.modules)))") == []


def _run(script: str) -> list[str]:
    """The words that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.split()
