"""A program: scripts of a real Megatron-LM checkout with `--attention muse`, on a machine without a GPU.

    torchrun --nproc-per-node 2 tests/megatron_lm.py CHECKOUT/pretrain_gpt.py FOLDER --attention muse ...

FOLDER holds `bin/nvcc`, which Megatron-LM asks for CUDA's version before it compiles nothing.
"""
import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.utils.cpp_extension

GPU = SimpleNamespace(major=9, minor=0, multi_processor_count=1, total_memory=2 ** 36, name="none")


def main() -> None:
    """Run the script named first with the arguments from the third on."""
    script, cuda = sys.argv[1:3]
    sys.path[0] = str(Path(__file__).parents[1])
    from tests.megatron_cpu import cuda_as_cpu  # before the checkout, which has a package of this name

    from muse_dist.megatron_patch.__main__ import main as launch

    sys.path[0] = str(Path(script).parent)
    answers = {
        "is_available": True, "device_count": 8, "set_device": None, "empty_cache": None, "get_device_name": "none",
        "get_device_capability": (9, 0), "get_device_properties": GPU, "memory_stats": {},
        **{f"{which}memory_{what}": 0 for which in ("", "max_") for what in ("allocated", "reserved")}}
    with contextlib.ExitStack() as stack:
        stack.enter_context(cuda_as_cpu())
        stack.enter_context(mock.patch.object(torch.utils.cpp_extension, "CUDA_HOME", cuda))
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, mock.Mock(return_value=answer)))
        for name in ("Event", "Stream", "default_stream"):
            stack.enter_context(mock.patch.object(torch.cuda, name, mock.MagicMock()))
        launch([script, *sys.argv[3:]])


if __name__ == "__main__":
    main()
