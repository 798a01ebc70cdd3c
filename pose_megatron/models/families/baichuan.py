"""Baichuan2-7B (arXiv 2309.10305): LLaMA with q, k, v in one tensor and a normalized output layer.

Every row of the output layer has length one when it is used (NormHead) and is stored as it was
trained. With its rows normalized once, the model is a LLaMA. The 13B model has ALiBi instead of
RoPE, and no max_position_embeddings in its config.json.
"""

import torch.nn.functional as F

from pose_megatron.models.families import llama
from pose_megatron.models.families.family import Family
from pose_megatron.models.tensors import LAYER, OUTPUT


class _Baichuan(Family):
    def adapt_output_layer(self, layer):
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear

        class NormalizedLinear(ColumnParallelLinear):
            def forward(self, input_, weight=None, runtime_gather_output=None):
                weight = F.normalize(self.weight if weight is None else weight)
                return super().forward(input_, weight, runtime_gather_output)

        layer.__class__ = NormalizedLinear
        # the weight that is multiplied is no parameter, and has no gradient buffer
        layer.gradient_accumulation_fusion = False

    def weight_as_llama(self, name, tensor):
        if name == OUTPUT:
            tensor.copy_(F.normalize(tensor.float()))


BAICHUAN = _Baichuan(
    name="baichuan",
    title="Baichuan2",
    tensors=llama.TENSORS
    | {f"{LAYER}.self_attention.linear_qkv.weight": f"{llama.HF_LAYER}.self_attn.W_pack.weight"},
    architecture="BaichuanForCausalLM",
    model_type="baichuan",
    only={"hidden_act": "silu", "tie_word_embeddings": False},
    carried=("auto_map",),  # its code, which comes with the folder
    reads_rope=False,
    in_transformers=False,
    in_megatron_lm=False,
    exports_as_llama=True,
)
