"""Which weights a folder's output layer has where config.json ties it to the embedding."""

import dataclasses

import torch

from pose_megatron.checkpoints.huggingface.shards import ShardedWeights
from pose_megatron.models.families import family_named
from pose_megatron.models.shape import ModelConfig
from pose_megatron.models.tensors import EMBEDDING, OUTPUT


def untied_if_another(model: ModelConfig, weights: ShardedWeights) -> ModelConfig:
    """The model as transformers 5 loads it; adds a warning where it is not what config.json says.

    Weights stored under the output layer's name alone are the embedding's too, and are given its
    name. An output layer of other values is kept, and the model becomes an untied one.
    """
    names = family_named(model.family).tensors
    embedding, head = names[EMBEDDING], names[OUTPUT]
    assert isinstance(embedding, str) and isinstance(head, str)
    if model.untie_embeddings_and_output_weights or head not in weights:
        return model
    if embedding not in weights:
        weights.rename(head, embedding)
        return model
    if weights.shapes[head] == weights.shapes[embedding]:
        one, other = weights[head], weights[embedding]
        wide = torch.promote_types(one.dtype, other.dtype)
        if torch.equal(one.to(wide), other.to(wide)):
            return model
    weights.warnings.append(
        f"config.json ties the embeddings, but {head} differs from {embedding}: both are kept and "
        "the model is read as an untied one, as transformers 5 does; readers that tie by "
        "config.json alone drop the first"
    )
    return dataclasses.replace(model, untie_embeddings_and_output_weights=True)
