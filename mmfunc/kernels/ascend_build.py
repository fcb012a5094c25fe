"""Builds the Ascend C kernels by CANN's cmake modules and bisheng, from the table of `ascend_ops`.

    python -m mmfunc.kernels.ascend_build [FOLDER]

Makes libraries for direct launches, one for each type of elements, where `ascend_ops` looks for them; and a package of
operations for GE, so that graphs can hold the kernels: install the .run file that it prints. Written from CANN's public
documentation (operator projects, building by CMake); no CANN has compiled it yet.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from mmfunc.kernels.ascend_ops import KERNELS, home
from mmfunc.kernels.emulator import KERNELS as FILES
from mmfunc.kernels.emulator import SOURCES, TYPES

ARCH, UNIT = "dav-2201", "ascend910b"  # of Atlas A2 and A3

LIBRARIES = """\
cmake_minimum_required(VERSION 3.16)
find_package(ASC REQUIRED HINTS $ENV{{ASCEND_HOME_PATH}}/compiler/tikcpp/ascendc_kernel_cmake)
project(mmfunc_kernels LANGUAGES ASC CXX)
foreach(type {types})
  add_library(mmfunc_${{type}} SHARED launch_norm.asc launch_gate.asc launch_rope.asc)
  if(NOT type STREQUAL float)  # the cube unit transposes no float
    target_sources(mmfunc_${{type}} PRIVATE launch_attention.asc launch_attention_grad.asc)
  endif()
  target_compile_definitions(mmfunc_${{type}} PRIVATE DTYPE=${{type}})
  target_compile_options(mmfunc_${{type}} PRIVATE $<$<COMPILE_LANGUAGE:ASC>:--npu-arch={arch}>)
  target_include_directories(mmfunc_${{type}} PRIVATE {sources})
endforeach()
"""

PACKAGE = """\
cmake_minimum_required(VERSION 3.16)
find_package(ASC REQUIRED HINTS $ENV{{ASCEND_HOME_PATH}}/compiler/tikcpp/ascendc_kernel_cmake)
project(mmfunc_package)
npu_op_package(mmfunc TYPE RUN CONFIG ENABLE_SOURCE_PACKAGE True ENABLE_BINARY_PACKAGE True
               INSTALL_PATH ${{CMAKE_BINARY_DIR}})
set(made ${{CMAKE_BINARY_DIR}}/autogen)
npu_op_code_gen(SRC ${{CMAKE_SOURCE_DIR}}/host.cpp PACKAGE mmfunc OUT_DIR ${{made}} OPTIONS OPS_PRODUCT_NAME {unit})
npu_op_library(mmfunc_tiling TILING ${{CMAKE_SOURCE_DIR}}/host.cpp)
npu_op_library(mmfunc_proto GRAPH ${{CMAKE_SOURCE_DIR}}/host.cpp ${{made}}/op_proto.cc)
npu_op_kernel_options(mmfunc_kernels ALL OPTIONS -I{sources})
{kernels}
npu_op_kernel_library(mmfunc_kernels SRC_BASE ${{CMAKE_SOURCE_DIR}} TILING_LIBRARY mmfunc_tiling)
npu_op_package_add(mmfunc LIBRARY mmfunc_tiling mmfunc_proto mmfunc_kernels)
"""

HOST = """\
// Operations of GE for the kernels of mmfunc: attributes hold the number of blocks, the tiling, and the shapes and the
// types of results, all from the host program that made the graph.
#include "register/op_def_registry.h"

namespace {
ge::graphStatus Tile(gert::TilingContext* context) {
  const auto* attrs = context->GetAttrs();
  const auto* whole = attrs->GetListInt(1);
  const auto* real = attrs->GetListFloat(2);
  auto* tiling = context->GetRawTilingData();
  for (size_t i = 0; i < whole->GetSize(); i++) tiling->Append(static_cast<int32_t>(whole->GetData()[i]));
  for (size_t i = 0; i < real->GetSize(); i++) tiling->Append(real->GetData()[i]);
  context->SetBlockDim(static_cast<uint32_t>(*attrs->GetInt(0)));
  context->SetNeedAtomic(true);
  context->GetWorkspaceSizes(1)[0] = 16 * 1024 * 1024;  // what the system takes
  return ge::GRAPH_SUCCESS;
}
ge::graphStatus Shapes(gert::InferShapeContext* context) {
  const int64_t* at = context->GetAttrs()->GetListInt(3)->GetData();  // rank and sizes of each
  for (size_t i = 0; i < context->GetComputeNodeOutputNum(); i++) {
    auto* shape = context->GetOutputShape(i);
    shape->SetDimNum(*at);
    for (size_t d = 0; d < shape->GetDimNum(); d++) shape->SetDim(d, at[1 + d]);
    at += 1 + shape->GetDimNum();
  }
  return ge::GRAPH_SUCCESS;
}
ge::graphStatus Types(gert::InferDataTypeContext* context) {
  const auto* types = context->GetAttrs()->GetListInt(4);
  for (size_t i = 0; i < types->GetSize(); i++)
    context->SetOutputDataType(i, static_cast<ge::DataType>(types->GetData()[i]));
  return ge::GRAPH_SUCCESS;
}
}  // namespace

