"""What a weight file tells about the run that made it: facts of the run, gathered for library.weights.metadata."""

import base64
import mimetypes
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import library
from library.console import warn
from library.data.captions import tag_frequency
from library.data.plan import Dataset
from library.options import SubsetSpec
from library.training.prepare import Prepared
from library.weights.embedding_metadata import EmbeddingFacts, embedding_metadata, network_metadata
from library.weights.metadata import (
    DatasetFacts,
    FileFacts,
    ModelSpec,
    Progress,
    RunFacts,
    Settings,
    SubsetFacts,
    lora_metadata,
    training_metadata,
)
from library.weights.model_hash import BackgroundHashes

_TEXTS = (
    *("author", "description", "license", "tags", "usage_hint", "thumbnail", "merged_from", "trigger_phrase"),
    *("preprocessor", "is_negative_embedding"),
)


class RunRecord:
    """The metadata of every file that one run writes."""

    def __init__(
        self,
        prepared: Prepared,
        version: str,
        prediction_type: str,
        hashes: BackgroundHashes,
        session_id: int,
        started_at: float,
        optimizer: str,
        finds_its_rate: bool = False,
    ) -> None:
        """`version` and `prediction_type` are the base model's, such as `sd_v1` and `epsilon`; times are unix
        seconds; `optimizer` is its full label, and `finds_its_rate` is true of Adafactor's relative step."""
        self._finds_its_rate = finds_its_rate
        self._hashes = hashes
        self._prediction_type = prediction_type
        self._prepared = prepared
        self._version = version
        plan, options = prepared.plan, prepared.options
        self._facts = RunFacts(
            session_id=session_id,
            started_at=started_at,
            base_model_version=version,
            base_model=FileFacts(prepared.model.name),
            optimizer=optimizer,
            num_batches_per_epoch=plan.batches_per_epoch,
            num_epochs=prepared.clock.epochs,
            total_batch_size=plan.global_batch_size(0),
            datasets=tuple(_dataset_facts(dataset, prepared) for dataset in plan.datasets),
            from_config=options.dataset.dataset_config is not None,
            network_args=options.network_arguments() or None,
            num_validation_images=prepared.data.held_out.samples_per_epoch if prepared.data.held_out else 0,
        )
        self._given = {name: options.value(f"metadata_{name}") for name in _TEXTS}
        self._given["thumbnail"] = _thumbnail(self._given["thumbnail"])

    def metadata(self, updates_done: int, embedding_files: Sequence[str] = ()) -> dict[str, str]:
        """All text of a network's file saved after `updates_done` updates; the file's own hashes are added when it is
        written.

        Args:
            embedding_files: names of the files with the vectors of the new tokens that were trained with it, where it
                doesn't hold them itself.
        """
        training, progress, spec = self._texts_of(updates_done)
        plain, plan = self._prepared.options.output.no_metadata, self._prepared.embeddings
        tokens = [one.token.text for one in plan.trained] if plan else []
        if not tokens:
            return lora_metadata(training, progress, spec, no_metadata=plain)
        given = {name: text for name, text in spec.texts.items() if text is not None}
        spec = replace(spec, texts={"trigger_phrase": ", ".join(tokens)} | given)
        found = lora_metadata(training, progress, spec, no_metadata=plain)
        return found if plain else found | network_metadata(tokens, embedding_files)

    def embedding_metadata(self, updates_done: int, facts: EmbeddingFacts) -> dict[str, str]:
        """All text of an embedding's file saved after so many updates."""
        training, progress, spec = self._texts_of(updates_done)
        return embedding_metadata(
            facts, training, progress, spec, no_metadata=self._prepared.options.output.no_metadata
        )

    def _texts_of(self, updates_done: int) -> tuple[dict[str, str], Progress, ModelSpec]:
        """What a file saved after so many updates tells, whatever is in it."""
        prepared, now = self._prepared, time.time()
        options = prepared.options
        rates = options.optimizer.text_encoder_lr or ()
        settings = replace(
            Settings.of(options.effective()),
            v2=prepared.model.family.v2,
            seed=prepared.seed,
            max_train_steps=prepared.clock.total_updates,
            zero_terminal_snr=prepared.model.zero_terminal_snr,
            text_encoder_lr=list(rates) if len(rates) > 1 else next(iter(rates), None),
        )
        if self._finds_its_rate:
            initial = f"adafactor:{options.optimizer.learning_rate}"
            settings = replace(settings, learning_rate=None, unet_lr=None, text_encoder_lr=None, lr_scheduler=initial)
        progress = Progress(updates_done // prepared.clock.updates_per_epoch, updates_done, now)
        spec = ModelSpec(
            base_model_version=self._version,
            date=datetime.fromtimestamp(now),
            implementation_version=f"lorasmith/{library.__version__}",
            title=options.output.metadata_title or options.output.output_name,
            resolution=prepared.specs[0].resolution,
            v_prediction=self._prediction_type == "v_prediction",
            min_timestep=options.loss.min_timestep,
            max_timestep=options.loss.max_timestep,
            clip_skip=options.model.clip_skip,
            texts=self._given,
        )
        hashes = self._hashes.result()
        facts = replace(self._facts, base_model=FileFacts(prepared.model.name, *hashes.base))
        if hashes.vae is not None:
            facts = replace(facts, vae=FileFacts(prepared.model.vae_name or "", *hashes.vae))
        return training_metadata(facts, settings), progress, spec


def _thumbnail(value: str | None) -> str | None:
    """A data URL as it is; the path of a picture, which options.logging_checks has looked at, becomes one."""
    if value is None or value.startswith("data:"):
        return value
    path = Path(value)
    try:
        picture = base64.b64encode(path.read_bytes()).decode()
    except OSError as fault:
        warn(f"--metadata_thumbnail: {path} can't be read any more, the file gets none: {fault}")
        return None
    return f"data:{mimetypes.guess_type(path.name)[0]};base64,{picture}"


def _subset_facts(spec: SubsetSpec, count: int) -> SubsetFacts:
    caption = spec.caption
    return SubsetFacts(
        image_dir=spec.name,
        img_count=count,
        num_repeats=spec.num_repeats,
        is_reg=spec.is_reg,
        class_tokens=spec.class_tokens,
        color_aug=spec.color_aug,
        flip_aug=spec.flip_aug,
        random_crop=spec.random_crop,
        shuffle_caption=caption.shuffle,
        keep_tokens=caption.keep_tokens,
        keep_tokens_separator=caption.keep_tokens_separator,
        secondary_separator=caption.secondary_separator,
        enable_wildcard=caption.wildcards,
        caption_prefix=caption.prefix,
        caption_suffix=caption.suffix,
        resize_interpolation=spec.resize_interpolation,
        from_metadata=spec.source != "folder",
    )


def _dataset_facts(dataset: Dataset, prepared: Prepared) -> DatasetFacts:
    spec, records = dataset.spec, dataset.records
    counts = [sum(record.subset == number for record in records) for number in range(len(spec.subsets))]
    buckets = tuple((bucket, len(samples)) for bucket, samples in dataset.samples.items()) if spec.enable_bucket else ()
    errors = [abs(fit.ar_error) for fit in dataset.fits]
    kinds = {subset.resize_interpolation for subset in spec.subsets}
    return DatasetFacts(
        batch_size=spec.batch_size,
        num_train_images=sum(record.repeats for record in records if not record.is_reg),
        num_reg_images=sum(record.repeats for record in records if record.is_reg),
        resolution=spec.resolution,
        enable_bucket=spec.enable_bucket,
        min_bucket_reso=spec.min_bucket_reso if spec.enable_bucket else None,
        max_bucket_reso=spec.max_bucket_reso if spec.enable_bucket else None,
        bucket_no_upscale=spec.bucket_no_upscale,
        subsets=tuple(_subset_facts(*pair) for pair in zip(spec.subsets, counts, strict=True)),
        tag_frequency=tag_frequency(records, prepared.specs),
        buckets=buckets,
        mean_ar_error=sum(errors) / len(errors) if errors else 0.0,
        resize_interpolation=next(iter(kinds)) if len(kinds) == 1 else None,
    )
