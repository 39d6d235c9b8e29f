"""Breaks the mathematics on purpose, one place at a time, and counts what the tests notice.

    python benchmarks/mutate.py [--sample 200 --seed 0] [--since main] [--module losses] [--jobs 2]

Each mutant is one edit of the syntax tree of one module: a sign, a bound, a constant, a mask, a
denominator, an index, a detach, an order of arguments, a statement. The parent imports torch and
pytest once; each mutant runs in a forked child that sees a copy of the package with the mutated
module first on its path. A mutant no test fails is printed with its diff. Exit code 1 where fewer
than 95% of the mutants are killed, 2 where the tests do not pass without any.

Annotations, docstrings, imports, decorators and the text of errors are not mutated. Mutants that
cannot be told from the original are listed in EQUIVALENT with the reason, and left out.
"""

import argparse
import ast
import copy
import difflib
import importlib
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("masked", "advantages", "normalise", "experience", "losses", "models/exact_kl")
NEEDED = 0.95

FILL = "what stands outside the mask here is dropped by masked_sum, in value and in gradient"
EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "masked",
        "highest = torch.cat([filled, filled.new_full((2,), -torch.inf)]).amax()",
    ): "the maximum of one more -inf is the same",
    (
        "masked",
        "before_all = columns.new_full((mask.shape[0], 2), -1)",
    ): "the maximum of one more -1 is the same",
    (
        "masked",
        "return torch.cat([before_all, torch.where(mask, columns, -2)], dim=1).amax(dim=1)",
    ): "-1 stands in front of every row, so -2 is never its maximum",
    (
        "advantages",
        "size = same.sum(dim=0).double()",
    ): "to answer the same prompt is symmetric",
    (
        "normalise",
        "self._moments = merge_moments(moments, self._moments)",
    ): "merging commutes, up to the last bit",
    (
        "losses",
        "log_ratio = torch.where(mask, logprobs - old_logprobs.detach(), 1.0)",
    ): FILL,
    ("losses", "values = torch.where(mask, values, 1.0)"): FILL,
    ("losses", "r = torch.where(mask, ref_logprobs.detach() - logprobs, 1.0)"): FILL,
    (
        "losses",
        "objective = torch.where(advantages <= 0, bounded, objective)",
    ): "at an advantage of 0 both are 0, and so is the gradient of both",
}
"""(module, the changed line as `ast.unparse` writes it) -> why no test can tell it apart."""


# --- mutants


@dataclass(frozen=True)
class Mutant:
    """One edit: what kind, where, and the module's text with it."""

    module: str
    operator: str
    line: int
    source: str
    removed: str
    added: str


Edit = tuple[str, ast.AST | None]
"""Operator and the node that takes the old one's place (None: the statement is dropped)."""

BINARY = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
BOUNDS = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE), ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
}  # fmt: skip
OPPOSITES = {
    "min": "max", "max": "min", "amin": "amax", "amax": "amin", "minimum": "maximum",
    "maximum": "minimum", "any": "all", "all": "any", "zeros_like": "ones_like",
    "ones_like": "zeros_like",
}  # fmt: skip
COMMUTATIVE = {"min", "max", "minimum", "maximum"}
"""Functions for which another order of arguments is the same result."""


