"""Launches of a product with a driver that pretends to be an H100: compiled as there, recorded instead of run. A script, since Triton
has one driver per process. Prints what the launches of ops and those of a layer have in common, as JSON."""

import json
import sys

import torch
from hf_pcdvq_kernels import random_weights
from hf_pcdvq_kernels.triton import device, launch_config, launcher, product
from hf_pcdvq_kernels.triton.direct import TritonProduct
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

LAUNCHES = []


class Launcher:
    """What Triton calls with grid, stream, function and so on, and the kernel's arguments."""

    def __init__(self, source, metadata):
        self.name = metadata.name

    def __call__(self, x, y, z, stream, function, packed_metadata, launch_metadata, enter, leave, *arguments):
        LAUNCHES.append((self, (x, y, z), packed_metadata, arguments))


class Forgetful(launcher.Launcher):
    """Asks Triton at every launch."""

    __slots__ = ()

    def __call__(self, *pointers):
        self._compiled.clear()
        super().__call__(*pointers)


class Utils:
    def load_binary(self, *args):
        return 0, 0, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class Driver:
    launcher_cls, utils = Launcher, Utils()

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def recorded(call):
    """The launches of a call. Of tensors, dtype, alignment and, where they are those of the weight, which."""
    LAUNCHES.clear()
    call()
    return [
        (launcher, grid, metadata, [_described(value) for value in arguments])
        for launcher, grid, metadata, arguments in LAUNCHES
    ]


def _described(value):
    if not hasattr(value, "data_ptr"):
        return value
    return str(value.dtype), value.data_ptr() % 16, KEPT.get(value.data_ptr())


driver.set_active(Driver())
launch_config.processors = lambda device: 132
for module in (product, device):
    module.has_ptx = module.has_pdl = lambda device: True
setting = sys.argv[1]
weight = random_weights.random_weight(setting, 512, 4096)
signs = torch.ones(64)
tensors = [value for value in vars(weight).values() if isinstance(value, torch.Tensor)]
KEPT = {tensor.data_ptr(): number for number, tensor in enumerate([*tensors, signs])}
storage = torch.zeros(2, 4096 + 8, dtype=torch.bfloat16)
direct = TritonProduct(weight, [*tensors, signs])
aligned, unaligned = storage[:1, :4096], storage[:1, 3:4099]  # for which Triton compiles different kernels
prepared = direct.prepare(aligned, signs)  # as layers do that share their input
cases = [(aligned, None), (unaligned, None), (aligned, prepared)]

product.launcher = lambda kernel, grid, device, *given: Forgetful(kernel, grid, *given)
product._preparation.cache_clear()
wanted = [
    recorded(lambda x=x, given=given: product.product(x[None], weight, signs, prepared=given)) for x, given in cases
]
product.launcher = launcher.launcher
product._preparation.cache_clear()
found = [[recorded(lambda x=x, given=given: direct(x, signs, given)) for x, given in cases] for _ in range(2)]
names = [[launch[0].name for launch in launches] for launches in wanted]
print(json.dumps({"launches": names, "the same": [launches == wanted for launches in found]}))
