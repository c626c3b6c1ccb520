"""Folders as published, small: what diffusers and transformers save of their own classes."""

import json

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file

from models import weights


def tokenizer_of(folder, template, specials):
    """A tokenizer of bytes, saved: every prompt has a known number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, vocab[token]) for token in specials]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=specials[0], eos_token=specials[1]
    )
    fast.save_pretrained(folder)
    return fast


def small_vae(kind, **settings):
    """A VAE as published but for width and depth: 16 channels, scale 8, or with settings."""
    torch.manual_seed(0)
    sizes = dict(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    sizes |= dict(temperal_downsample=[False, True, True])
    return getattr(diffusers, kind)(**sizes | settings).eval()


def save_umt5(root):
    """Save a text_encoder and a tokenizer of Wan's kinds: bytes and an end, 32 channels."""
    torch.manual_seed(0)
    config = transformers.UMT5Config(
        vocab_size=300,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    transformers.UMT5EncoderModel(config).save_pretrained(root / "text_encoder")
    tokenizer_of(root / "tokenizer", "$A </s>", ["<pad>", "</s>"])


def save_qwen_vl(root):
    """Save a text_encoder and a tokenizer of Qwen-Image's kinds."""
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=300,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
            rope_scaling={"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
        ),
        vision_config=dict(
            depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32
        ),
        image_token_id=290,
        video_token_id=291,
        vision_start_token_id=292,
        vision_end_token_id=293,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(root / "text_encoder")
    tokenizer_of(root / "tokenizer", None, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


WIDTHS = dict(num_attention_heads=1, attention_head_dim=128, num_layers=1)
# Wan2.2-TI2V-5B's VAE, whose pixels come in patches
VAE_5B = dict(z_dim=48, decoder_base_dim=8, is_residual=True, in_channels=12, out_channels=12)
VAE_5B |= dict(patch_size=2, scale_factor_spatial=16)
VAE_5B |= dict(latents_mean=[0.1, -0.2, 0.3] * 16, latents_std=[0.5, 0.8, 1.2] * 16)


def small_spec(name):
    """A teacher as published, but for width and depth."""
    spec = weights.TEACHERS[name]
    small = dict(dim=128, ffn_dim=64, num_heads=1, num_layers=1, text_dim=32)
    if "qwen" in name:
        small = WIDTHS | dict(joint_attention_dim=32)
    return spec._replace(settings=spec.settings | small)


def save_diffusers(root, name):
    """Save a teacher's pipeline as diffusers does, with all of its parts."""
    spec, nets = small_spec(name), []
    for seed in (1, 2)[: 2 if spec.boundary else 1]:
        ours = weights.random_network(spec, torch.float32, seed=seed)
        if "qwen" in name:
            net = diffusers.QwenImageTransformer2DModel(**ours.settings)
        else:
            channels = {f"{x}_channels": spec.settings[f"{x}_dim"] for x in ("in", "out")}
            sizes = WIDTHS | dict(ffn_dim=64, text_dim=32)
            net = diffusers.WanTransformer3DModel(**sizes, **channels)
        net.load_state_dict({ours.diffusers_name(key): p for key, p in ours.named_parameters()})
        nets.append(net)
    if "qwen" in name:
        save_qwen_vl(root)
        vae = small_vae("AutoencoderKLQwenImage")
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        encoder = transformers.Qwen2_5_VLForConditionalGeneration
        options = {}
    else:
        save_umt5(root)
        vae = small_vae("AutoencoderKLWan", **VAE_5B if "5b" in name else {})
        flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        scheduler = diffusers.UniPCMultistepScheduler(**flow)
        encoder = transformers.UMT5EncoderModel
        options = dict(expand_timesteps=True) if "5b" in name else {}
        if spec.boundary:
            options |= dict(transformer_2=nets[1], boundary_ratio=spec.boundary)
        if spec.is_i2v:
            options |= dict(image_encoder=None, image_processor=None)
    parts = dict(vae=vae, scheduler=scheduler, transformer=nets[0], **options)
    parts["text_encoder"] = encoder.from_pretrained(root / "text_encoder")
    parts["tokenizer"] = transformers.AutoTokenizer.from_pretrained(root / "tokenizer")
    getattr(diffusers, spec.pipeline)(**parts).save_pretrained(root)
    if "qwen" not in name:
        [file] = (root / "text_encoder").glob("*.safetensors")
        keys = [key for key in load_file(file) if "shared" in key or "embed" in key]
        assert keys == ["shared.weight"]  # as published: the encoder's embedding is tied to it


def save_original(root, name):
    """Save a teacher as Wan does: transformers under the original names, the rest as pickles."""
    spec = small_spec(name)
    for seed, part in enumerate(weights.PAIRS[0] if spec.boundary else [""], 1):
        net = weights.random_network(spec, torch.float32, seed=seed)
        (root / part).mkdir(parents=True, exist_ok=True)
        file = root / part / "diffusion_pytorch_model.safetensors"
        save_file({key: p.clone() for key, p in net.named_parameters()}, file)
        kind = "i2v" if spec.is_i2v else "ti2v" if "5b" in name else "t2v"
        config = dict(_class_name="WanModel", eps=1e-6, freq_dim=256, text_len=512, model_type=kind)
        config |= {key: value for key, value in spec.settings.items() if key != "text_dim"}
        (root / part / "config.json").write_text(json.dumps(config))
    for file in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"):
        (root / file).write_bytes(b"PK\3\4 is never opened")
