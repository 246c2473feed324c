"""Running a training step many times: compiled, captured in a CUDA graph, or plain. The numbers are the same."""

import atexit
import ctypes
import getpass
import hashlib
import os
import platform
import re
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from common.cli import HOW_TO_SCHEDULE, UserError
from common.nn import products_of


products = torch.float32  # what those between hidden layers are taken of in a step: --matmul


def setup(device: torch.device, seed: int, deterministic: bool = False, matmul: str = "float32") -> None:
    """Seed PyTorch and set what makes it fast on `device`. `matmul`: see --matmul."""
    global products
    torch.manual_seed(seed)
    products = getattr(torch, matmul)
    if matmul != "float32" and device.type == "cpu" and (ratio := speed_of(products)) < 1:
        print(f"note: --matmul {matmul} is slower on this processor, {ratio:.1f} times as fast as float32")
    choose_cache_folder()
    if deterministic != torch.are_deterministic_algorithms_enabled():  # it loads the compiler, for seconds
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # graphs, their streams and random states are the current device's
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to repeat itself
        torch.set_float32_matmul_precision("highest" if deterministic else "high")
    elif sys.platform == "linux":
        # Activations of half a megabyte are above glibc's limit for reuse: without this every one of them is mapped,
        # zeroed page by page and unmapped again, a third of a step's time. (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 1 << 30)
            libc.mallopt(-1, 1 << 30)


def speed_of(dtype: torch.dtype) -> float:
    """How many times as fast as in float32 a product of two layers is on this processor."""
    times = {}
    for kind in (torch.float32, dtype):
        x = torch.ones(256, 256, dtype=kind)
        times[kind] = seconds_per_step(lambda x=x: x @ x, torch.device("cpu"), n=20)
    return times[torch.float32] / times[dtype]


compiler_works = True  # until a step could not be compiled


def say(words: str) -> None:
    """Show what a step is waiting for. A progress bar that runs stands in for this."""


def compiled(fn, enabled: bool, long_sums: bool = False):
    """`torch.compile(fn)` as one graph, its backward passes included, drawing the same random numbers as eagerly.

    Inside, and nowhere else, products between hidden layers are taken as --matmul says. `long_sums`: gradients are sums
    over thousands of rows, not over a batch of hundreds.
    """
    if not enabled:
        return products_of(products)(fn)
    torch._dynamo.config.trace_autograd_ops = True
    torch._dynamo.config.error_on_recompile = True
    options = {
        # Shapes and closures never change after the first call, so of all that could be checked before every other only
        # numbers are; a step that is made again, from other arguments, is compiled again
        "guard_filter_fn": numbers,
        "fallback_random": True,
        # On a GPU a sum over a batch of 256 is one kernel so, and not two: a fifth of a step's kernels less
        "split_reductions": long_sums,
        # With --deterministic nothing is chosen by timing it: in another process the choice may be another one
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    fast = torch.compile(fn, fullgraph=True, dynamic=False, options=options, isolate_recompiles=True)

    made = False

    def call(*tensors):
        global compiler_works
        nonlocal made
        if not compiler_works:
            return fn(*tensors)
        first, made = not made, True
        if first:
            say("compiling")
        try:
            return fast(*tensors)
        except torch._dynamo.exc.RecompileError as error:
            found = re.search(r"guard failure\(s\):\n[^:]*: (.*?) *(#|\n|$)", str(error))
            raise UserError(
                f"a compiled step has read a number that is another one now (it was {found[1] if found else error}); "
                + HOW_TO_SCHEDULE
            ) from error
        except torch._dynamo.exc.BackendCompilerFailed as error:
            compiler_works = False
            cause = error.inner_exception
            lines = [line for line in str(cause).splitlines() if "error: " in line]  # a compiler's among its commands
            reason = lines[0].strip() if lines else f"{type(cause).__name__}: {cause}"
            tqdm.write(f"nothing is compiled, which makes steps slower: {reason}")
            return fn(*tensors)
        finally:
            if first:
                say("")

    return products_of(products)(call)


def numbers(guards) -> list[bool]:
    """Of all that PyTorch offers to check before every call of a compiled function, the numbers that it has read."""
    return [guard.has_value and isinstance(guard.value, (bool, int, float, str)) for guard in guards]


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds all that it needs. It says what is missing, as steps are slower without."""
    if device.type == "cuda":
        compilers = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    else:
        compilers = [os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")]
    missing = ""
    if not all(hasattr(torch._dynamo.config, name) for name in ("trace_autograd_ops", "error_on_recompile")):
        missing = f"what PyTorch 2.13 and 2.14 have for gradients in a compiled step (this is {torch.__version__})"
    elif device.type == "cuda" and not torch.utils._triton.has_triton():
        missing = "Triton"
    elif not any(shutil.which(name) for name in compilers):
        missing = f"the C++ compiler {compilers[-1]} (the environment variable CXX may name another one)"
    elif not Path(sysconfig.get_config_var("INCLUDEPY") or sysconfig.get_path("include"), "Python.h").exists():
        missing = "Python's headers (on Debian and Ubuntu the package python3-dev)"
    if missing:
        print(f"nothing is compiled, which makes steps slower: {missing} cannot be found")
    return not missing


def cpuinfo(*fields: str) -> list[str]:
    """What Linux says of the processor in these fields, each line once; nothing elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(rf"^(?:{'|'.join(fields)})\s*:.*$", text, re.M)))


