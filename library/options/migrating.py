"""The text of docs/migrating.md: where the scripts and flags of sd-scripts are here, made from the declarations."""

from library.options.flags import Flag
from library.options.registry import FLAGS

_HEAD = """# Coming from sd-scripts

Generated from `library/options` by `python tools/write_docs.py`; change it there.

Commands, config files, dataset files and weight files work as they are: only the path of a script may differ. One
script trains every family; which one a base model is, is read from its file.

## Scripts

| sd-scripts | here |
|---|---|
"""
_SCRIPTS = {
    "train_network.py, sdxl_train_network.py": "`train_network.py`",
    "networks/extract_lora_from_dylora.py": "`tools/extract_lora_from_dylora.py`",
    "tools/cache_latents.py": "`tools/cache_latents.py`",
    "tools/cache_text_encoder_outputs.py": "`tools/cache_text_encoder_outputs.py`",
    "tools/detect_face_rotate.py": "`tools/detect_faces.py`, which finds faces and names files for the face crop; it "
    "doesn't rotate or cut",
    "finetune/prepare_buckets_latents.py": "not needed: `--cache_latents_to_disk` with a metadata file does it; "
    "`tools/cache_latents.py` does it beforehand",
    "train_textual_inversion.py, sdxl_train_textual_inversion.py": "`train_textual_inversion.py`",
    "networks/resize_lora.py": "`tools/resize_lora.py`; the old path works, too",
    "networks/merge_lora.py, networks/sdxl_merge_lora.py, networks/merge_lora_old.py": "`tools/merge_lora.py`",
    "networks/svd_merge_lora.py": "`tools/merge_lora.py --svd`",
    "networks/extract_lora_from_models.py": "`tools/extract_lora.py`",
    "networks/check_lora_weights.py": "`tools/check_lora.py`",
    "networks/convert_*_lora.py, tools/convert_*_lora*.py": "`tools/convert_lora.py`",
    "networks/lora_interrogator.py": "not part of this project: `tools/show_metadata.py --trigger_words` tells what a "
    "LoRA was trained on",
    "tools/show_metadata.py": "`tools/show_metadata.py`",
    "tools/merge_models.py": "`tools/merge_models.py`",
    "tools/convert_diffusers20_original_sd.py": "`tools/convert_checkpoint.py`; files are written as `.safetensors`, "
    "never as `.ckpt`",
    "tools/resize_images_to_resolution.py": "`tools/resize_images.py`",
    "tools/latent_upscaler.py, tools/original_control_net.py": "not part of this project: they belong to drawing",
    "finetune/make_captions.py": "`tools/caption_images.py`",
    "finetune/make_captions_by_git.py": "`tools/caption_images.py --git`",
    "finetune/tag_images_by_wd14_tagger.py": "`tools/tag_images.py`",
    "finetune/merge_captions_to_metadata.py": "`tools/merge_captions_to_metadata.py`",
    "finetune/merge_dd_tags_to_metadata.py": "`tools/merge_tags_to_metadata.py`",
    "finetune/clean_captions_and_tags.py": "`tools/clean_captions.py`",
    "train_db.py, fine_tune.py, sdxl_train.py, train_controlnet.py, sdxl_train_control_net*.py, train_leco.py, "
    "gen_img.py, sdxl_gen_img.py, *_minimal_inference.py": "not part of this project: it trains networks "
    "and embeddings, not whole models, and draws only previews",
    "train_textual_inversion_XTI.py": "not part of this project: a word has one set of vectors, not one for each layer "
    "of the U-Net",
    "flux_*, sd3_*, lumina_*, hunyuan_image_*, anima_*": "not part of this project: Stable Diffusion 1, 2 and "
    "SDXL only",
}
_REST = """
## What is different on purpose

- `train_network.setup_parser()` exists and returns the argparse parser. Subclassing a trainer class is not supported:
  there is none; what is trained comes from `--network_module`, which keeps sd-scripts' protocol.
- Wrong options end a run with exit code 2 before a model is loaded, all of them at once. Misspelt keys of config files,
  dataset files, `network_args`, `optimizer_args` and `lr_scheduler_args` are errors.
- A resumed run goes on exactly where it was, with the same pictures, noise and rates. States of sd-scripts can't be
  resumed; go on from their weights with `--network_weights`, and with `--initial_step` where the curve should go on.
- Steps are optimizer steps everywhere, whatever the number of processes, warmups included.
- What sd-scripts draws or scales for a whole batch is drawn and scaled for each sample: the strength of
  `--noise_offset_random_strength` and `--ip_noise_gamma_random_strength`, pyramid sizes, and the division by the
  noise's deviation. So a sample's noise doesn't depend on its neighbours.
- With zero terminal SNR, losses are weighed by the SNR after the rescaling; `--legacy_ztsnr_weights` takes the one
  before it.
- `--network_weights` and the network agree on alpha: the file's counts.
- Textual inversion trains the vectors of the new tokens only, not the whole table of the text encoder, and never what
  is in it already. There may be several tokens: `--token_string`, `--num_vectors_per_token`, `--init_word` and
  `--weights` take one value for each.
- `--init_word` must be one token; a phrase goes to `--initial_phrase`, which gives each token of it a vector.
- `--use_object_template` and `--use_style_template` are other names of `--caption_preset`; the templates are our own.
- Beside the `.pt` file of an embedding there is always a `.safetensors` file with the same tensors and metadata.
- Latents are the mean of the VAE's distribution, not one draw of it (`--latent_sampling sample` draws anew each time).
- `merge_lora.py` counts a ratio once. sd-scripts' merge of two LoRAs multiplies both factors by it, so that users gave
  square roots; and it adds factors, which mixes the LoRAs with each other. Here the product is exact.
- `resize_lora.py` with `--dynamic_method` keeps exactly the rank that the criterion needs; `--legacy_rank` keeps one
  more, as sd-scripts does. `resize_images.py` keeps width and height where they belong and makes every size from the
  picture itself. `tag_images.py --tag_replacement` works.
- Cached latents and text outputs know what they were made from; stale ones are made again.

## From diffusers and InvokeAI

Command lines of diffusers' `textual_inversion.py` and of `invokeai-ti` run with `train_textual_inversion.py`:
[options.md](options.md#names-of-other-programs) lists what becomes of their flags. What differs:

- Pictures keep their aspect ratio and are cropped in the middle, or kept whole with `--enable_bucket`; none is
  squashed, and none is mirrored without `--flip_aug`.
- Files and states are saved at one interval: the smaller of `--save_steps` and `--checkpointing_steps`.
- `--validation_prompt` is one of `--preview_prompts`, drawn with 30 sampling steps; ` --s 25` behind it changes that.
- `--scale_lr` is off unless it is given (`invokeai-ti` couldn't do without), and `--no_scale_lr` wins over a file.

## Flags

*honoured* flags do what they did. *equivalent* ones are accepted with one line, because the result is the same without
them. *refused* ones end the run with exit code 2.
"""


def migrating_page() -> str:
    """The whole text of docs/migrating.md."""
    rows = [f"| {_code(theirs)} | {ours} |" for theirs, ours in _SCRIPTS.items()]
    parts = [_HEAD + "\n".join(rows) + "\n" + _REST]
    for kind, title in (("equivalent", "nothing to do"), ("refused", "what to use instead")):
        found = [flag for flag in FLAGS.values() if flag.kind == kind]
        parts.append(f"| {kind} | {title} |\n|---|---|\n" + "\n".join(_row(flag) for flag in found) + "\n")
    values = [flag for flag in FLAGS.values() if flag.refuse]
    parts.append("| refused values | what to use instead |\n|---|---|\n" + "\n".join(map(_value_rows, values)) + "\n")
    honoured = ", ".join(f"`{flag.option}`" for flag in FLAGS.values() if flag.kind == "honoured")
    parts.append(f"All others are honoured, with their meaning in [options.md](options.md): {honoured}.\n")
    return "\n".join(parts)


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def _row(flag: Flag) -> str:
    return f"| `{flag.option}` | {flag.why} |"


def _value_rows(flag: Flag) -> str:
    return "\n".join(f"| `{flag.option} {value}` | {why} |" for value, why in flag.refuse.items())
