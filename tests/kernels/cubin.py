"""Compiles the kernels for a card that is not there, and reads the registers and spills from the machine code.

    python tests/kernels/cubin.py     # a line of JSON for each kernel, voxel type and architecture

Triton must not be interpreting. Exit code 0 and `skip: REASON` where this Triton cannot compile for NVIDIA.
"""

import json
import re
import struct
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from p2w.kernels import crop_resize_triton, sample_triton

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {"boxes_ptr": "*fp32", "part_ptr": "*bf16", "target_ptr": "*bf16", "ids_ptr": "*i64"}
SCALARS = {"low": "fp32", "scale": "fp32", "shift": "fp32"}
ALIGNED = ("whole_stride", "pitch", "depth", "height", "width")


def usage(kernel, pointers, constants, capability, warps):
    """{registers, stack, shared, instructions} of a kernel; a stack is where registers are spilled to."""
    names = kernel.arg_names
    types = POINTERS | SCALARS | pointers
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name.isupper() else types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name.endswith("_ptr") or name in ALIGNED
        },
    )
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [TOOL, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found, told
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": binary.metadata.shared,
        "instructions": code_bytes(binary.asm["cubin"]) // 16,  # each takes as many
    }


def code_bytes(cubin):
    """Size of the sections of machine code of an ELF file: no disassembler is needed to count instructions."""
    (at,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<2I4Q", cubin, at + number * size) for number in range(count)]
    named = {cubin[sections[names][4] + one[0] :].partition(b"\0")[0]: one[5] for one in sections}
    return sum(taken for name, taken in named.items() if name.startswith(b".text."))


def crop_resize(voxel, capability, width=128, size=(32, 64, 64)):
    """Of the crop-resize kernel for voxels of type `voxel`, as `run` would launch it."""
    tuning = crop_resize_triton.Tuning()
    elements = crop_resize_triton.tile_elements(tuning, voxel == "i32", capability // 10)
    constants = crop_resize_triton.tiles(width, size, elements, tuning) | {
        "OUT_D": size[0], "OUT_H": size[1], "OUT_W": size[2],
        "VECTOR": 4, "JOBS": 2, "ANTIALIAS": True, "NEAR": True,
    }  # fmt: skip
    kernel = crop_resize_triton.crop_resize_kernel
    return usage(kernel, {"whole_ptr": f"*{voxel}"}, constants, capability, tuning.num_warps)


def main():
    if not TOOL.exists():
        print(f"skip: this Triton has no {TOOL}")
        return
    boxes = {
        "LOW": 0.0625,
        "HIGH": 0.25,
        "WIDEST": 1.4,
        "DEPTH": 64,
        "HEIGHT": 128,
        "WIDTH": 128,
        "BLOCK": 32,
    }
    for capability in (80, 90):
        for voxel in ("i32", "i16", "fp32"):
            print(
                json.dumps(
                    {"kernel": f"crop_resize {voxel} sm_{capability}"} | crop_resize(voxel, capability)
                )
            )
        large = crop_resize("i32", capability, 64, (128, 128, 64))
        print(json.dumps({"kernel": f"crop_resize large sm_{capability}"} | large))
        found = usage(sample_triton.boxes_kernel, {"out_ptr": "*fp32"}, boxes, capability, 1)
        print(json.dumps({"kernel": f"boxes sm_{capability}"} | found))
        found = usage(sample_triton.uniforms_kernel, {"out_ptr": "*fp64"}, {"BLOCK": 1024}, capability, 4)
        print(json.dumps({"kernel": f"uniforms sm_{capability}"} | found))


if __name__ == "__main__":
    main()
