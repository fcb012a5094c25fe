"""Stand-ins for CANN's libraries, so that the torch_npu wheel loads on a machine that has neither NPU nor CANN.

    python stubs.py FOLDER

What the wheel's libraries lack is read from their symbol tables. Each symbol becomes a C function that returns 0, but
for those in stubs.cpp: one device whose memory is the host's. No computation exists behind it.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

OPTIONAL = (  # looked up by name when the program runs, hence in no symbol table
    "aclSetCompileopt aclmdlRIAddCondTask aclmdlRICaptureBegin aclmdlRICaptureTaskGrpBegin aclmdlRICaptureTaskGrpEnd "
    "aclmdlRICaptureTaskUpdateBegin aclmdlRICaptureTaskUpdateEnd aclmdlRICaptureThreadExchangeMode "
    "aclmdlRICaptureToModelRIBegin aclmdlRICondHandleCreate aclmdlRICondHandleGetCondPtr aclmdlRIDebugJsonPrint "
    "aclmdlRIDebugPrint aclmdlRIDestroy aclmdlRIExecuteAsync aclmdlRIGetId aclrtDestroyStreamForce "
    "aclrtCtxSetSysParamOpt aclrtSetDeviceSatMode aclrtSetOpExecuteTimeOut").split()


def told(*command: str) -> list[str]:
    """The lines that a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def needed(library: Path) -> set[str]:
    """Names of the libraries that one loads."""
    return set(re.findall(r"NEEDED.*\[(.*)\]", "\n".join(told("readelf", "-d", str(library)))))


def symbols(library: Path, which: str) -> set[str]:
    """Names of the defined or undefined symbols of a library; weak ones need no definition."""
    rows = [line.split() for line in told("nm", "-D", f"--{which}-only", str(library))]
    if which == "defined":
        return {row[-1].split("@")[0] for row in rows}
    return {row[-1] for row in rows if row[-2] == "U" and "@" not in row[-1]}


def lacking(site: Path) -> tuple[set[str], set[str]]:
    """(libraries, symbols) that the torch_npu of a site-packages folder needs and nothing here has."""
    own = sorted((site / "torch_npu").rglob("*.so"))
    if not own:
        raise SystemExit(f"{site} has no torch_npu; install the wheel first")
    others = sorted((site / "torch" / "lib").glob("*.so*"))
    system = dict(re.findall(r"^\s+(\S+) .*=> (\S+)$", "\n".join(told("ldconfig", "-p")), re.M))
    wanted = set().union(*map(needed, own))
    found = [*own, *others, *(Path(os.path.realpath(system[n])) for n in wanted if n in system)]
    python = Path(sysconfig.get_config_var("LIBDIR")) / str(sysconfig.get_config_var("LDLIBRARY"))
    found += [Path(os.path.realpath(sys.executable)), *([python] if python.suffix == ".so" and python.exists() else [])]
    have = set().union(*(symbols(f, "defined") for f in found))
    missing = set().union(*(symbols(f, "undefined") for f in own)) - have
    return wanted - {f.name for f in found} - set(system), {s for s in missing if not s.startswith(("Py", "_Py"))}


def build(site: Path, out: Path) -> str:
    """Compile the stand-ins into a folder for LD_LIBRARY_PATH; says what was made."""
    libraries, names = lacking(site)
    out.mkdir(parents=True, exist_ok=True)
    one = '__attribute__((weak, visibility("default"))) long {}(void) {{ return 0; }}\n'
    (out / "zero.c").write_text("".join(map(one.format, sorted(names | set(OPTIONAL)))))
    (out / "empty.c").write_text("")
    run = lambda *command: subprocess.run(command, check=True, cwd=out)
    flags = "-O1", "-w", "-fPIC"
    run("gcc", *flags, "-c", "zero.c")
    run("g++", *flags, "-std=c++17", "-c", str(Path(__file__).with_suffix(".cpp").resolve()))
    run("g++", "-shared", "-Wl,-soname,libstubs.so", "-o", "libstubs.so", "zero.o", "stubs.o")
    for name in sorted(libraries):
        run("gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN", "-o", name,
            "empty.c", "-L.", "-lstubs")
    return f"stand-ins for {len(libraries)} libraries and {len(names)} symbols of CANN in {out}"


if __name__ == "__main__":
    print(build(Path(sysconfig.get_path("purelib")), Path(sys.argv[1]).resolve()))
