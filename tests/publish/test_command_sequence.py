"""The commands in the order of docs/quickstart.md: each reads what the previous ones wrote."""

import json

from command_line import succeed
from hub_fixtures import TEXT
from huggingface_hub import ModelCard

from hf_pcdvq.evaluation.record import read_record

pytest_plugins = ["hub_fixtures"]

REPO = "me/tiny-2bit"


def test_from_a_dense_model_to_a_card_with_everything_that_was_measured(tiny_model_dir, hub, tmp_path):
    text, packed = tmp_path / "river.txt", tmp_path / "packed"
    text.write_text(TEXT)
    calibration = ["--dataset", text, "--samples", 4, "--length", 32]
    succeed("quantize", tiny_model_dir, "--out", packed, *calibration)
    succeed("eval", tiny_model_dir, packed, "--text", text, "--context", 64, "--noise-floor", "float32")
    succeed("speed", packed, "--new-tokens", 4)
    assert "is complete: 14 packed layers" in succeed("check", packed).stdout
    options = ["--license", "mit", "--base-model", "org/tiny"]
    printed = succeed("card", packed, REPO, *options).stdout
    assert " evaluation.json " in succeed("push", packed, REPO, *options, "--dry-run").stdout
    assert hub.requests == []
    succeed("push", packed, REPO, *options)

    # Nothing that is published says where files are on this machine.
    for name, content in hub.repos[REPO].files().items():
        assert str(tmp_path).encode() not in content and str(tiny_model_dir.parent).encode() not in content, name
    recorded = json.loads((packed / "config.json").read_text())["quantization_config"]["calibration"]
    assert recorded["dataset"] == "river.txt"

    card = ModelCard(hub.repos[REPO].files()["README.md"].decode())
    assert str(card) == printed
    record, speed = read_record(packed), json.loads((packed / "speed.json").read_text())
    metrics, floor = record.metrics, record.noise_floor.metrics
    for figure in (
        f"{metrics.perplexity_original:.3f} | {metrics.perplexity_packed:.3f}",
        f"{metrics.kl_median:.4f}, {metrics.kl_p90:.4f}, {metrics.kl_p99:.4f}",
        f"{100 * metrics.top1_agreement:.2f} %",
        f"the original in float32, KL mean | | {floor.kl_mean:.6f}",
        f"{record.bits_per_packed_weight:.3f} bits per packed weight",
        f"{speed['tokens_per_second']:.1f} tokens per second on {speed['device']}",
        f"computed on {record.device}",
        "hf-pcdvq eval model packed --text river.txt --context 64 --noise-floor float32",
        "hf-pcdvq quantize model --out packed --dataset river.txt --samples 4 --length 32",
        "Calibrated on 4 windows of 32 tokens",
    ):
        assert figure in card.text, figure
    stated = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert stated["kl_divergence"] == round(metrics.kl_mean, 5)