def choose_cache_folder() -> None:
    """What is compiled is kept in a folder for processors like this one: code for another one gives NaN, or crashes.

    That is a folder in $TORCHINDUCTOR_CACHE_DIR, else in a temporary one of the user's that lasts. Where it cannot be
    written to, it is one that does not last. PyTorch needs such a folder even where nothing is compiled.
    """
    described = cpuinfo("model name", "flags", "Features", "CPU part") or [platform.processor()]
    processor = "|".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *described])
    name = "cpu-" + hashlib.sha256(processor.encode()).hexdigest()[:12]
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    place = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/o2rl-compiled-{user}")
    folder = place if place.name == name else place / name  # chosen by the process that started this one
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        place = Path(tempfile.mkdtemp(prefix="o2rl-compiled-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        print(f"the cache folder {folder} cannot be written to ({error.strerror}): what is compiled is not kept")
        folder = place / name
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


class Stepper:
    """Runs `step()` n times and averages what it returns, without reading anything from the device on the way.

    `step` returns a dictionary of scalar tensors; what it computes only now and then it returns only then. On CUDA,
    `steps_per_graph` whole steps are captured in one graph after three or more warm-up steps, which count; the rest of
    a call that does not fill a graph runs one by one. A step that does something else every `phases`-th time is
    captured once for each phase.
    """

    def __init__(self, step, device: torch.device, graph: bool = False, steps_per_graph: int = 10, phases: int = 1):
        self.device = device
        self.sums: dict[tuple[str, ...], torch.Tensor] = {}  # of the steps that returned these names
        self.counts: Counter[tuple[str, ...]] = Counter()  # and how many these were
        self.use_graph = graph and device.type == "cuda"
        self.phases = phases
        self.steps_per_graph = steps_per_graph - steps_per_graph % phases if steps_per_graph > phases else 1
        self.change(step)

    def change(self, step) -> None:
        """Run another step from now on. Nothing that was captured of the one before is replayed; its averages stay."""
        self.step = step
        self.warmup = max(3, self.phases)  # whatever a step does has been done, and so compiled, before it is captured
        self.ran, self.graphs = 0, {}

    def run(self, n: int) -> None:
        while n:
            if not self.use_graph or self.warmup or n < self.steps_per_graph:
                names = [self._eager() if self.use_graph and self.warmup else self._one()]
            else:
                phase = self.ran % self.phases
                if phase not in self.graphs:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):  # records the steps and does not run them
                        self.graphs[phase] = graph, [self._one() for _ in range(self.steps_per_graph)]
                graph, names = self.graphs[phase]
                graph.replay()
            self.counts.update(names)
            self.ran, n = self.ran + len(names), n - len(names)

    def _one(self) -> tuple[str, ...]:
        metrics = self.step()
        names = tuple(metrics)
        if names not in self.sums and (wrong := [x for x in metrics if getattr(metrics[x], "shape", 0) != ()]):
            found = getattr(metrics[wrong[0]], "shape", type(metrics[wrong[0]]).__name__)
            raise UserError(f"the metric {wrong[0]} has to be a tensor of shape (), not {found}; log a mean")
        if names not in self.sums and (taken := {"score", "success"}.intersection(names)):
            raise UserError(f"the metric {min(taken)} is called as what an evaluation measures; give it another name")
        values = torch.stack([value.detach() for value in metrics.values()])
        if names not in self.sums:
            self.sums[names] = torch.zeros_like(values)
        self.sums[names].add_(values)
        return names

    def _eager(self) -> tuple[str, ...]:
        """A warm-up step on a stream of its own, as capturing demands."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            names = self._one()
        torch.cuda.current_stream().wait_stream(stream)
        self.warmup -= 1
        return names

    def finite(self) -> bool:
        """Whether nothing that was returned since the last reading is NaN or infinite."""
        return all(sums.isfinite().all() for sums in self.sums.values())

    def means(self) -> dict[str, float]:
        """Averages since the last call, each over the steps that returned it: here a stage waits for the device."""
        totals, counts = Counter(), Counter()
        for names in list(self.counts):
            totals.update(dict(zip(names, self.sums[names].tolist(), strict=True)))
            counts.update(dict.fromkeys(names, self.counts.pop(names)))
            self.sums[names].zero_()
        return {name: total / counts[name] for name, total in totals.items()}

    def state_dict(self) -> dict:
        return {"sums": [(list(names), sums, self.counts[names]) for names, sums in self.sums.items()]}

    def load_state_dict(self, state: dict) -> None:
        for names, sums, count in state["sums"]:
            if count:  # else their means were read when it was saved, and nothing was returned since
                self.sums[tuple(names)], self.counts[tuple(names)] = sums.to(self.device).clone(), count


def seconds_per_step(step, device: torch.device, n: int = 5) -> float:
    """Median time of one `step()`, after two that are not counted."""
    times = []
    for _ in range(n + 2):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
