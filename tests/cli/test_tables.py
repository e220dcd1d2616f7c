"""The tables that commands print show the counted values."""

import io

from rich.console import Console
from transformers import AutoModelForCausalLM

from hf_pcdvq import PcdvqConfig
from hf_pcdvq.files.size import count_folder, readable_size
from hf_pcdvq_cli.tables import layer_table, left_table, size_table


def test_tables_show_the_counted_numbers(tiny_model_dir, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=PcdvqConfig()).save_pretrained(tmp_path)
    count = count_folder(tmp_path)
    console = Console(file=io.StringIO(), width=200)
    for table in (size_table(count), layer_table(count), left_table(count.left_unpacked)):
        console.print(table)
    shown = console.file.getvalue()
    assert f"{count.bits_per_packed_weight:.3f}" in shown
    assert f"{count.bits_per_parameter:.3f}" in shown
    assert readable_size(count.packed_bytes) in shown
    assert "model.layers.*.mlp.down_proj" in shown
    assert "128 x 192" in shown
    assert "lm_head.weight" in shown
