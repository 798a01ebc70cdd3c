"""Compares a Megatron checkpoint with its Hugging Face export, logit by logit."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pose_megatron import cpu

cpu.install()

import torch
from transformers import AutoModelForCausalLM

from pose_megatron import arguments, checkpoint, distributed
from pose_megatron.model import build_model, logits_function, transformer_config


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Runs both models in float32 on the same random tokens, at plain positions\n"
        "and at both ends of the extended window, and prints the largest difference of a logit.",
        epilog="example:\n"
        "  python tools/checkpoint/verify.py --megatron checkpoints/pose --hf models/pose",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--megatron", required=True, help="Megatron checkpoint folder")
    parser.add_argument("--hf", required=True, help="Hugging Face folder")
    parser.add_argument("--tokens", type=int, default=128, help="per row (default: 128)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class ExactAngles(torch.nn.Module):
    """transformers' rotary embedding with its angles taken in float64.

    Its own are a float32 product, off by up to 8e-3 radians at position 131,071.
    """

    def __init__(self, rotary):
        super().__init__()
        self.inv_freq = rotary.inv_freq.double()
        self.scaling = rotary.attention_scaling

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return ((angles.cos() * self.scaling).to(x.dtype),
                (angles.sin() * self.scaling).to(x.dtype))


@distributed.one_sentence_errors
def main() -> None:
    flags = parse()
    if not (Path(flags.hf) / "config.json").is_file():
        raise ValueError(f"--hf {flags.hf} is not a Hugging Face model: it has no config.json")
    found = checkpoint.find(flags.megatron)
    config, args = found.model, arguments.defaults()
    distributed.initialize(args.parallel, flags.seed)
    stage = build_model(transformer_config(config, args), config, args)
    checkpoint.load(found, [stage])
    ours = logits_function(stage.eval(), config.vocab_size)
    theirs = AutoModelForCausalLM.from_pretrained(
        flags.hf, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    ).eval().to(distributed.device())

    length, target = flags.tokens, config.max_position_embeddings
    length = min(length, target // 2 * 2)
    generator = torch.Generator().manual_seed(flags.seed)
    tokens = torch.randint(config.vocab_size, (2, length), generator=generator)
    plain = torch.arange(length).expand(2, -1)
    ends = torch.arange(length)
    ends = torch.where(ends < length // 2, ends, target - length + ends).expand(2, -1)
    # 4-D, or transformers takes a jump of positions for the start of another document.
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
    mask = mask[None, None].expand(2, 1, -1, -1)
    tokens, plain, ends, mask = (x.to(distributed.device()) for x in (tokens, plain, ends, mask))

    def difference(positions) -> float:
        with torch.no_grad():
            expected = theirs(
                tokens, position_ids=positions, attention_mask=mask, use_cache=False
            ).logits
        return (ours(tokens, length, positions) - expected).abs().max().item()

    errors = [("plain positions", difference(plain), 1e-4),
              (f"positions up to {target - 1:,}", difference(ends), 5e-3)]
    theirs.model.rotary_emb = ExactAngles(theirs.model.rotary_emb)
    errors.append((f"positions up to {target - 1:,}, exact angles", difference(ends), 1e-4))
    for name, error, bound in errors:
        print(f"largest difference of a logit at {name}: {error:.1e} (bound {bound:g})")
    worst = [name for name, error, bound in errors if not error <= bound]
    if worst:
        raise ValueError(f"{flags.hf} is not the model of {flags.megatron}: see {worst[0]}")


if __name__ == "__main__":
    main()
