"""Plugin for vLLM: `vllm serve FOLDER` runs models packed with hf_pcdvq, which their config.json announces.

vLLM calls `register` in each of its processes (entry-point group `vllm.general_plugins`). Depends on the kernels and vLLM,
never on `hf_pcdvq`, which needs a newer Transformers than vLLM allows.
"""


def register() -> None:
    """Make the quantization methods known to vLLM. Calling it again changes nothing."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .config import CONFIGS

    for config in CONFIGS:
        register_quantization_config(config.method)(config)
