""".metadata against torch.distributed.checkpoint, whose classes it is a pickle of."""

import pickle

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from pose_megatron.checkpoints.megatron.torch_dist_metadata import ChunkLocation, write_index

LAYERED = "decoder.layers.mlp.linear_fc2.weight"
CHUNKS = [
    ChunkLocation("output_layer.weight", (0, 0), (7, 4), torch.bfloat16, "__0_0.distcp", 0, 900),
    ChunkLocation(LAYERED, (0, 0, 0), (1, 3, 5), torch.float32, "__0_0.distcp", 900, 800),
    ChunkLocation(LAYERED, (1, 0, 0), (1, 3, 5), torch.float32, "__1_0.distcp", 0, 801),
]


def test_it_is_what_torchs_classes_pickle_to(tmp_path):
    (tmp_path / "__2_0.distcp").write_bytes(bytes(33))
    write_index(tmp_path, CHUNKS, 2, ["a._extra_state/shard_0_1"], tmp_path / "__2_0.distcp")
    size = torch.Size
    expected = Metadata(
        state_dict_metadata={
            "output_layer.weight": TensorStorageMetadata(
                TensorProperties(dtype=torch.bfloat16),
                size([7, 4]),
                [ChunkStorageMetadata(size([0, 0]), size([7, 4]))],
            ),
            LAYERED: TensorStorageMetadata(
                TensorProperties(dtype=torch.float32),
                size([2, 3, 5]),
                [ChunkStorageMetadata(size([i, 0, 0]), size([1, 3, 5])) for i in range(2)],
            ),
            "a._extra_state/shard_0_1": BytesStorageMetadata(),
        },
        storage_data={
            MetadataIndex("output_layer.weight", size([0, 0])): _StorageInfo(
                "__0_0.distcp", 0, 900
            ),
            MetadataIndex(LAYERED, size([0, 0, 0])): _StorageInfo("__0_0.distcp", 900, 800),
            MetadataIndex(LAYERED, size([1, 0, 0])): _StorageInfo("__1_0.distcp", 0, 801),
            MetadataIndex("a._extra_state/shard_0_1"): _StorageInfo("__2_0.distcp", 0, 33),
        },
    )
    found = FileSystemReader(tmp_path).read_metadata()
    assert pickle.loads((tmp_path / ".metadata").read_bytes()) == expected
    assert pickle.dumps(found.state_dict_metadata) == pickle.dumps(expected.state_dict_metadata)
    assert found.storage_data == expected.storage_data
