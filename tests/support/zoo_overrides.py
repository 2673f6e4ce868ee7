"""The tables of the model zoo: the values that make each config tiny, and the inputs of each model.

Data only. ``DIMENSIONS`` has values by field name for every config, ``CONFIGS`` further fields by the name of a config
class, nested ones included, and ``INPUTS`` the inputs of a model class other than ordinary ids. ``zoo.py`` uses them.
"""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 97
HIDDEN = 32
HEADS = 4
HEAD = HIDDEN // HEADS
LAYERS = 2
POSITIONS = 64

# The mappings of transformers.models.auto.modeling_auto that the zoo covers.
TASKS = (
    "CAUSAL_LM",
    "MASKED_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SPEECH_SEQ_2_SEQ",
)

_BY_VALUE: dict[int, str] = {
    VOCABULARY: "vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input",
    HIDDEN: """
        hidden_size d_model n_embd dim emb_dim embed_dim encoder_hidden_size decoder_hidden_size
        out_hidden_size output_dim text_hidden_size projection_dim cross_hidden_size
        hidden_size_global embedding_dim dim_model_base n_inner cross_attention_hidden_size
        patch_embed_hidden_size vision_hidden_size mm_embed_dim thinker_hidden_size
        audio_hidden_size""",
    16: """
        downsample_hidden_size output_channels embedding_size entity_emb_size input_embedding_size
        output_embedding_size hidden_size_per_layer_input q_lora_rank o_lora_rank num_mel_bins
        feature_size input_feat_size input_feat_per_channel mamba_d_state mamba_head_dim state_size
        ssm_state_size linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim
        intra_bottleneck_size image_text_hidden_size router_hidden_size latent_size
        projector_hidden_size""",
    40: """
        speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim intermediate_size
        encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff dff d_inner hidden_dim ffn_hidden_size
        feed_forward_size dim_ff mlp_dim dense_intermediate_size intermediate_size_mlp
        projection_hidden_dim alignment_intermediate_size projection_intermediate_size""",
    24: """
        moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        expert_ffn_hidden_size shared_experts_intermediate_size moe_shared_expert_intermediate_size
        share_expert_dim moe_hidden_size""",
    HEADS: """
        num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads
        encoder_num_attention_heads decoder_num_attention_heads cross_num_attention_heads
        swa_num_attention_heads linear_num_heads linear_num_value_heads index_n_heads
        num_cross_attention_heads num_self_attention_heads conf_num_attention_heads mamba_n_heads
        mamba_num_heads num_experts n_routed_experts num_local_experts moe_num_experts
        resampler_n_heads resampler_heads laurel_rank adapter_rank speech_encoder_attention_heads
        t2u_encoder_attention_heads t2u_decoder_attention_heads qk_rope_head_dim rotary_dim""",
    2: """
        num_key_value_heads encoder_num_key_value_heads decoder_num_key_value_heads
        cross_num_key_value_heads swa_num_key_value_heads linear_num_key_heads num_hidden_layers
        n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers
        num_decoder_layers depth layers encoder_num_hidden_layers decoder_num_hidden_layers
        num_experts_per_tok moe_topk moe_k top_k_experts conf_num_hidden_layers resampler_depth
        n_group topk_group num_blocks num_self_attends_per_block speech_encoder_layers
        t2u_encoder_layers t2u_decoder_layers num_global_layers mamba_n_groups n_groups""",
    HEAD: """
        head_dim d_kv d_head dim_head attention_head_size qk_nope_head_dim v_head_dim swa_head_dim
        cross_head_dim kv_channels resampler_head_dim resampler_dim_head index_topk sliding_window
        sliding_window_size attention_window_size num_query_tokens resampler_n_latents
        resampler_num_latents latent_query_num num_landmarks kv_lora_rank""",
    POSITIONS: """
        max_position_embeddings n_positions n_ctx max_source_positions max_target_positions
        max_seq_len max_encoder_position_embeddings max_decoder_position_embeddings max_length""",
    14: "patch_size",
    28: "image_size crop_size",
    1: """
        first_k_dense_replace num_dense_layers n_shared_experts num_shared_experts
        moe_num_shared_experts""",
}

