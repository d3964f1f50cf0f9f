"""Tag the pictures of a folder with a tagger of the WD14 family.

    python tools/tag_images.py pictures --remove_underscore --character_tags_first --undesired_tags "simple background"
    python tools/tag_images.py pictures --repo_id taggers/wd-vit-v3 --output_path pictures.jsonl --batch_size 8

--repo_id is a folder with model.onnx and selected_tags.csv (or tag_mapping.json), or a name on the Hugging Face hub.
Tags go into a text file beside each picture, or all into one .json or .jsonl file. Pictures that have theirs are passed
over, so that a stopped run goes on where it was; --overwrite makes them anew, --append_tags adds what is missing.
Wherever a tag is named, underscores and spaces mean the same. Needs onnxruntime: pip install 'lorasmith[tag]'.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.data.captioning.flags import add_outputs, add_reading

if TYPE_CHECKING:
    from library.data.captioning.tagger import Tagger
    from library.data.captioning.tags import Rules

REPO = "SmilingWolf/wd-v1-4-convnext-tagger-v2"
SINGLE = ("general", "character", "meta", "model", "copyright", "artist")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("train_data_dir", type=Path, metavar="DIR", help="folder of pictures")
    model = found.add_argument_group("tagger")
    model.add_argument("--repo_id", default=REPO, metavar="MODEL", help="folder or hub name (default: %(default)s)")
    model.add_argument(
        "--model_dir", type=Path, default=Path("wd14_tagger_model"), metavar="DIR", help="where downloads go"
    )
    model.add_argument("--force_download", action="store_true", help="download what is there already, too")
    model.add_argument("--onnx", action="store_true", help="nothing to do: taggers always run by onnxruntime")
    add_reading(model)
    output = add_outputs(found, "tags", ".txt")
    output.add_argument("--caption_separator", default=", ", metavar="TEXT", help="between tags (default: ', ')")
    output.add_argument("--append_tags", action="store_true", help="add to the tags that are there")
    output.add_argument("--frequency_tags", action="store_true", help="print how often each tag was given")
    tags = found.add_argument_group("tags")
    tags.add_argument("--thresh", type=float, default=0.35, metavar="P", help="least probability (default: 0.35)")
    for category in SINGLE:
        tags.add_argument(f"--{category}_threshold", type=float, metavar="P", help="(default: --thresh)")
    tags.add_argument("--remove_underscore", action="store_true", help="spaces in tags longer than three characters")
    tags.add_argument("--undesired_tags", default="", metavar="TAGS", help="tags to leave out, with commas between")
    tags.add_argument("--use_rating_tags", action="store_true", help="the rating as the first tag")
    tags.add_argument("--use_rating_tags_as_last_tag", action="store_true")
    tags.add_argument("--use_quality_tags", action="store_true", help="the quality as the first tag")
    tags.add_argument("--use_quality_tags_as_last_tag", action="store_true")
    tags.add_argument("--character_tags_first", action="store_true")
    tags.add_argument("--always_first_tags", metavar="TAGS", help="tags that come first wherever they are found")
    tags.add_argument("--tag_replacement", metavar="PAIRS", help="a,b;c,d: b for a, d for c; escape with a backslash")
    tags.add_argument("--character_tag_expand", action="store_true", help="name_(series) becomes name, series")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = parser().parse_args(argv)
    from library.tool_script import run

    return run(lambda: tag(given))


def tag(given: argparse.Namespace) -> None:
    """Tag what has no tags yet.

    Raises:
        UserError: flags, tagger or folder can't be used.
    """
    from library.console import say
    from library.data.captioning import loop, tagger
    from library.data.captioning.pictures import Loaded, find_work
    from library.data.captioning.store import open_store
    from library.data.captioning.tagger_files import find_tagger
    from library.data.captioning.tags import Chooser, appended
    from library.errors import Problem, UserError

    rules = _rules(given)
    tagger.require_runtime("tag_images.py")
    store = open_store(
        given.train_data_dir, given.caption_extension, given.output_path, "tags", relative=given.relative_paths
    )
    again = given.overwrite or given.append_tags
    work = find_work(given.train_data_dir, store, recursive=given.recursive, again=again)
    for line in work.notices:
        say(line)
    if given.onnx:
        say("--onnx: taggers always run by onnxruntime")
    if not work.todo:
        say(f"all {work.done} pictures have tags; --overwrite makes them anew, --append_tags adds to them")
        return
    if given.output_path is None and (closed := loop.problems_with_places(work.todo)):
        raise UserError(closed)
    files = find_tagger(given.repo_id, given.model_dir, flag="--repo_id", force=given.force_download)
    model = tagger.Tagger(files)
    chooser = Chooser(model.labels, _for_model(rules, model))
    say(f"{loop.counted(len(work.todo))}, {len(model.labels)} tags, {model.provider}")

    def describe(batch: Sequence[Loaded]) -> list[str | Problem]:
        chosen = [chooser(row) for row in model([one.values for one in batch if one.values is not None])]
        texts: list[str | Problem] = []
        for one, tags in zip(batch, chosen, strict=True):
            try:
                before = store.read(one.path) if given.append_tags else ""
                texts.append(appended(before, tags, given.caption_separator))
            except UserError as fault:
                texts.append(fault.problems[0])
        return texts

    workers = given.max_data_loader_n_workers
    threads = min(16, os.cpu_count() or 1) if workers is None else workers
    outcome = loop.describe_all(
        work,
        store,
        model.prepare,
        describe,
        what="tags",
        batch_size=given.batch_size,
        threads=threads,
        aloud=given.debug,
    )
    loop.report(work, outcome, "tags")
    if given.frequency_tags:
        for text, count in sorted(chooser.counts.items(), key=lambda pair: (-pair[1], pair[0])):
            sys.stdout.write(f"{text}: {count}\n")


def _rules(given: argparse.Namespace) -> "Rules":
    """What the flags say of tags.

    Raises:
        UserError: with all that is wrong with the flags.
    """
    from library.console import say
    from library.data.captioning.metadata_files import problem_with_output
    from library.data.captioning.store import problem_with_extension
    from library.data.captioning.tagger import thresholds
    from library.data.captioning.tags import CATEGORIES, ONE_OF, Category, Rules, listed, replacements
    from library.errors import Problem, UserError

    problems = []
    single: dict[Category, float | None] = {name: getattr(given, f"{name}_threshold", None) for name in CATEGORIES}
    for flag, value in (("thresh", given.thresh), *((f"{name}_threshold", single[name]) for name in CATEGORIES)):
        if value is not None and not 0 <= value <= 1:
            problems.append(Problem(f"--{flag}", f"{value} isn't a probability", "give a number from 0 to 1"))
    for flag, least in (("batch_size", 1), ("max_data_loader_n_workers", 0)):
        if getattr(given, flag) is not None and getattr(given, flag) < least:
            problems.append(Problem(f"--{flag}", f"{getattr(given, flag)} isn't {least} or more"))
    if given.append_tags and given.overwrite:
        problems.append(Problem("--append_tags", "contradicts --overwrite", "give one of them"))
    if given.output_path is not None:
        problems += filter(None, [problem_with_output(given.output_path, "--output_path")])
    else:
        problems += filter(None, [problem_with_extension(given.caption_extension, "--caption_extension")])
        if given.relative_paths:
            problems.append(Problem("--relative_paths", "has no meaning without --output_path"))
    if not given.train_data_dir.is_dir():
        problems.append(Problem(str(given.train_data_dir), "there is no such folder"))
    pairs = []
    try:
        pairs = list(replacements(given.tag_replacement, "--tag_replacement"))
    except UserError as fault:
        problems += fault.problems
    if problems:
        raise UserError(problems)
    first_of = [what for what in ONE_OF if getattr(given, f"use_{what}_tags")]
    last_of = [what for what in ONE_OF if getattr(given, f"use_{what}_tags_as_last_tag")]
    for what in set(first_of).intersection(last_of):
        say(f"--use_{what}_tags_as_last_tag: has no effect with --use_{what}_tags")
    return Rules(
        thresholds=thresholds(given.thresh, single),
        undesired=listed(given.undesired_tags, given.caption_separator),
        replacements=pairs,
        first=listed(given.always_first_tags, given.caption_separator),
        first_of=first_of,
        last_of=[what for what in last_of if what not in first_of],
        characters_first=given.character_tags_first,
        expand_characters=given.character_tag_expand,
        remove_underscore=given.remove_underscore,
    )


def _for_model(rules: "Rules", model: "Tagger") -> "Rules":
    """The rules in the model's usual order; tags of the user's that it doesn't know are named."""
    from dataclasses import replace

    from library.console import warn
    from library.data.captioning.tags import unknown
    from library.data.sources.picture_files import some

    for flag, names in (
        ("--undesired_tags", rules.undesired),
        ("--always_first_tags", rules.first),
        ("--tag_replacement", [source for source, _ in rules.replacements]),
    ):
        if strangers := unknown(names, model.labels, rules):
            warn(f"{flag}: this tagger has no {some(strangers)}")
    return replace(rules, by_probability=model.sorts)


if __name__ == "__main__":
    sys.exit(main())
