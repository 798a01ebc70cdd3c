"""Every family of models in and out: bits, logits and rope, as a Markdown table.

    python tests/functional_tests/families.py

The models are small, random, and made by transformers, or by the forward passes below where it has
no class (Baichuan2, Meta's format). Logits are float32, for two rows of tokens, at plain positions
and at skip-wise ones up to the end of the window. transformers computes its angles as a float32
product, off by up to 8e-3 radians at position 131,071, so its logits are also compared with float64
angles in its place.
"""

import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from pose_megatron.runtime import cpu

    cpu.install()

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

WINDOW, TARGET, ORIGINAL, VOCABULARY = 48, 131072, 4096, 301
PLAIN = torch.arange(WINDOW).repeat(2, 1)
SKIPPED = torch.stack(
    [
        torch.cat(
            [torch.arange(20), torch.arange(70000, 70015), torch.arange(TARGET - 13, TARGET)]
        ),
        torch.cat([torch.arange(7), torch.arange(300, 330), torch.arange(100001, 100012)]),
    ]
)
TOKENS = torch.randint(VOCABULARY, (2, WINDOW), generator=torch.Generator().manual_seed(0))
MASK = torch.full((WINDOW, WINDOW), -torch.inf).triu(1).expand(2, 1, -1, -1)
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": TARGET,
    "tie_word_embeddings": False,
}
EXPERTS = {
    "head_dim": 32,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
}
YARN = {
    "rope_type": "yarn",
    "factor": TARGET / ORIGINAL,
    "original_max_position_embeddings": ORIGINAL,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Case:
    """One model of a family.

    Attributes:
        name: transformers' class without "ForCausalLM", or "Baichuan" or "Meta".
        config: config.json's keys that are not in SHAPE, or differ from it.
        scaled: whether it is also extended by YaRN and exported again.
        fault: whether the name table has a mistake, which the logits must show.
        ranks: tensor-parallel ranks of a model in Meta's format.
    """

    name: str
    config: dict
    scaled: bool = True
    fault: bool = False
    ranks: int = 1


def rope(theta: float, **scaling) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **scaling}}


CASES = {
    "LLaMA 1": Case("Llama", {"num_key_value_heads": 4, **rope(1e4)}),
    "LLaMA 2": Case("Llama", {"rms_norm_eps": 1e-5, **rope(1e4)}),
    "Llama 3.2, tied, llama3 rope": Case(
        "Llama", {"tie_word_embeddings": True, **rope(5e5, **LLAMA3)}, scaled=False
    ),
    "Mistral": Case("Mistral", {"sliding_window": None, "head_dim": 32, **rope(1e6)}),
    "Qwen2.5, tied": Case("Qwen2", {"tie_word_embeddings": True, **rope(1e6)}),
    "Qwen3": Case("Qwen3", {"head_dim": 32, **rope(1e6)}),
    "Mixtral": Case(
        "Mixtral",
        {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2, **rope(1e6)},
    ),
    "Qwen3-MoE": Case("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True, **rope(1e6)}),
    "Qwen3-MoE, tied, softmax over all": Case(
        "Qwen3Moe", {**EXPERTS, "tie_word_embeddings": True, **rope(1e6)}
    ),
    "Baichuan2": Case("Baichuan", {"num_key_value_heads": 4}),
    "GPT-J": Case(
        "GPTJ",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": TARGET,
            "rotary_dim": 8,
            "tie_word_embeddings": False,
        },
        scaled=False,
    ),
    "Meta LLaMA 2, 1 file": Case("Meta", {"norm_eps": 1e-5}, scaled=False),
    "Meta LLaMA 3, 2 files": Case(
        "Meta", {"norm_eps": 1e-5, "rope_theta": 5e5}, scaled=False, ranks=2
    ),
    "Meta Llama 3.1, 2 files": Case(
        "Meta",
        {"norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": True},
        scaled=False,
        ranks=2,
    ),
    "broken: Qwen3, values in the place of keys": Case(
        "Qwen3", {"head_dim": 32, **rope(1e6)}, scaled=False, fault=True
    ),
}


# How others make and compute each model.


