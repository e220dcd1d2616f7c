"""The file of measured launch configs: written, read, chosen from, and ignored with a warning if unusable."""

import json
import warnings

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from hf_pcdvq_kernels.triton import launch_config, tuned, tuning  # noqa: E402

CPU = torch.device("cpu")
SHAPE = launch_config.Shape("pcdvq-2.25", 1, 4096, 8192)
OTHER = launch_config.Shape("stream-2.0", 8, 4096, 8192)
DEFAULT = launch_config.default(SHAPE, launch_config.processors(CPU))
CONFIG_OF_OTHER = launch_config.candidates(OTHER)[-1]
CONFIG = next(choice for choice in launch_config.candidates(SHAPE) if choice != DEFAULT)


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.forget()
    yield tmp_path / "hf_pcdvq/cpu.json"
    tuned.forget()


@pytest.fixture
def written(file):
    tuned.write(file, "a device", {SHAPE: tuned.TunedConfig(CONFIG, 1e-6, 2e-6)})
    return file


def test_what_was_measured_is_chosen_and_deleting_the_file_brings_the_default_back(written):
    assert tuned.file_of(CPU) == written
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.choose(SHAPE, CPU) == CONFIG
        assert tuned.choose(OTHER, CPU) == launch_config.default(OTHER, launch_config.processors(CPU))
        written.unlink()
        tuned.forget()  # as in a new process
        assert tuned.choose(SHAPE, CPU) == DEFAULT


def test_written_files_are_read_back_whole(written):
    measured = {**tuned.load(CPU), OTHER: tuned.TunedConfig(launch_config.candidates(OTHER)[-1], 3e-6, 3e-6)}
    tuned.write(written, "a device", measured)
    assert tuned.load(CPU) == measured and tuned.read(written, 1) == measured
    assert list(written.parent.iterdir()) == [written]


def changed(**fields):
    return lambda content: {**content, **fields}


def product(**fields):
    return lambda content: {**content, "products": [{**content["products"][0], **fields}]}


@pytest.mark.parametrize(
    "change, reason",
    [
        (changed(format=0), "it has format 0"),
        (changed(triton="2.0.0"), "and Triton 2.0.0, expected"),
        (changed(products=[{"shape": {}}]), "structure is not as expected"),
        (
            product(config={"block_n": 3, "num_warps": 1, "split_k": 1}),
            r"LaunchConfig\(block_n=3, num_warps=1, split_k=1\) is not a launch config for",
        ),
        (product(shape={"format": "qtip-2", "tokens": 1, "rows": 8, "columns": 64}), "no kernel supports"),
        (lambda content: [], "structure is not as expected"),
    ],
)
def test_a_file_that_does_not_fit_is_ignored_with_one_warning(written, change, reason):
    written.write_text(json.dumps(change(json.loads(written.read_text()))))
    with pytest.warns(UserWarning, match=reason) as caught:
        assert tuned.choose(SHAPE, CPU) == DEFAULT
        assert tuned.choose(OTHER, CPU) == launch_config.default(OTHER, launch_config.processors(CPU))
    assert len(caught) == 1 and str(written) in str(caught[0].message)


def test_a_damaged_file_is_ignored_with_a_warning(written):
    written.write_text(written.read_text()[:-20])
    with pytest.warns(UserWarning, match="ignores the measured launch configs in .*cpu.json"):
        assert tuned.choose(SHAPE, CPU) == DEFAULT


def test_nothing_is_measured_without_a_gpu(file):
    with pytest.raises(RuntimeError, match="measured on a GPU"):
        list(tuning.tune([SHAPE], CPU))
    assert not file.exists()


@pytest.mark.parametrize("file", sorted(tuned.SHIPPED.glob("*.json")), ids=lambda file: file.stem)
def test_what_comes_with_the_package_fits_the_kernels(file):
    assert tuned.read(file, 132, any_triton=True)


def test_an_h100_takes_what_was_measured_on_an_h200(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tuned.launch_config, "processors", lambda device: 132)
    assert (tuned.SHIPPED / f"{tuned.kind_of(torch.device('cuda'))}.json").is_file()


def test_what_the_user_has_measured_takes_precedence(written, tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path)
    shipped = {SHAPE: tuned.TunedConfig(DEFAULT, 1e-6, 1e-6), OTHER: tuned.TunedConfig(CONFIG_OF_OTHER, 1e-6, 2e-6)}
    tuned.write(tmp_path / "cpu-1.json", "a device", shipped)
    assert tuned.choose(SHAPE, CPU) == CONFIG and tuned.choose(OTHER, CPU) == CONFIG_OF_OTHER
    assert set(tuned.measured(CPU)) == {SHAPE}
    (tmp_path / "cpu-1.json").write_text("{")
    tuned.forget()
    with pytest.warns(UserWarning, match="ignores the measured launch configs"):
        assert tuned.choose(SHAPE, CPU) == CONFIG
