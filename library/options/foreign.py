"""Keys that a config file may hold because another known program wrote it. They are named in one line and ignored.

Not here: flags that this program knows and refuses, which stand in the groups.
"""

from collections.abc import Iterable, Mapping

_PROGRAMS: Mapping[str, str] = {
    "the kohya_ss GUI": """
        epoch noise_offset_type stop_text_encoder_training_pct lowvram LoRA_type
        LyCORIS_preset additional_parameters model_list sdxl flux1_checkbox sd3_checkbox num_cpu_threads_per_process
        num_processes num_machines multi_gpu gpu_ids main_process_port dynamo_mode dynamo_use_fullgraph
        dynamo_use_dynamic extra_accelerate_launch_args training_preset loraplus_lr_ratio
        loraplus_text_encoder_lr_ratio loraplus_unet_lr_ratio sdxl_cache_text_encoder_outputs sdxl_no_half_vae
        flux1_cache_text_encoder_outputs flux1_cache_text_encoder_outputs_to_disk split_mode
    """,
    "scripts for other kinds of models": """
        t5xxl clip_l clip_g ae gemma2 qwen3 byt5 dit llm_adapter_path t5_tokenizer_path
        controlnet_model_name_or_path t5xxl_max_token_length gemma2_max_token_length qwen3_max_token_length
        t5_max_token_length t5xxl_device t5xxl_dtype text_encoder_dtype text_encoder_cpu apply_t5_attn_mask
        apply_lg_attn_mask guidance_scale timestep_sampling sigmoid_scale model_prediction_type discrete_flow_shift
        training_shift weighting_scheme logit_mean logit_std mode_scale blocks_to_swap single_blocks_to_swap
        double_blocks_to_swap clip_l_dropout_rate clip_g_dropout_rate t5_dropout_rate pos_emb_random_crop_rate
        enable_scaled_pos_embed sd3_model_type save_clip save_t5xxl train_t5xxl
        mem_eff_save fused_optimizer_groups blockwise_fused_optimizers cache_text_encoder_outputs_device
        system_prompt use_flash_attn use_sage_attn flash_attn sage_attn split_attn attn_mode model_type
        disable_cudnn_backend vae_chunk_size vae_disable_cache cpu_offload_text_encoder fp8_scaled fp8_vl
        llm_adapter_lr self_attn_lr cross_attn_lr mlp_lr mod_lr skip_image_resolution text_encoder_batch_size
        preserve_distribution_shape num_timestep_buckets task dit_high_noise
    """,
    "other training scripts of sd-scripts": """
        train_inpainting no_token_padding train_text_encoder learning_rate_te learning_rate_te1 learning_rate_te2
        use_safetensors block_lr diffusers_xformers stop_text_encoder_training_steps
        conditioning_channels cond_emb_dim control_net_lr reference_model beta_dpo num_groups accelerator_project_dir
    """,
}
FOREIGN: Mapping[str, str] = {name: program for program, names in _PROGRAMS.items() for name in names.split()}


def notices(file: str, names: Iterable[str]) -> list[str]:
    """The lines that say which keys of `file` are ignored: one for all of them, one more for `epoch`."""
    found = list(dict.fromkeys(names))
    if not found:
        return []
    lines = [f"{file}: keys of other programs have no effect here and are ignored: {', '.join(sorted(found))}"]
    if "epoch" in found:
        lines.append(f"{file}: epoch has no effect: max_train_steps counts, or max_train_epochs where it is set")
    return lines