@torch.no_grad()
def vivid(named: dict[str, torch.Tensor]) -> None:
    """Weights large enough that a mistake shows; norms that are not one."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in named.items():
        if "norm" in name or (".ln_" in name and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(0, 0.1, generator=generator)


def make(case: Case, folder: Path) -> None:
    """Writes the folder that the family's makers would publish."""
    if case.name == "Meta":
        return make_meta(case, folder)
    if case.name == "Baichuan":
        return make_baichuan(case, folder)
    import transformers

    shape = case.config if case.name == "GPTJ" else SHAPE | case.config
    config = getattr(transformers, f"{case.name}Config")(**shape)
    model = getattr(transformers, f"{case.name}ForCausalLM")(config)
    vivid(dict(model.named_parameters()))
    model.save_pretrained(folder)


def inverse_frequencies(config: dict, dim: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, float64 [dim / 2], and attention factor, by the papers' formulas."""
    keys = config.get("rope_parameters") or (LLAMA3 if config.get("use_scaled_rope") else {})
    theta = keys.get("rope_theta", config.get("rope_theta", 1e4))
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    if keys.get("rope_type") == "llama3":

        def llama3(f):  # Meta's apply_scaling, by wavelength
            wave, original = 2 * math.pi / f, keys["original_max_position_embeddings"]
            low, high = keys["low_freq_factor"], keys["high_freq_factor"]
            smooth = min(max((original / wave - low) / (high - low), 0), 1)
            return (1 - smooth) * f / keys["factor"] + smooth * f

        plain = [llama3(f) for f in plain]
    if keys.get("rope_type") == "yarn":

        def pair(turns):
            original = keys["original_max_position_embeddings"]
            return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), dim - 1)
        ramp = [min(max((i - low) / (high - low), 0), 1) for i in range(dim // 2)]
        plain = [f * (1 - r) + f / keys["factor"] * r for f, r in zip(plain, ramp, strict=True)]
        return torch.tensor(plain, dtype=torch.float64), 0.1 * math.log(keys["factor"]) + 1
    return torch.tensor(plain, dtype=torch.float64), 1.0


def cos_sin(positions, frequencies, exact: bool, factor: float = 1.0):
    """Cosine and sine of the angles, [b, s, dim / 2] each."""
    dtype = torch.float64 if exact else torch.float32
    angles = positions[..., None].to(dtype) * frequencies.to(dtype)
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


class ExactRotary(torch.nn.Module):
    """transformers' rotary module with float64 angles."""

    def __init__(self, config: dict, dim: int):
        super().__init__()
        self.frequencies, self.factor = inverse_frequencies(config, dim)

    def forward(self, x, position_ids, **_):
        cos, sin = cos_sin(position_ids, self.frequencies, True, self.factor)
        return torch.cat((cos, cos), -1).to(x.dtype), torch.cat((sin, sin), -1).to(x.dtype)


def reference(case: Case, folder: Path) -> Callable:
    """`logits(positions, exact) -> [b, s, vocabulary]` for the model in a folder; exact takes
    angles in float64."""
    if case.name == "Meta":
        return lambda positions, exact: meta_logits(case, folder, positions, exact)
    if case.name == "Baichuan":
        return lambda positions, exact: baichuan_logits(folder, positions, exact)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    config = json.loads((folder / "config.json").read_text())

    @torch.no_grad()
    def logits(positions, exact):
        if exact and case.name == "GPTJ":
            frequencies, _ = inverse_frequencies({}, config["rotary_dim"])
            cos, sin = cos_sin(torch.arange(TARGET), frequencies, True)
            for module in model.modules():  # each attention; from transformers 5.24 on, one for all
                if hasattr(module, "embed_positions"):
                    module.embed_positions = torch.cat((sin, cos), -1)
        elif exact:
            dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
            model.model.rotary_emb = ExactRotary(config, dim)
        return model(
            input_ids=TOKENS, position_ids=positions, attention_mask=MASK, use_cache=False
        ).logits

    return logits


def attend(q, k, v):
    """Causal attention: q [b, s, heads, d], k and v [b, s, groups, d] -> [b, s, heads * d]."""
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1)) + MASK
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def rms(x, weight, epsilon):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def make_baichuan(case: Case, folder: Path) -> None:
    """Writes names and config.json as in Baichuan2-7B-Base."""
    config = {k: v for k, v in (SHAPE | case.config).items() if k != "num_key_value_heads"}
    h, ffn = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, h),
        "lm_head.weight": (VOCABULARY, h),
        "model.norm.weight": (h,),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.W_pack.weight": (3 * h, h),
            f"{layer}.self_attn.o_proj.weight": (h, h),
            f"{layer}.mlp.gate_proj.weight": (ffn, h),
            f"{layer}.mlp.up_proj.weight": (ffn, h),
            f"{layer}.mlp.down_proj.weight": (h, ffn),
            f"{layer}.input_layernorm.weight": (h,),
            f"{layer}.post_attention_layernorm.weight": (h,),
        }
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    vivid(tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config |= {
        "architectures": ["BaichuanForCausalLM"],
        "model_type": "baichuan",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "z_loss_weight": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))


