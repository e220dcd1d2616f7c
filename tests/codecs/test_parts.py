"""Where packed tensors can be cut into parts that are packed weights themselves, as docs/formats.md says."""

import pytest
import torch

from hf_pcdvq.codecs import SETTINGS, codec_of_setting


def random_packed(codec, rows, columns):
    """Any bits are valid codes."""
    packed = {}
    for suffix, (shape, dtype) in codec.specs(rows, columns).items():
        if dtype.is_floating_point:
            packed[suffix] = torch.rand(shape, dtype=dtype)
        else:
            info = torch.iinfo(dtype)
            packed[suffix] = torch.randint(info.min, info.max + 1, shape, dtype=torch.int64).to(dtype)
    return packed


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_part_decodes_to_a_part(setting):
    codec = codec_of_setting(setting, 64, 0)
    step, rows = codec.column_multiple(64 * 6), 2 * codec.row_multiple
    columns = 3 * step
    torch.manual_seed(0)
    packed, tables = random_packed(codec, rows, columns), codec.tables(columns)
    dense = codec.decode(packed, tables, torch.float32)
    for part in range(3):
        cut = {
            suffix: tensor.chunk(3, 1)[part].contiguous() if suffix in codec.along_inputs() else tensor
            for suffix, tensor in packed.items()
        }
        assert {suffix: tuple(tensor.shape) for suffix, tensor in cut.items()} == {
            suffix: shape for suffix, (shape, _) in codec.specs(rows, step).items()
        }
        torch.testing.assert_close(codec.decode(cut, tables, torch.float32), dense.chunk(3, 1)[part])
    first = codec.rows(packed, 0, codec.row_multiple)
    torch.testing.assert_close(codec.decode(first, tables, torch.float32), dense[: codec.row_multiple])


@pytest.mark.parametrize(
    ("setting", "multiple"),
    [
        ("pcdvq-2.0", 8),
        ("pcdvq-2.25", 32),
        ("ccq-2.75-published", 64),
        ("ccq-2.5-published", 64),
        ("ccq-2.0625-published", 128),
        ("stream-2.0", 8),  # the rotation's block
        ("int8", 8),
    ],
)
def test_parts_begin_where_no_word_and_no_block_of_the_rotation_is_cut(setting, multiple):
    codec = codec_of_setting(setting, 8, 0)
    assert codec.column_multiple(3 * 128) == multiple
    if codec.max_block:
        assert codec_of_setting(setting, 128, 0).column_multiple(3 * 128) == 128