namespace ops {
"""


def kind(name: str) -> str:
    """The type of operation of GE that a kernel is."""
    return "Mmfunc" + name.title().replace("_", "")


def launches(source: str) -> str:
    """Entry points of a source file for the host: (pointers, blocks, stream)."""
    made = [f'#include "{source}.cpp"']
    for name in FILES[source]:
        k = KERNELS[name]
        n = len(k.inputs.split()) + len(k.outputs.split()) + 2  # workspace and tiling
        made += [f'extern "C" void launch_{name}(uint8_t** a, uint32_t blocks, void* stream) {{',
                 f"  {name}<<<blocks, nullptr, stream>>>({', '.join(f'a[{i}]' for i in range(n))});", "}"]
    return "\n".join(made) + "\n"


FIXED = {"codes": "UINT8", "partners": "INT32"} | dict.fromkeys(  # types of tensors that are not those of the elements
    "factor shift cos sin queries keys lse delta dfactor dshift dweight values dq dk dv".split(), "FLOAT")


def operation(name: str) -> str:
    """The prototype of a kernel as an operation of GE."""
    k = KERNELS[name]
    elements = ["BF16", "FLOAT16", "FLOAT"][: 2 if name.startswith("attention") else 3]
    wide = FIXED | ({"weight": "FLOAT"} if name.startswith("rope") else {})
    rows = [f"class {kind(name)} : public OpDef {{", " public:",
            f"  explicit {kind(name)}(const char* name) : OpDef(name) {{"]
    for side, names in (("Input", k.inputs.split()), ("Output", k.outputs.split())):
        for marked in names:
            plain = marked.rstrip("?+~")
            types = ", ".join(f"ge::DT_{wide.get(plain, e)}" for e in elements)
            formats = ", ".join(["ge::FORMAT_ND"] * len(elements))
            rows.append(f'    this->{side}("{plain}").ParamType({"OPTIONAL" if "?" in marked else "REQUIRED"})'
                        f".DataType({{{types}}}).Format({{{formats}}}){'.InitValue(0)' if '+' in marked else ''};")
    rows += [f'    this->Attr("{n}").AttrType(REQUIRED).{t}();' for n, t in (
        ("blocks", "Int"), ("whole", "ListInt"), ("real", "ListFloat"), ("shapes", "ListInt"), ("types", "ListInt"))]
    return "\n".join(rows + ["    this->SetInferShape(Shapes);", "    this->SetInferDataType(Types);",
                             f'    this->AICore().SetTiling(Tile).AddConfig("{UNIT}");', "  }", "};",
                             f"OP_ADD({kind(name)});", ""])


def write(folder: Path) -> None:
    """The two projects for cmake: libraries, and the package."""
    files = {"libraries/CMakeLists.txt": LIBRARIES.format(types=" ".join(TYPES.values()), arch=ARCH, sources=SOURCES)}
    files |= {f"libraries/launch_{source}.asc": launches(source) for source in FILES}
    kernels = []
    for source, names in FILES.items():
        for name in names:
            first = KERNELS[name].inputs.split()[0].upper()
            files[f"package/mmfunc_{name}.cpp"] = (f"#define DTYPE DTYPE_{first}\n#define {name} mmfunc_{name}\n"
                                                   f'#include "{source}.cpp"\n')
            kernels.append(f"npu_op_kernel_sources(mmfunc_kernels OP_TYPE {kind(name)} KERNEL_DIR . KERNEL_FILE "
                           f"mmfunc_{name}.cpp COMPUTE_UNIT {UNIT})")
    files["package/CMakeLists.txt"] = PACKAGE.format(unit=UNIT, sources=SOURCES, kernels="\n".join(kernels))
    files["package/host.cpp"] = HOST + "\n".join(map(operation, KERNELS)) + "}  // namespace ops\n"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def build(folder: Path, project: str) -> list[Path]:
    """Configure and compile one of the projects; a ValueError with the last lines of what failed."""
    if not shutil.which("cmake") or "ASCEND_HOME_PATH" not in os.environ:
        raise ValueError("the Ascend kernels are built by cmake and CANN: install cmake, source CANN's set_env.sh")
    made = folder / project / "build"
    for command in (["cmake", "-S", folder / project, "-B", made, f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}"],
                    ["cmake", "--build", made, "-j"]):
        done = subprocess.run(command, text=True, capture_output=True)
        if done.returncode:
            said = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
            raise ValueError(f"{' '.join(map(str, command))} failed:\n{said}")
    return sorted([*folder.glob("*.so"), *made.rglob("*.run")])


if __name__ == "__main__":
    _folder = Path(sys.argv[1]).resolve() if sys.argv[1:] else home()
    write(_folder)
    for _project in ("libraries", "package"):
        print("\n".join(map(str, build(_folder, _project))))