def _edits(node: ast.AST, bound: set[str]) -> Iterator[Edit]:
    """Every replacement of one node; `bound` are the names assigned before it."""
    match node:
        case ast.BinOp(op=op):
            if type(op) in BINARY:
                yield "binary operator", _with(node, op=BINARY[type(op)]())
            if isinstance(op, ast.Div):
                yield "denominator dropped", node.left
        case ast.UnaryOp(op=ast.USub()):
            yield "sign flipped", node.operand
            if isinstance(node.operand, ast.Constant):
                yield "constant", _with(node, operand=ast.Constant(node.operand.value + 1))
        case ast.UnaryOp(op=ast.Not()):
            yield "condition negated", node.operand
        case ast.Compare(ops=[op]):
            for other in BOUNDS.get(type(op), ()):
                yield "comparison", _with(node, ops=[other()])
        case ast.BoolOp(op=op):
            other = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield "condition negated", _with(node, op=other)
        case ast.Constant(value=bool() as value):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield "constant", ast.Constant(value + 1)
            if value:
                yield "constant", ast.UnaryOp(ast.USub(), node)
        case ast.keyword(arg="dim", value=value):
            other = ast.Constant(1 if ast.unparse(value) == "0" else 0)
            yield "index off by one", _with(node, value=other)
        case ast.Subscript(value=ast.Attribute(attr="shape"), slice=ast.Constant(value=value)):
            yield "index off by one", _with(node, slice=ast.Constant(1 - value))
        case ast.Subscript(slice=ast.Tuple(elts=[*before, ast.Name() as name])):
            earlier = ast.BinOp(name, ast.Sub(), ast.Constant(1))
            yield "index off by one", _with(node, slice=ast.Tuple([*before, earlier], ast.Load()))
        case ast.If(test=test) | ast.IfExp(test=test):
            yield "condition negated", _with(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.Name(id=name) if name in OPPOSITES and isinstance(node.ctx, ast.Load):
            yield "minimum for maximum", _with(node, id=OPPOSITES[name])
        case ast.Attribute(attr=name) if name in OPPOSITES:
            yield "minimum for maximum", _with(node, attr=OPPOSITES[name])
        case ast.Subscript(value=value, slice=ast.Name(id="mask")):
            yield "mask dropped", value
        case ast.AugAssign():
            yield "statement dropped", None
        case ast.Expr(value=ast.Call()):
            yield "statement dropped", None
        case ast.Assign(targets=[target]) if _rebinds(target, bound):
            yield "statement dropped", None
    if isinstance(node, ast.Call):
        yield from _call_edits(node)
    if isinstance(node, ast.Return) and node.value is not None and _is_signed(node.value):
        yield "sign flipped", _with(node, value=ast.UnaryOp(ast.USub(), node.value))


def _call_edits(node: ast.Call) -> Iterator[Edit]:
    function = node.func
    if isinstance(function, ast.Attribute) and function.attr == "detach":
        yield "detach dropped", function.value
    if isinstance(function, ast.Attribute) and function.attr == "double":
        yield "precision dropped", function.value
    if _name(function) == "where":
        yield "mask dropped", node.args[1]
        yield "mask inverted", _with(node, args=[node.args[0], node.args[2], node.args[1]])
    elif len(node.args) >= 2 and _name(function) not in COMMUTATIVE:
        yield "arguments swapped", _with(node, args=[node.args[1], node.args[0], *node.args[2:]])
    for index, keyword in enumerate(node.keywords):
        if keyword.arg == "min" or keyword.arg == "max":
            swapped = ast.keyword("max" if keyword.arg == "min" else "min", keyword.value)
            others = [*node.keywords[:index], swapped, *node.keywords[index + 1 :]]
            yield "minimum for maximum", _with(node, keywords=others)
    name = _name(function)
    if name in ("range", "arange", "reversed"):
        if name == "reversed":
            yield "index off by one", node.args[0]
        else:
            shorter = ast.BinOp(node.args[0], ast.Sub(), ast.Constant(1))
            yield "index off by one", _with(node, args=[shorter, *node.args[1:]])
            yield "index off by one", _with(node, args=[ast.Constant(1), *node.args])


def _name(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _is_signed(value: ast.AST) -> bool:
    """Whether a minus in front of a returned expression means something."""
    return isinstance(value, ast.BinOp | ast.Call) and not (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Name)
        and (value.func.id[:1].isupper() or value.func.id in ("dict", "tuple"))
    )


def _rebinds(target: ast.AST, bound: set[str]) -> bool:
    """Whether the names a target binds all have a value without it (else the drop just crashes)."""
    if isinstance(target, ast.Tuple):
        return all(_rebinds(element, bound) for element in target.elts)
    return isinstance(target, ast.Attribute | ast.Subscript) or (
        isinstance(target, ast.Name) and target.id in bound
    )


def _fields(node: ast.AST) -> list[str]:
    """The parts of a node that mean something when it runs."""
    hidden = {
        ast.FunctionDef: {"returns", "decorator_list", "args"},
        ast.AnnAssign: {"annotation"},
        ast.ClassDef: {"decorator_list", "bases", "keywords"},
        ast.Raise: {"exc"},
        ast.Import: {"names"},
        ast.ImportFrom: {"names"},
    }.get(type(node), set())
    return [name for name in node._fields if name not in hidden]


def _sites(tree: ast.Module) -> Iterator[tuple[ast.AST, str, int | None, ast.AST, set[str]]]:
    """Parent, field, index, node and names bound before, for every node that may be edited."""

    def walk(parent: ast.AST, bound: set[str]) -> Iterator[tuple]:
        for field in _fields(parent):
            value = getattr(parent, field)
            children = enumerate(value) if isinstance(value, list) else [(None, value)]
            for index, child in children:
                if not isinstance(child, ast.AST) or _is_text(child) or _is_whole(parent, field):
                    continue
                inner = bound
                if isinstance(child, ast.FunctionDef):
                    inner = {arg.arg for arg in ast.walk(child.args) if isinstance(arg, ast.arg)}
                    for defaults in ("defaults", "kw_defaults"):
                        for place, default in enumerate(getattr(child.args, defaults)):
                            if default is not None:
                                yield child.args, defaults, place, default, bound
                yield parent, field, index, child, bound
                yield from walk(child, inner)
                if isinstance(child, ast.Assign):
                    names = (name for target in child.targets for name in ast.walk(target))
                    bound.update(name.id for name in names if isinstance(name, ast.Name))

    yield from walk(tree, set())


def _is_whole(parent: ast.AST, field: str) -> bool:
    """Whether a field is mutated with its parent: an axis, or the digits of a negative number."""
    if isinstance(parent, ast.keyword):
        return parent.arg == "dim"
    if isinstance(parent, ast.UnaryOp):
        return isinstance(parent.operand, ast.Constant)
    shape = isinstance(parent, ast.Subscript) and getattr(parent.value, "attr", "") == "shape"
    return shape and field == "slice"


def _is_text(node: ast.AST) -> bool:
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return docstring or isinstance(node, ast.JoinedStr)


def mutants_of(module: str, text: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its lines; those of the same text once."""
    tree = ast.parse(text)
    original = ast.unparse(tree)
    found: dict[str, Mutant] = {}
    for parent, field, index, node, bound in _sites(tree):
        for operator, replacement in _edits(node, set(bound)):
            source = _replaced(tree, parent, field, index, node, replacement)
            if source == original or source in found:
                continue
            removed, added = _changed_lines(original, source)
            line = getattr(node, "lineno", getattr(parent, "lineno", 0))
            found[source] = Mutant(module, operator, line, source, removed, added)
    return list(found.values())


def _replaced(tree, parent, field, index, node, replacement) -> str:
    new = ast.Pass() if replacement is None else replacement

    def put(value: ast.AST) -> None:
        if index is None:
            setattr(parent, field, value)
        else:
            getattr(parent, field)[index] = value

    put(new)
    source = ast.unparse(ast.fix_missing_locations(tree))
    put(node)
    return source


def _changed_lines(original: str, source: str) -> tuple[str, str]:
    lines = list(difflib.ndiff(original.splitlines(), source.splitlines()))
    removed = " | ".join(line[2:].strip() for line in lines if line.startswith("- "))
    added = " | ".join(line[2:].strip() for line in lines if line.startswith("+ "))
    return removed, added


# --- runs


def _tests_of(module: str) -> list[str]:
    folder, _, name = module.rpartition("/")
    names = (f"{folder}/test_{name}.py".lstrip("/"), "test_pitfalls_maths.py")
    return [str(ROOT / "tests" / name) for name in names]


def _child(package: Path, module: str, log: Path) -> int:
    """In the forked child: the module's tests against the package copy; pytest's exit code."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.path.insert(0, str(package))
    importlib.invalidate_caches()
    import hypothesis
    import pytest

    # a mutant has to fail a test, not to be explained: no shrinking
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutation", phases=phases)
    hypothesis.settings.load_profile("mutation")
    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"]
    code = int(pytest.main([*options, *_tests_of(module)]))
    loaded = sys.modules.get(f"ppomax.{module.replace('/', '.')}")
    if loaded is not None and not str(loaded.__file__).startswith(str(package)):
        return 70  # the mutant was not what the tests imported
    return code


class Runner:
    """Runs mutants in forked children, a few at a time, each in a package copy of its own."""

    def __init__(self, jobs: int, timeout: float) -> None:
        self.timeout = timeout
        self.folder = tempfile.TemporaryDirectory(prefix="ppomax-mutate-")
        self.running: dict[int, tuple[object, Path, float]] = {}
        self.free = []
        for job in range(jobs):
            place = Path(self.folder.name) / str(job)
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / "src" / "ppomax", place / "ppomax", ignore=ignored)
            self.free.append(place)

    def start(self, key: object, module: str, source: str | None) -> None:
        """Fork a child for one mutant (None: the module as it is)."""
        place = self.free.pop()
        for name in MODULES:
            shutil.copy(ROOT / "src" / "ppomax" / f"{name}.py", place / "ppomax" / f"{name}.py")
        if source is not None:
            (place / "ppomax" / f"{module}.py").write_text(source, encoding="utf-8")
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 71
            try:
                os.setsid()
                code = _child(place, module, place / "log.txt")
            finally:
                os._exit(code)
        self.running[pid] = (key, place, time.monotonic())

    def wait(self) -> tuple[object, int | None, str]:
        """Key, exit code (None: out of time) and output of the next child that ends."""
        while True:
            for pid, (key, place, started) in list(self.running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                code: int | None = os.waitstatus_to_exitcode(status) if done else None
                if not done:
                    if time.monotonic() - started < self.timeout:
                        continue
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                del self.running[pid]
                self.free.append(place)
                return key, code, (place / "log.txt").read_text(errors="replace")
            time.sleep(0.02)

    def close(self) -> None:
        """Remove the package copies."""
        self.folder.cleanup()


def _preload() -> None:
    """Import what every child needs, once; nothing here may run a torch operation."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.dont_write_bytecode = True  # two mutants of one second and size would share a .pyc
    for name in ("beartype", "hypothesis", "jaxtyping", "numpy", "pytest", "torch"):
        importlib.import_module(name)
    importlib.import_module("torch.nn.functional")
    sys.modules["torch"].set_num_threads(1)
    if any(name.startswith("ppomax") for name in sys.modules):
        raise SystemExit("ppomax is imported already: mutants would not be seen")


def _baseline(modules: list[str]) -> float:
    """Seconds the slowest module's tests take unbroken; stops where they do not pass."""
    runner, slowest = Runner(1, timeout=300), 0.0
    for module in modules:
        started = time.monotonic()
        runner.start(module, module, ast.unparse(ast.parse(_text(module))))
        _, code, output = runner.wait()
        if code != 0:
            print(f"{module}: tests do not pass without a mutant (exit {code})\n{output[-3000:]}")
            raise SystemExit(2)
        slowest = max(slowest, time.monotonic() - started)
    runner.close()
    return slowest


def _text(module: str) -> str:
    return (ROOT / "src" / "ppomax" / f"{module}.py").read_text(encoding="utf-8")


def _text_at(module: str, commit: str) -> str:
    """The module as it was; empty where there was none."""
    place = f"{commit}:src/ppomax/{module}.py"
    found = subprocess.run(["git", "show", place], cwd=ROOT, capture_output=True, check=False)
    return found.stdout.decode()


def _run_all(mutants: list[Mutant], runner: Runner, report: Callable[[int], None]) -> list[bool]:
    """For each mutant whether a test failed it (running out of time counts)."""
    killed = [False] * len(mutants)
    waiting = list(range(len(mutants)))[::-1]
    finished = 0
    while waiting or runner.running:
        while waiting and runner.free:
            index = waiting.pop()
            runner.start(index, mutants[index].module, mutants[index].source)
        index, code, output = runner.wait()
        if code not in (None, 0, 1, 2) and code >= 0:
            print(f"cannot run {mutants[index]}: exit {code}\n{output[-3000:]}")
            raise SystemExit(2)
        killed[index] = code != 0
        finished += 1
        report(finished)
    return killed


# --- report


def _table(mutants: list[Mutant], killed: list[bool], column: str) -> str:
    total = Counter(getattr(mutant, column) for mutant in mutants)
    dead = Counter(getattr(m, column) for m, gone in zip(mutants, killed, strict=True) if gone)
    rows = [f"{column:<22}{'killed':>8}{'of':>6}"]
    rows += [f"{name:<22}{dead[name]:>8}{total[name]:>6}" for name in sorted(total)]
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=200, help="mutants to run; 0 runs all")
    parser.add_argument("--seed", type=int, default=0, help="which sample")
    parser.add_argument("--since", metavar="COMMIT", help="those that did not exist there, all")
    parser.add_argument("--module", choices=MODULES, action="append", help="this module only")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--list", action="store_true", help="print the mutants and run none")
    options = parser.parse_args()
    modules = options.module or list(MODULES)

    every = [mutant for module in modules for mutant in mutants_of(module, _text(module))]
    keys = {(m.module, m.added) for m in every}
    for key in EQUIVALENT:
        if key[0] in modules and key not in keys:
            print(f"stale entry in EQUIVALENT: {key}")
    chosen = [m for m in every if (m.module, m.added) not in EQUIVALENT]
    num_equivalent = len(every) - len(chosen)
    if options.since:
        old = {
            (m.module, m.removed, m.added)
            for module in modules
            for m in mutants_of(module, _text_at(module, options.since))
        }
        chosen = [m for m in chosen if (m.module, m.removed, m.added) not in old]
        modules = sorted({m.module for m in chosen})
    elif options.sample and options.sample < len(chosen):
        chosen = random.Random(options.seed).sample(chosen, options.sample)
    if options.list:
        for m in chosen:
            print(f"{m.module}:{m.line} {m.operator}\n  - {m.removed}\n  + {m.added}")
        return 0

    started = time.monotonic()
    _preload()
    seconds = _baseline(modules)
    print(
        f"{len(every)} mutants, {num_equivalent} of them equivalent; running {len(chosen)} "
        f"(seed {options.seed}), {seconds:.1f} s each at most where the tests pass"
    )
    runner = Runner(options.jobs, timeout=max(20.0, 5 * seconds))

    def report(finished: int) -> None:
        if finished % 20 == 0 or finished == len(chosen):
            print(f"{finished}/{len(chosen)} after {time.monotonic() - started:.0f} s", flush=True)

    killed = _run_all(chosen, runner, report)
    runner.close()

    print("\n" + _table(chosen, killed, "module"))
    print("\n" + _table(chosen, killed, "operator"))
    for mutant, gone in zip(chosen, killed, strict=True):
        if not gone:
            print(f"\nsurvived: src/ppomax/{mutant.module}.py:{mutant.line} ({mutant.operator})")
            print(f"  - {mutant.removed}\n  + {mutant.added}")
    share = sum(killed) / len(chosen) if chosen else 1.0
    print(f"\nkilled {sum(killed)} of {len(chosen)} ({share:.1%}; at least {NEEDED:.0%} wanted)")
    return 0 if share >= NEEDED else 1


if __name__ == "__main__":
    sys.exit(main())