# Field name -> tiny value, for fields whose default is a number.
DIMENSIONS: dict[str, int] = {name: value for value, names in _BY_VALUE.items() for name in names.split()}

# Fields of DIMENSIONS that are set even if their default is None.
EVEN_IF_NONE = {"num_key_value_heads"}

# Numeric fields whose name contains one of these are set to zero: no randomness in train mode either.
NOISE = ("dropout", "layerdrop", "pdrop", "drop_path", "jitter")

# Integer fields with these endings are token ids.
ID_SUFFIXES = ("_token_id", "_token_ids", "_token_index", "_id", "_ids", "_index")

# Parameters of two or more dimensions with meaningful initial values: noise is added to them.
NEAR_INITIAL = {"A_log", "D", "dt_bias", "decay"}
RANDOM_BUFFERS = {"final_logits_bias", "e_score_correction_bias"}
# Scalar buffers that calibration would set: the activation range of the quantised I-BERT.
SCALAR_BUFFERS = {"x_min": -8.0, "x_max": 8.0}
LOGIT_NAMES = ("logits", "prediction_logits", "lm_logits")

KINDS: dict[str, str] = {
    "BlipForConditionalGeneration": "multimodal",
    "T5Gemma2ForConditionalGeneration": "seq2seq",
    "UdopForConditionalGeneration": "seq2seq",
    "Florence2ForConditionalGeneration": "seq2seq",
    "Pix2StructForConditionalGeneration": "seq2seq",
    "PPFormulaNetForConditionalGeneration": "seq2seq",
    "VisionEncoderDecoderModel": "seq2seq",
    "Mistral4ForCausalLM": "causal",
}
VARIANTS: dict[str, dict[str, Any]] = {"IBertForMaskedLM[quant]": {"quant_mode": True}}
UNBUILDABLE: dict[str, str] = {
    "InklingForConditionalGeneration": "its vision tower needs scipy, which is not installed",
    "Llama4ForConditionalGeneration": "its forward expects images in a text output, and fails (transformers 5.24)",
    "PI0ForConditionalGeneration": "a robot policy: its forward returns velocities of actions, not logits",
    "Qwen2_5OmniForConditionalGeneration": "has no forward: it generates only; its thinker is covered",
    "Qwen3OmniMoeForConditionalGeneration": "has no forward: it generates only; its thinker is covered",
}

# Models whose vision tower is replaced, because every config of it needs timm.
NEEDS_TIMM = {"Gemma3nForConditionalGeneration"}

# Field -> other fields that a config with it needs: latent attention has one key head per head.
WITH_FIELD: dict[str, dict[str, Any]] = {"kv_lora_rank": {"num_key_value_heads": HEADS}}

