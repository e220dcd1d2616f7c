"""Help is instant: the commands are defined without importing PyTorch, Transformers or the plugin."""

import subprocess
import sys

from hf_pcdvq_cli import main

HEAVY = {"hf_pcdvq", "hf_pcdvq_kernels", "huggingface_hub", "numpy", "rich", "torch", "transformers"}


def test_help_of_every_command_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from hf_pcdvq_cli import main\n"
        "for command in [[], *([name] for name in main.commands)]:\n"
        "    shown = CliRunner().invoke(main, [*command, '--help'])\n"
        "    assert shown.exit_code == 0 and 'Usage: ' in shown.output, shown.output\n"
        "    print(*command)\n"
        f"print({HEAVY!r} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == [*main.commands, "set()"]
