"""What `import hf_pcdvq` does and what it defers, each in a new process."""

import subprocess
import sys

import hf_pcdvq

# Publishing, and packages that only a command or a single function needs.
LATER = {
    "hf_pcdvq.publish",
    "hf_pcdvq.quantize",
    "rich",
    "click",
    "matplotlib",
    "numba",
    "triton",
    "datasets",
    "transformers.models.auto.modeling_auto",
}


def output(program):
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


def test_import_loads_only_what_registration_needs():
    assert output(f"import sys, hf_pcdvq; print({LATER!r} & set(sys.modules))") == "set()"


def test_import_registers_the_methods():
    program = (
        "import hf_pcdvq\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs\n"
        "print(configs['pcdvq'].__name__, configs['ccq'].__name__)"
    )
    assert output(program) == "PcdvqConfig CcqConfig"


def test_names_that_are_imported_on_first_use_are_there():
    program = (
        "import hf_pcdvq\n"
        "assert set(hf_pcdvq.__all__) <= set(dir(hf_pcdvq))\n"
        "from hf_pcdvq import *\n"
        "print(push_to_hub.__module__, quantize_model.__module__, hf_pcdvq.push_to_hub is push_to_hub)"
    )
    assert output(program) == "hf_pcdvq.publish.push hf_pcdvq.quantize True"


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(hf_pcdvq, "quantise_model")