@torch.no_grad()
def baichuan_logits(folder: Path, positions, exact: bool):
    """Baichuan2-7B's modeling_baichuan.py: W_pack holds q, k, v in this order, RoPE pairs channels
    of the two halves, and NormHead gives every row of the head length one."""
    config = json.loads((folder / "config.json").read_text())
    w = load_file(folder / "model.safetensors")
    heads, epsilon = config["num_attention_heads"], config["rms_norm_eps"]
    frequencies, _ = inverse_frequencies({}, config["hidden_size"] // heads)
    cos, sin = (x[:, :, None] for x in cos_sin(positions, frequencies, exact))

    def rotate(x):
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    x = w["model.embed_tokens.weight"][TOKENS]
    for i in range(config["num_hidden_layers"]):
        layer = {k.split(f"layers.{i}.")[1]: v for k, v in w.items() if f"layers.{i}." in k}
        y = rms(x, layer["input_layernorm.weight"], epsilon)
        q, k, v = (y @ layer["self_attn.W_pack.weight"].T).unflatten(-1, (3, heads, -1)).unbind(2)
        x = x + attend(rotate(q), rotate(k), v) @ layer["self_attn.o_proj.weight"].T
        y = rms(x, layer["post_attention_layernorm.weight"], epsilon)
        gate, up = (y @ layer[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ layer["mlp.down_proj.weight"].T
    head = w["lm_head.weight"]
    return rms(x, w["model.norm.weight"], epsilon) @ (head / head.norm(dim=1, keepdim=True)).T


def make_meta(case: Case, folder: Path) -> None:
    """Writes Meta's format: one file for each tensor-parallel rank of its code."""
    params = {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": -1,
        "multiple_of": 32,
        **case.config,
    }
    h, ffn, kv = 64, 192, 32  # 8/3 of 64, in whole multiples of 32
    words = VOCABULARY + VOCABULARY % case.ranks
    # LLaMA 3 slices the rows of the embedding, LLaMA 2 its columns.
    columns = 0 if "rope_theta" in params else 1
    tensors = {
        "tok_embeddings.weight": ((words, h), columns),
        "norm.weight": ((h,), None),
        "output.weight": ((words, h), 0),
    }
    for i in range(2):
        tensors |= {
            f"layers.{i}.{name}.weight": value
            for name, value in {
                "attention.wq": ((h, h), 0),
                "attention.wk": ((kv, h), 0),
                "attention.wv": ((kv, h), 0),
                "attention.wo": ((h, h), 1),
                "feed_forward.w1": ((ffn, h), 0),
                "feed_forward.w3": ((ffn, h), 0),
                "feed_forward.w2": ((h, ffn), 1),
                "attention_norm": ((h,), None),
                "ffn_norm": ((h,), None),
            }.items()
        }
    whole = {name: torch.empty(shape) for name, (shape, _) in tensors.items()}
    vivid(whole)
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    for rank in range(case.ranks):
        torch.save(
            {
                name: (
                    whole[name] if dim is None else whole[name].chunk(case.ranks, dim)[rank]
                ).clone()
                for name, (_, dim) in tensors.items()
            },
            folder / f"consolidated.{rank:02d}.pth",
        )


@torch.no_grad()
def meta_logits(case: Case, folder: Path, positions, exact: bool):
    """Meta's llama/model.py: neighbouring channels are one complex number, which is rotated."""
    params = json.loads((folder / "params.json").read_text())
    ranks = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pth"))]
    w = {}
    for name, first in ranks[0].items():
        rows = (
            "wo." not in name
            and "w2." not in name
            and ("tok" not in name or first.size(1) == params["dim"])
        )
        w[name] = (
            torch.cat([r[name] for r in ranks], dim=0 if rows else 1)
            if ("norm" not in name)
            else first
        )
    heads, groups = params["n_heads"], params["n_kv_heads"]
    frequencies, _ = inverse_frequencies(params, params["dim"] // heads)
    turn = torch.complex(*cos_sin(positions, frequencies, exact))[:, :, None]

    def rotate(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(3)

    x = w["tok_embeddings.weight"][TOKENS]
    for i in range(params["n_layers"]):
        layer = {k.split(f"layers.{i}.")[1][:-7]: v for k, v in w.items() if f"layers.{i}." in k}
        y = rms(x, layer["attention_norm"], params["norm_eps"])
        q, k, v = (
            (y @ layer[f"attention.w{n}"].T).unflatten(-1, (c, -1))
            for n, c in (("q", heads), ("k", groups), ("v", groups))
        )
        x = x + attend(rotate(q), rotate(k), v) @ layer["attention.wo"].T
        y = rms(x, layer["ffn_norm"], params["norm_eps"])
        y = F.silu(y @ layer["feed_forward.w1"].T) * (y @ layer["feed_forward.w3"].T)
        x = x + y @ layer["feed_forward.w2"].T
    return (rms(x, w["norm.weight"], params["norm_eps"]) @ w["output.weight"].T)[..., :VOCABULARY]


# What we make of it.


def convert_tool():
    """tools/checkpoint/convert.py as a function of its command line."""
    from pose_megatron.commands import convert

    return lambda *argv: convert.run(convert.parser().parse_args([str(a) for a in argv]))


def our_logits(folder: Path) -> Callable:
    """`logits(positions)` of a checkpoint, loaded by stock megatron-core."""
    from pose_megatron.checkpoints.megatron import directory
    from pose_megatron.evaluation.logits import logits_function
    from pose_megatron.models.build import build_model, transformer_config
    from pose_megatron.training import checkpointing

    found = directory.find(folder)
    stage = build_model(transformer_config(found.model), found.model)
    checkpointing.load(found, [stage])
    assert sum(p.numel() for p in stage.parameters()) == found.model.num_parameters
    logits = logits_function(stage.eval(), found.model.vocab_size)
    return lambda positions: logits(TOKENS, WINDOW, positions)[..., :VOCABULARY]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, by file for Meta's format, where ranks repeat names."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    for path in sorted(folder.glob("*.pth")):
        found |= {(path.name, k): v for k, v in torch.load(path, weights_only=True).items()}
    return found


def same_bits(one: Path, other: Path) -> bool:
    one, other = stored(one), stored(other)
    return (
        one.keys() == other.keys()
        and bool(one)
        and all(t.dtype == other[n].dtype and torch.equal(t, other[n]) for n, t in one.items())
    )


def errors(logits: Callable, theirs: Callable) -> dict[str, float]:
    """Largest differences of a logit."""
    plain, skipped = logits(PLAIN), logits(SKIPPED)
    assert (plain - skipped).abs().max() > 0.05 and plain.abs().max() > 0.5
    return {
        "plain": (plain - theirs(PLAIN, False)).abs().max().item(),
        "skipped": (skipped - theirs(SKIPPED, False)).abs().max().item(),
        "exact": (skipped - theirs(SKIPPED, True)).abs().max().item(),
    }


def measure(case: Case, folder: Path) -> list[dict]:
    """Rows of the table: the family in, out, and out after an extension; on one rank."""
    from pose_megatron.checkpoints.megatron import directory
    from pose_megatron.models.families import FAMILIES
    from pose_megatron.rope.scaling import RopeScaling
    from tests import whole_models

    run, meta = convert_tool(), case.name == "Meta"
    theirs, megatron, back = folder / "theirs", folder / "megatron", folder / "back"
    kind, more = ("meta", ("--max-position-embeddings", TARGET)) if meta else ("hf", ())
    # It compares logits itself, and would not leave a wrong model behind.
    checks = ["--no-verify"] if case.fault else []
    make(case, theirs)
    qwen3 = FAMILIES["qwen3"]
    if case.fault:  # an easy mistake, as keys and values have the same shape
        (name,) = (n for n in qwen3.tensors if n.endswith("linear_qkv.weight"))
        q, k, v = qwen3.tensors[name]
        FAMILIES["qwen3"] = replace(qwen3, tensors=qwen3.tensors | {name: (q, v, k)})
    try:
        run(
            "--loader",
            kind,
            "--saver",
            "megatron",
            "--load-dir",
            theirs,
            "--save-dir",
            megatron,
            "--json",
            folder / "in.json",
            *more,
            *checks,
        )
        out = ("--target-tensor-parallel-size", case.ranks) if meta else ()
        run(
            "--loader",
            "megatron",
            "--saver",
            kind,
            "--load-dir",
            megatron,
            "--save-dir",
            back,
            "--json",
            folder / "out.json",
            *out,
            *checks,
        )
    finally:
        FAMILIES["qwen3"] = qwen3
    logits = our_logits(megatron)
    rows = [
        {
            "direction": direction,
            "same": same_bits(theirs, back),
            "rope": rope_error(folder / f"{direction}.json", of, megatron),
            **errors(logits, reference(case, of)),
        }
        for direction, of in (("in", theirs), ("out", back))
    ]
    if case.scaled:
        tensors, model = whole_models.read_weights(megatron)
        model = replace(model, rope_scaling=RopeScaling("yarn", TARGET / ORIGINAL, ORIGINAL))
        whole_models.write_weights(folder / "extended", tensors, model)
        llama = case.name == "Baichuan"  # whose own code cannot interpolate
        run(
            "--loader",
            "megatron",
            "--saver",
            "hf",
            "--load-dir",
            folder / "extended",
            "--save-dir",
            folder / "yarn",
            "--json",
            folder / "yarn.json",
            *["--as-llama"] * llama,
        )
        assert directory.find(folder / "extended").model == model
        case = replace(case, name="Llama") if llama else case
        rows.append(
            {
                "direction": "out, yarn" + ", as LLaMA" * llama,
                "same": None if llama else same_bits(theirs, folder / "yarn"),
                "rope": rope_error(folder / "yarn.json", folder / "yarn", folder / "extended"),
                **errors(our_logits(folder / "extended"), reference(case, folder / "yarn")),
            }
        )
    return rows


def rope_error(summary: Path, theirs: Path, ours: Path) -> float:
    """The larger relative error of frequencies and attention factor, as the tool compared them with
    transformers; for Baichuan and Meta that of the frequencies, by the formula above."""
    from pose_megatron.checkpoints.megatron import directory
    from pose_megatron.rope import scaling

    if found := json.loads(summary.read_text())["rope_errors"]:
        return max(found.values())
    model = directory.find(ours).model
    mine = scaling.inverse_frequencies(model.rotary_dim, model.rotary_base, model.rope_scaling)
    (config,) = (
        theirs / name for name in ("params.json", "config.json") if (theirs / name).is_file()
    )
    expected, _ = inverse_frequencies(json.loads(config.read_text()), model.rotary_dim)
    return ((mine - expected).abs() / expected).max().item()


def line(name: str, row: dict) -> str:
    numbers = " | ".join(f"{row[key]:.1e}" for key in ("plain", "skipped", "exact", "rope"))
    same = {True: "identical", False: "DIFFERS", None: "-"}[row["same"]]
    return f"| {name} | {row['direction']} | {same} | {numbers} |"


HEAD = """| family | direction | round trip | logits, plain | skip-wise | float64 angles | rope |
|---|---|---|---|---|---|---|"""


def main() -> None:
    import contextlib
    import io

    from transformers.utils import logging

    from pose_megatron.runtime import distributed

    logging.disable_progress_bar()
    distributed.initialize(seed=0)
    print(HEAD)
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stdout(io.StringIO()):
                rows = measure(case, Path(folder))
            for row in rows:
                print(line(name, row), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