_LINEAR_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_LINEAR_INDEXED = {"layer_types": ["linear_attention", "indexed_attention"]}
_CONV_FULL = {"layer_types": ["conv", "full_attention"]}
_SLIDING_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_ALL_HEADS = {"num_key_value_heads": HEADS}
_HYBRIDS = ["linear_attention", "hybrid", "hybrid"]
_SMALL_VQ = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "latent_channels": 32,
    "num_embeddings": 40,
    "resolution": 32,
}
_SMALL_CODEC = {"num_filters": 4, "downsampling_ratios": (2, 2), "depths": (1, 1, 1)}
_SEAMLESS = {
    "feature_projection_input_dim": 16,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "t2u_vocab_size": 53,
    "unit_hifi_gan_vocab_size": 47,
}
# transformers 5.23 requires that all layers of this assistant share their keys, and refuses layers that all do.
_ASSISTANT = {
    "num_hidden_layers": 0,
    "layer_types": [],
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}
_ASSISTANT_UNIFIED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "global_head_dim": HEAD,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_MAMBA2 = {"mamba_d_head": 16, "mamba_n_heads": HEADS, "mamba_n_groups": 1, "mamba_expand": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "Apertus1p5Config": {
        "image_token_id": 61,
        "audio_token_id": 62,
        "image_token_offset": 63,
        "audio_token_offset": 71,
    },
    "Apertus1p5VisionTokenizerConfig": {"base_channels": 32, "channel_multiplier": (1, 1), "codebook_size": 8},
    "BailingHybridConfig": _LINEAR_FULL,
    "BambaConfig": {**_MAMBA2, "attn_layer_indices": [1]},
    "Blip2Config": {"image_token_index": 61},
    "Blip2QFormerConfig": {"vocab_size": 61},
    "BltConfig": {"num_hidden_layers": LAYERS, "encoder_hash_byte_group_vocab": 53},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 61}},
    "ChameleonVQVAEConfig": _SMALL_VQ,
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": _MROPE["rope_parameters"]}},
    "Cosmos3EdgeTextConfig": _MROPE,
    "CwmConfig": {"eos_token_id": [1, 2]},
    "DbrxConfig": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": HEADS, "moe_top_k": 2},
    },
    "DeepseekOcr2SamVisionConfig": {"output_channels": 16, "downsample_channels": [16, 32]},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "DiaConfig": {"delay_pattern": [0, 1, 2]},
    "DiaDecoderConfig": {"num_channels": 3},
    "DiaEncoderConfig": {"vocab_size": 89},
    "DiffusionGemmaTextConfig": {
        "num_experts": HEADS,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "global_head_dim": HEAD,
    },
    "Dots1Config": {"n_routed_experts": HEADS, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "Dots3NoteAudioConfig": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    "Dots3NoteTextConfig": _ALL_HEADS,
    "Dots3NoteVisionConfig": {
        "mlp_layer_types": ["dense", "sparse"],
        "adapter_in_dim": HIDDEN,
        "adapter_out_dim": HIDDEN,
    },
    "Emu3Config": {"vocabulary_map": {"<image>": 61, "<|extra_200|>": 62}},
    "Emu3VQVAEConfig": {"base_channels": 32, "channel_multiplier": (1, 1, 1, 1), "codebook_size": 40},
    "Ernie4_5_VLMoeTextConfig": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        "moe_intermediate_size": [24, 24],
    },
    "DoryConfig": {"num_hidden_layers": 3, "n_input_layers": 1, "n_output_layers": 1},
    "EsmcConfig": _ALL_HEADS,
    "EsmConfig": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 61},
    "EvollaConfig": {
        "protein_encoder_config": {
            "hidden_size": HIDDEN,
            "num_hidden_layers": 1,
            "num_attention_heads": HEADS,
            "intermediate_size": 40,
            "vocab_size": 41,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "aligner_num_add_layers": 1,
    },
    "FastVlmConfig": {"vision_config": {"model_type": "siglip_vision_model"}},
    "Florence2VisionConfig": {
        "depths": (1, 1, 1, 1),
        "embed_dim": (8, 8, 8, 16),
        "num_heads": (2, 2, 2, 2),
        "num_groups": (2, 2, 2, 2),
        "patch_size": (7, 3, 3, 3),
    },
    "FunAsrNanoAdaptorConfig": {"intermediate_size": HEAD},
    "Gemma3nAudioConfig": {"vocab_offset": 90, "vocab_size": 7},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 83},
    "Gemma3nVisionConfig": {"vocab_offset": 83, "vocab_size": 7, "model_args": {}},
    "Gemma4AssistantConfig": {"text_config": _ASSISTANT, "backbone_hidden_size": 16},
    "Gemma4UnifiedAssistantConfig": {"text_config": _ASSISTANT_UNIFIED, "backbone_hidden_size": 16},
    "Gemma4VisionConfig": {"position_embedding_size": 16},
    "Glm4Config": {"eos_token_id": [1, 2]},
    "Glm4vMoeTextConfig": {"rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 1.0}},
    "Glm4vTextConfig": _MROPE,
    "Glm5NextTextConfig": {
        **_ALL_HEADS,
        "index_kpool": 2,
        "qk_rope_head_dim": 0,
        "head_dim": 0,
        **_LINEAR_INDEXED,
    },
    "GlmConfig": {"eos_token_id": [1, 2]},
    "GlmOcrTextConfig": _MROPE,
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Granite4VisionConfig": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    "GraniteMoeHybridConfig": {**_MAMBA2, **_LINEAR_FULL},
    "HunYuanDenseV1Config": {"head_dim": HEAD},
    "HunYuanMoEV1Config": {"head_dim": HEAD},
    "HYV4VLTextConfig": {"rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [1, 1, 0]}},
    "HunYuanVLTextConfig": {"head_dim": HEAD, **_MROPE},
    "HunYuanVLVisionConfig": {"max_image_size": 64, "max_vit_seq_len": 64, "img_max_token_num": 64},
    "Inkling2TextConfig": {"unpadded_vocab_size": VOCABULARY},
    "Inkling2LoopTextConfig": {"unpadded_vocab_size": VOCABULARY},
    "InstructBlipConfig": {"image_token_index": 61},
    "InstructBlipQFormerConfig": {"vocab_size": 61},
    "InstructBlipVideoConfig": {"video_token_index": 61},
    "InstructBlipVideoQFormerConfig": {"vocab_size": 61},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "JanusVQVAEConfig": _SMALL_VQ,
    "KimiLinearConfig": _LINEAR_FULL,
    "Kosmos2Config": {"latent_query_num": 2},
    "KyutaiSpeechToTextConfig": {"num_codebooks": 3, "codebook_vocab_size": 11},
    "LEDConfig": {"attention_window": 8},
    "Lfm2MoeConfig": _CONV_FULL,
    "Lfm3Config": _CONV_FULL,
    "Llama4VisionConfig": {
        "vision_output_dim": HIDDEN,
        "projector_input_dim": HIDDEN,
        "projector_output_dim": HIDDEN,
    },
    "LongcatFlashConfig": {"head_dim": 4, "num_hidden_layers": 4},
    "LukeConfig": {"entity_vocab_size": 53},
    "Mamba2Config": {"head_dim": 16, "expand": 2, "num_heads": 4, "n_groups": 2, "chunk_size": 8},
    "MimiConfig": {
        "upsample_groups": HIDDEN,
        "num_filters": 4,
        "upsampling_ratios": [2, 2],
        "codebook_size": 16,
        "codebook_dim": 16,
    },
    "MinistralConfig": {"head_dim": HEAD},
    "Molmo2AdapterConfig": {"vision_feature_layer": [1, 0]},
    "MoonshineStreamingConfig": {"num_key_value_heads": HEADS},
    "MuseSparkAudioConfig": {
        "num_hidden_layers": 2,
        "patch_sizes": [4, 2],
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
    },
    "Nemotron3_5TranscribeAsrAudioConfig": _ALL_HEADS,
    "Nemotron3_5TranscribeWordTimestampConfig": _ALL_HEADS,
    "Nemotron3DiarizationAudioConfig": _ALL_HEADS,
    "NeoMMEConfig": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
            },
        },
        **_SLIDING_FULL,
    },
    "NystromformerConfig": {"num_landmarks": 7, "segment_means_seq_len": 7},
    "Ovis2VisionConfig": {"vocab_size": 71},
    "PaddleOCRTextConfig": _MROPE,
    "PerceiverConfig": {"d_latents": 24, "num_latents": 10, "qk_channels": 16, "v_channels": 24},
    "PerceptionLMConfig": {"vision_config": {"model_type": "siglip_vision_model", "model_args": {"embed_dim": HIDDEN}}},
    "Phi4MultimodalAudioConfig": {
        "ext_pw_out_channel": 16,
        "depthwise_separable_out_channel": 16,
        "nemo_conv_channels": 16,
    },
    "Phi4MultimodalConfig": {"eos_token_id": [1, 2]},
    "PPFormulaNetVisionConfig": {
        "image_size": 32,
        "patch_size": 8,
        "post_conv_in_channels": 16,
        "post_conv_mid_channels": 16,
        "post_conv_out_channels": 16,
    },
    "Qwen2_5_VLTextConfig": _MROPE,
    "Qwen2_5OmniTextConfig": _MROPE,
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": 63},
    "Qwen2VLTextConfig": _MROPE,
    "Qwen3_5MoeTextConfig": {**_LINEAR_FULL, **_MROPE},
    "Qwen3_5TextConfig": {**_LINEAR_FULL, **_MROPE},
    "Qwen3NextConfig": _LINEAR_FULL,
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 24},
    "Qwen3OmniMoeTextConfig": _MROPE,
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 63},
    "Qwen3VLMoeTextConfig": _MROPE,
    "Qwen3VLTextConfig": _MROPE,
    "Qwen4ExpTextConfig": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 16,
        "ngram_vocab_size_base": 101,
    },
    "RecurrentGemmaConfig": {"block_types": ["recurrent", "attention"]},
    "ReformerConfig": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [8, 24],
        "attn_layers": ["local", "lsh"],
        "hash_seed": 0,
        "num_buckets": 2,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "RoCBertConfig": {
        "pronunciation_vocab_size": 53,
        "shape_vocab_size": 59,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "SeamlessM4TConfig": _SEAMLESS,
    "SeamlessM4Tv2Config": {**_SEAMLESS, "char_vocab_size": 59},
    "Speech2TextConfig": {"conv_channels": 16},
    "SpeechT5Config": {
        "conv_dim": (16,) * 7,
        "speech_decoder_prenet_units": 16,
        "speech_decoder_postnet_units": 16,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "speaker_embedding_dim": 16,
    },
    "SqueezeBertConfig": {"embedding_size": HIDDEN},
    "Step3p7TextConfig": {**_SLIDING_FULL, "sliding_window": 8},
    "UnlimitedOcrSamVisionConfig": {"output_channels": 16, "downsample_channels": [16, 32]},
    "UnlimitedOcrTextConfig": _ALL_HEADS,
    "VibeVoiceAcousticTokenizerConfig": _SMALL_CODEC,
    "VibeVoiceAcousticTokenizerEncoderConfig": _SMALL_CODEC,
    "Wav2Vec2Config": {
        "conv_dim": (16,) * 3,
        "conv_kernel": (10, 3, 3),
        "conv_stride": (5, 2, 2),
        "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    },
    "WavTokenizerEncoderConfig": {"codebook_dim": HIDDEN, "codebook_size": 8},
    "WhisperConfig": {"begin_suppress_tokens": [1, 2]},
    "xLSTMConfig": {"hidden_size": 128, "embedding_dim": 128},
    "XmodConfig": {"default_language": "en_XX"},
    "Zamba2Config": {"layers_block_type": _HYBRIDS, "num_hidden_layers": 3, "n_mamba_heads": HEADS},
    "ZambaConfig": {"layers_block_type": _HYBRIDS, "num_hidden_layers": 3, "n_mamba_heads": 2},
    "ZayaConfig": {"num_experts_per_tok": 1},
}

_PIXELS = {"pixel_values": (2, 3, 28, 28)}


def _kept(length: int, image: int) -> Any:
    """Return a position mask whose first ``image`` positions belong to the image."""
    return lambda generator: (torch.arange(length) < image).long().expand(2, length).clone()


def _patches(generator: torch.Generator) -> torch.Tensor:
    """Return Pix2Struct's flattened patches: row and column number, then the values of the patch."""
    values = torch.randn(2, 4, 32, generator=generator)
    places = torch.tensor([[1.0, 1.0], [1.0, 2.0], [2.0, 1.0], [2.0, 2.0]]).expand(2, 4, 2)
    return torch.cat([places, values], dim=-1)


def _boxes(generator: torch.Generator) -> torch.Tensor:
    """Return boxes of a document, with coordinates within the page."""
    return torch.rand(2, 7, 4, generator=generator).sort(dim=-1).values


def _ids(*shape: int, top: int = 60) -> Any:
    return lambda generator: torch.randint(3, top, shape, generator=generator)


def _shared_states(generator: torch.Generator) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the key and value states that an assistant reads from its target model."""
    return {
        kind: (
            torch.randn(2, 2, 7, HEAD, generator=generator),
            torch.randn(2, 2, 7, HEAD, generator=generator),
        )
        for kind in ("full_attention", "sliding_attention")
    }


_ASSISTED = {
    "input_ids": None,
    "inputs_embeds": (2, 7, 32),
    "position_ids": lambda generator: torch.arange(7).expand(2, 7),
    "shared_kv_states": _shared_states,
}
_SPEECH = {"input_ids": None, "attention_mask": None}

# Model class -> input name -> shape of normal noise, number of ids, function, or None to omit it.
INPUTS: dict[str, dict[str, Any]] = {
    "BlipForConditionalGeneration": _PIXELS,
    "Blip2ForConditionalGeneration": _PIXELS,
    "InstructBlipForConditionalGeneration": {**_PIXELS, "qformer_input_ids": 5},
    "InstructBlipVideoForConditionalGeneration": {"pixel_values": (2, 4, 3, 28, 28), "qformer_input_ids": 5},
    "IdeficsForVisionText2Text": {
        "image_encoder_embeddings": (2, 1, 4, HIDDEN),
        "image_attention_mask": lambda generator: torch.ones(2, 7, 1, dtype=torch.long),
    },
    "Kosmos2ForConditionalGeneration": {**_PIXELS, "image_embeds_position_mask": _kept(7, 2)},
    "VisionEncoderDecoderModel": {**_SPEECH, **_PIXELS},
    "PPFormulaNetForConditionalGeneration": {**_SPEECH, "pixel_values": (2, 3, 32, 32)},
    "Pix2StructForConditionalGeneration": {**_SPEECH, "flattened_patches": _patches},
    "UdopForConditionalGeneration": {"bbox": _boxes},
    "Gemma4AssistantForCausalLM": _ASSISTED,
    "Gemma4UnifiedAssistantForCausalLM": _ASSISTED,
    "KyutaiSpeechToTextForConditionalGeneration": {"input_ids": _ids(2, 7, 4, top=10)},
    "MusicgenForCausalLM": {"input_ids": _ids(8, 7)},
    "MusicgenMelodyForCausalLM": {"input_ids": _ids(8, 7)},
    "DiaForConditionalGeneration": {"decoder_input_ids": _ids(2, 5, 3)},
    "DiffusionGemmaForBlockDiffusion": {"decoder_input_ids": 5},
    "CanaryForConditionalGeneration": {**_SPEECH, "input_features": (2, 32, 16)},
    "CohereAsrForConditionalGeneration": {**_SPEECH, "input_features": (2, 32, 16)},
    "MoonshineForConditionalGeneration": {**_SPEECH, "input_values": (2, 2000)},
    "MoonshineStreamingForConditionalGeneration": {**_SPEECH, "input_values": (2, 1600)},
    "SeamlessM4TForSpeechToText": {**_SPEECH, "input_features": (2, 16, 16)},
    "SeamlessM4Tv2ForSpeechToText": {**_SPEECH, "input_features": (2, 16, 16)},
    "Speech2TextForConditionalGeneration": {**_SPEECH, "input_features": (2, 16, 16)},
    "SpeechEncoderDecoderModel": {**_SPEECH, "input_values": (2, 400)},
    "SpeechT5ForSpeechToText": {**_SPEECH, "input_values": (2, 1600)},
    "VoxtralRealtimeForConditionalGeneration": {"input_features": (2, 16, 56)},
    "WhisperForConditionalGeneration": {**_SPEECH, "input_features": (2, 16, 2 * POSITIONS)},
}
