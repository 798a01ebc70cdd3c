"""Needs Transformer Engine, modelopt and nvidia_resiliency_ext; our CI does not run it.

PoSE in a recipe of Megatron-Bridge 0.6 (megatron-core 0.19): LLaMA-2-7B from 4k to 128k tokens.
Written after the source of Megatron-Bridge 0.6.2.

    torchrun --nproc-per-node 8 bridge_recipe.py llama-2-7b books_text_document RUN
"""

import json
import sys
from dataclasses import dataclass
from functools import partial

from megatron.bridge import AutoBridge
from megatron.bridge.data import DatasetBuildContext, DatasetProvider
from megatron.bridge.recipes.llama import llama2_7b_pretrain_config
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.losses import masked_next_token_loss
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.state import GlobalState
from megatron.bridge.utils.common_utils import print_rank_0
from megatron.core.utils import get_attr_wrapped_model

from pose_megatron import PoseSampler, RopeScaling, build_datasets, install_pose
from pose_megatron.config.flags import DataFlags
from pose_megatron.megatron import micro_batch
from pose_megatron.models.gpt import softmax_scale
from pose_megatron.rope.huggingface import to_hf

WINDOW, TARGET = 4096, 131072
YARN = RopeScaling("yarn", factor=TARGET / WINDOW, original_max_position_embeddings=WINDOW)


@dataclass(kw_only=True)
class PoseDatasets(DatasetProvider):
    """Skip-wise training samples, and plain ones for validation."""

    data_path: list[str]
    vocab_size: int  # tokens, without padding
    split: str = "990,10,0"
    seed: int = 1234
    dataloader_type: str = "single"

    def build_datasets(self, context: DatasetBuildContext):
        return build_datasets(
            DataFlags(data_path=self.data_path, split=self.split, seq_length=WINDOW),
            PoseSampler(WINDOW, TARGET, seed=self.seed),
            self.vocab_size,
            context.train_samples,
            context.valid_samples,
        )


def forward_step(state: GlobalState, data_iterator, model, return_schedule_plan: bool = False):
    """Bridge's own gives middle pipeline stages no position ids, and they rotate, too."""
    sizes = state.cfg.train.micro_batch_size, WINDOW
    batch = micro_batch(data_iterator, *sizes, get_attr_wrapped_model(model, "vp_stage"))
    forward = model.build_schedule_plan if return_schedule_plan else model
    output = forward(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(masked_next_token_loss, batch["loss_mask"])


def recipe(hf_folder: str, corpus: str, run: str) -> ConfigContainer:
    cfg = llama2_7b_pretrain_config()
    # Its weights are loaded by a hook, too, before ours.
    cfg.model = model = AutoBridge.from_hf_pretrained(hf_folder).to_megatron_provider()
    model.tensor_model_parallel_size, model.sequence_parallel = 2, True
    model.seq_length = WINDOW
    model.apply_rope_fusion = False  # its kernel takes one row of angles for all samples
    head = model.kv_channels or model.hidden_size // model.num_attention_heads
    model.softmax_scale = softmax_scale(head, model.rotary_percent, YARN)
    model.register_pre_wrap_hook(lambda chunks: [install_pose(chunk, YARN) for chunk in chunks])

    tokenizer = cfg.tokenizer
    tokenizer.tokenizer_type, tokenizer.tokenizer_model = "HuggingFaceTokenizer", hf_folder
    tokenizer.use_tokenizer_vocab_size = False  # the model's own
    cfg.dataset = PoseDatasets(data_path=[corpus], vocab_size=model.vocab_size)
    cfg.train.train_iters, cfg.train.global_batch_size, cfg.train.micro_batch_size = 1000, 64, 1
    cfg.optimizer.lr, cfg.optimizer.min_lr, cfg.scheduler.lr_warmup_iters = 2e-5, 2e-6, 10
    cfg.checkpoint.save = cfg.checkpoint.load = run

    # Bridge's checkpoints do not know the interpolation: this belongs in an export's config.json.
    rope = {"base": model.rotary_base, "rotary_dim": head, "max_position_embeddings": TARGET}
    print_rank_0(json.dumps(to_hf(YARN, **rope), indent=2))
    return cfg


if __name__ == "__main__":
    pretrain(recipe(*sys.argv[1:]), forward_step)
